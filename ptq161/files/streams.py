"""Standard output and standard error that never fail: what a command has done must not be lost to what it prints."""

from __future__ import annotations

import contextlib
import io
import os
import select
import sys
from typing import Any, TextIO


def never_fail_to_print() -> None:
    """Let the process's output go where it can, and be dropped from where it cannot.

    A reader that has gone (``| head -1``), a full disk or a closed stream silences the stream; a character that its
    encoding lacks is written as an escape. Streams that somebody put in the place of the process's own are left alone.
    """
    for descriptor in (0, 1, 2):
        with contextlib.suppress(OSError):
            try:
                os.fstat(descriptor)
            except OSError:
                # It was closed by whoever started this process: the next file that is opened would get its number, and
                # with it whatever a library prints. The lowest free number is this one.
                os.open(os.devnull, os.O_RDWR)
                os.set_inheritable(descriptor, True)
    if sys.stdout is sys.__stdout__:
        sys.stdout = _unfailing(sys.stdout, 1)
    if sys.stderr is sys.__stderr__:
        sys.stderr = _unfailing(sys.stderr, 2)


class _UnfailingFile(io.FileIO):
    """A descriptor of which a failing write makes the null device."""

    def write(self, data: Any) -> int:
        """Write as much as the stream takes at once; after a failure, everything goes to the null device."""
        try:
            while (written := super().write(data)) is None:  # another process made the terminal or pipe non-blocking
                select.select([], [self], [])
        except OSError:
            null = os.open(os.devnull, os.O_WRONLY)
            os.dup2(null, self.fileno())
            os.close(null)
            return len(data)
        return written


def _unfailing(stream: TextIO | None, descriptor: int) -> TextIO:
    """Return a stream like another one on the same descriptor; None is what Python has for a closed one."""
    if stream is not None:
        with contextlib.suppress(OSError, ValueError):
            stream.flush()
    file = _UnfailingFile(descriptor, "wb", closefd=False)
    return io.TextIOWrapper(
        io.BufferedWriter(file),
        encoding=getattr(stream, "encoding", None) or "utf-8",
        errors="backslashreplace",
        line_buffering=getattr(stream, "line_buffering", descriptor == 2),
        write_through=getattr(stream, "write_through", False),
    )
