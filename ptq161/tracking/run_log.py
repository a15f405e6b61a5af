"""The run's own log file."""

from __future__ import annotations

import contextlib
import logging
import sys
from collections.abc import Iterator
from pathlib import Path

from ptq161.files.atomic import writing

FORMAT = "[%(asctime)s][%(name)s][%(levelname)s] %(message)s"


class RunLog(logging.FileHandler):
    """Writes what the process logs, and keeps out of the way when it cannot."""

    def handleError(self, record: logging.LogRecord) -> None:
        """Say once that the log ends here, where logging would print a traceback for every line."""
        error = sys.exc_info()[1]
        self.setLevel(logging.CRITICAL + 1)
        print(f"{self.baseFilename} cannot be written anymore: {error}", file=sys.stderr)

    def traceback(self, error: BaseException) -> None:
        """Write an exception with its traceback into the file and nowhere else: the terminal gets one sentence."""
        exc_info = (type(error), error, error.__traceback__)
        record = logging.LogRecord(
            __name__, logging.ERROR, __file__, 0, "the run ended with an exception", None, exc_info
        )
        self.handle(record)


@contextlib.contextmanager
def run_log(path: Path) -> Iterator[RunLog]:
    """Send everything that is logged inside, from INFO on, to a new file.

    Raises:
        UserError: the file cannot be written.
    """
    with writing(path):
        handler = RunLog(path, mode="w", encoding="utf-8")
    handler.setLevel(logging.INFO)
    handler.setFormatter(logging.Formatter(FORMAT))
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
