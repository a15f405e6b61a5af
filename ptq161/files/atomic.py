"""Atomic writes: a file has its old content or its new one, and a failure is a ``UserError``."""

from __future__ import annotations

import contextlib
import errno
import os
import tempfile
from collections.abc import Iterator
from pathlib import Path

from ptq161.errors import UserError

_RUN_DIR_ADVICE = "choose a writable run directory with hydra.run.dir=DIR"


def write_atomically(path: Path, content: str | bytes, advice: str = _RUN_DIR_ADVICE) -> None:
    """Write a file so that a reader, and a crash at any moment, leave the old content or the new one, never a part.

    Args:
        path: of the file; its folder exists.
        content: text becomes UTF-8.
        advice: see :func:`writing`.

    Raises:
        UserError: the folder cannot be written, or the disk is full.
    """
    data = content.encode() if isinstance(content, str) else content
    with writing(path, advice):
        handle, name = tempfile.mkstemp(prefix=f".{path.name}.", suffix=".tmp", dir=path.parent)
        try:
            with os.fdopen(handle, "wb") as file:
                # mkstemp makes files that only their owner can read; a record gets the permissions of any new file.
                os.fchmod(file.fileno(), 0o666 & ~umask())
                file.write(data)
                file.flush()
                os.fsync(file.fileno())
            os.replace(name, path)
        except BaseException:
            with contextlib.suppress(OSError):
                os.unlink(name)
            raise
        _sync_folder(path.parent)


@contextlib.contextmanager
def writing(path: Path, advice: str = _RUN_DIR_ADVICE) -> Iterator[None]:
    """Turn an ``OSError`` inside the context into a ``UserError`` that names ``path``.

    Args:
        path: the file or folder that is written inside.
        advice: ends the sentence, unless the disk is full.

    Raises:
        UserError: an ``OSError`` arises inside.
    """
    try:
        yield
    except OSError as error:
        if error.errno in (errno.ENOSPC, errno.EDQUOT):
            raise UserError(f"{path} cannot be written because the disk is full; free space and run again.") from error
        reason = error.strerror or str(error)
        raise UserError(f"{path} cannot be written ({reason}); {advice}.") from error


def umask() -> int:
    """Return the process's umask; where the system does not show it, by setting it for a moment."""
    with contextlib.suppress(OSError, ValueError, IndexError):
        return int(Path("/proc/self/status").read_text().partition("Umask:")[2].split()[0], 8)
    mask = os.umask(0)
    os.umask(mask)
    return mask


def _sync_folder(folder: Path) -> None:
    """Sync a folder, which makes a rename inside it durable, where the file system allows that."""
    with contextlib.suppress(OSError):
        handle = os.open(folder, os.O_RDONLY)
        try:
            os.fsync(handle)
        finally:
            os.close(handle)
