"""The log file of a run."""

from __future__ import annotations

import contextlib
import logging
import sys
from collections.abc import Iterator
from pathlib import Path

from ptq161.files.atomic import writing

_FORMAT = "[%(asctime)s][%(name)s][%(levelname)s] %(message)s"


class RunLog(logging.FileHandler):
    """Writes the process's log to the run's file; where that fails, the run goes on without a log."""

    def handleError(self, record: logging.LogRecord) -> None:
        """Report the first failure in one line and stop logging; the base class prints a traceback for each line."""
        error = sys.exc_info()[1]
        self.setLevel(logging.CRITICAL + 1)
        print(f"{self.baseFilename} cannot be written anymore: {error}", file=sys.stderr)

    def traceback(self, error: BaseException) -> None:
        """Write an exception with its traceback to the file alone; the terminal shows one sentence."""
        exc_info = (type(error), error, error.__traceback__)
        record = logging.LogRecord(
            __name__, logging.ERROR, __file__, 0, "the run ended with an exception", None, exc_info
        )
        self.handle(record)


@contextlib.contextmanager
def run_log(path: Path) -> Iterator[RunLog]:
    """Write log messages of level INFO and above, inside the context, to a new file.

    Raises:
        UserError: the file cannot be written.
    """
    with writing(path):
        handler = RunLog(path, mode="w", encoding="utf-8")
    handler.setLevel(logging.INFO)
    handler.setFormatter(logging.Formatter(_FORMAT))
    root, package = logging.getLogger(), logging.getLogger("ptq161")
    level = package.level
    if package.getEffectiveLevel() > logging.INFO:
        package.setLevel(logging.INFO)
    root.addHandler(handler)
    try:
        yield handler
    finally:
        root.removeHandler(handler)
        package.setLevel(level)
        with contextlib.suppress(OSError):
            handler.close()
