"""The failures of a sweep: printed as they happen, and once more in a table at the end.

Jobs run in the sweep's own process, in subprocesses or on other machines, and Hydra raises only the first failure,
after the last job. So each failing job appends a line to a file in the sweep's directory.
"""

from __future__ import annotations

import dataclasses
import sys
from pathlib import Path
from typing import Any

from hydra.core.utils import JobReturn, JobStatus
from hydra.errors import CompactHydraException
from omegaconf import DictConfig
from rich.console import Console
from rich.table import Table

from ptq161.files.atomic import writing
from ptq161.files.strict_json import decode_json, encode_json
from ptq161.sweep.overrides import own_overrides

FAILURES = "failures.jsonl"
STOPPED = "The sweep stops at its first failure (on_error=stop); finished runs are kept."
STOPPABLE = ("basic_launcher.BasicLauncher", "ptq161_launcher.LocalLauncher")
"""Launchers that start jobs one after the other, and so can stop; the others queue all jobs at once."""


class FailedRunError(CompactHydraException):
    """The exception of a failed job: Hydra prints it without a traceback (the run's log has that) and exits with 1.

    Args:
        message: what Hydra prints after the last job.
        sentence: why the job failed, where the message does not say it.

    Attributes:
        sentence: why the job failed.
    """

    def __init__(self, message: str, sentence: str | None = None) -> None:
        super().__init__(message)
        self.sentence = sentence or message


class FailedJob(JobReturn):
    """Raises why the job failed, and nothing else: Hydra's own class also writes the whole command on stderr."""

    @property
    def return_value(self) -> Any:
        """The job's value.

        Raises:
            Exception: that of a failed job.
        """
        if self.status == JobStatus.FAILED:
            raise self._return_value
        return super().return_value

    @return_value.setter
    def return_value(self, value: Any) -> None:
        self._return_value = value


@dataclasses.dataclass(frozen=True)
class Failure:
    """A job of a sweep that failed.

    Attributes:
        job: its number.
        overrides: of the command line, for this job.
        sentence: why it failed.
        run_dir: its directory.
    """

    job: int
    overrides: list[str]
    sentence: str
    run_dir: str

    def error(self) -> FailedRunError:
        """Return the exception with which the job ends."""
        message = "One or more jobs of this sweep failed; the table of failures gives the reason of each."
        return FailedRunError(message, self.sentence)


def record_failure(sweep_dir: str, failure: Failure) -> None:
    """Add a failure to the sweep's file.

    Raises:
        UserError: the file cannot be written.
    """
    path = Path(sweep_dir, FAILURES)
    # One short write in append mode is not interleaved with that of another process.
    with writing(path), path.open("a", encoding="utf-8") as file:
        file.write(encode_json(dataclasses.asdict(failure)) + "\n")


def read_failures(sweep_dir: Path | str) -> list[Failure]:
    """Return a sweep's failures in the order of its jobs; damaged lines are skipped."""
    try:
        lines = Path(sweep_dir, FAILURES).read_text(encoding="utf-8", errors="replace").splitlines()
    except OSError:
        return []
    failures = {}
    for line in lines:
        try:
            failure = Failure(**decode_json(line))
        except (ValueError, TypeError):
            continue
        failures[failure.job] = failure
    return [failures[job] for job in sorted(failures)]


def print_failure(failure: Failure) -> None:
    """Print one failure on stderr."""
    print(f"Job {failure.job} ({' '.join(failure.overrides)}) failed: {failure.sentence}", file=sys.stderr, flush=True)


def print_failures(sweep_dir: str, sweep: DictConfig) -> None:
    """Print the table of a sweep's failures on stderr; nothing if there are none."""
    if not (failures := read_failures(sweep_dir)):
        return
    table = Table(title=f"{len(failures)} failed: {sweep_dir}", title_justify="left")
    for name in ("job", "overrides", "reason"):
        table.add_column(name, overflow="fold")
    for failure in failures:
        label = " ".join(own_overrides(failure.overrides, sweep))
        table.add_row(str(failure.job), label, failure.sentence, end_section=True)
    Console(stderr=True, markup=False, highlight=False).print(table)
