"""SIGINT and SIGTERM as an exception, so that a killed run closes its record on the way out."""

from __future__ import annotations

import contextlib
import os
import signal
import sys
import threading
from collections.abc import Callable, Iterator
from types import FrameType
from typing import Any

_SIGNALS = (signal.SIGINT, signal.SIGTERM)
_AGAIN_SECONDS = 0.1


class Interrupted(KeyboardInterrupt):
    """A signal asked the process to end.

    A ``KeyboardInterrupt``, because libraries clean up after that and do not mistake it for an error of their own.

    Args:
        number: of the signal.

    Attributes:
        signal: the signal.
        exit_code: the status with which the process should end: 130 after SIGINT, 143 after SIGTERM.
    """

    def __init__(self, number: int) -> None:
        self.signal = signal.Signals(number)
        self.exit_code = 128 + number
        super().__init__(self.signal.name)


@contextlib.contextmanager
def exit_on_interrupt() -> Iterator[None]:
    """Turn a ``KeyboardInterrupt`` that leaves the context into one line on stderr and the signal's exit status."""
    try:
        yield
    except KeyboardInterrupt as interrupt:
        print(f"\nInterrupted ({str(interrupt) or 'SIGINT'}).", file=sys.stderr)
        sys.exit(getattr(interrupt, "exit_code", 130))


class Interrupts:
    """Raises :class:`Interrupted` in the main thread when SIGINT or SIGTERM arrives, unless :meth:`deferred`.

    The handlers are in place only inside :meth:`installed`. What a destructor or a callback of the garbage collector
    raises, Python drops: a signal that arrives in one is sent again a little later.
    """

    def __init__(self) -> None:
        self._deferring = False
        self._pending: int | None = None
        self._report: Callable[[Any], object] = sys.unraisablehook

    @contextlib.contextmanager
    def installed(self) -> Iterator[None]:
        """Handle the signals inside the context, and restore the earlier handlers after it.

        Python sets handlers in the main thread alone; in another thread the context has no effect.
        """
        if threading.current_thread() is not threading.main_thread():
            yield
            return
        before = {number: signal.signal(number, self._on_signal) for number in _SIGNALS}
        self._report, sys.unraisablehook = sys.unraisablehook, self._on_dropped
        try:
            yield
        finally:
            sys.unraisablehook = self._report
            for number, handler in before.items():
                # None is a handler that was not set from Python, which cannot be restored.
                signal.signal(number, signal.SIG_DFL if handler is None else handler)

    @contextlib.contextmanager
    def deferred(self) -> Iterator[None]:
        """Hold signals back inside the context, which must be short, and raise the last of them after it."""
        self._deferring = True
        try:
            yield
        finally:
            self._deferring = False
            pending, self._pending = self._pending, None
            if pending is not None:
                raise Interrupted(pending)

    def _on_dropped(self, dropped: Any) -> None:
        if not isinstance(dropped.exc_value, Interrupted):
            self._report(dropped)
            return
        again = threading.Timer(_AGAIN_SECONDS, os.kill, (os.getpid(), dropped.exc_value.signal))
        again.daemon = True
        again.start()

    def _on_signal(self, number: int, frame: FrameType | None) -> None:
        if self._deferring:
            self._pending = number
        else:
            raise Interrupted(number)
