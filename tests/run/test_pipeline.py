"""What follows a finished run."""

from __future__ import annotations

import sys
from typing import Any

import pytest

from ptq161.run import pipeline
from ptq161.run.session import RunContext

RESULTS = {"metrics": {}, "full_precision": {}, "protocol": {}, "seconds": {}, "peak_memory_bytes": 0}


class Broken:
    """A stdout that takes nothing."""

    encoding = "utf-8"

    def __init__(self, error: Exception) -> None:
        self.error = error

    def write(self, text: str) -> int:
        raise self.error

    def flush(self) -> None:
        raise self.error

    def isatty(self) -> bool:
        return False


@pytest.mark.parametrize(
    "stdout",
    [
        Broken(BrokenPipeError(32, "Broken pipe")),
        Broken(OSError(28, "No space left on device")),
        Broken(UnicodeEncodeError("ascii", "±", 0, 1, "ordinal not in range")),
        Broken(ValueError("I/O operation on closed file")),
        None,
    ],
)
def test_results_that_cannot_be_printed_are_returned(monkeypatch: pytest.MonkeyPatch, stdout: Any) -> None:
    monkeypatch.setattr(pipeline, "run_once", lambda config, context, compute: RESULTS)
    monkeypatch.setattr(sys, "stdout", stdout)
    config: Any = None
    assert pipeline.run(config, RunContext("run", {}, [], "job")) == RESULTS
