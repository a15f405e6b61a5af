"""Runs in several processes, and killed ones: what they leave is reused, and is what an undisturbed run has."""

from __future__ import annotations

import functools
import json
import multiprocessing
import os
import random
import signal
import threading
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

from tqdm import tqdm

from ptq161.cache.store import stored_entries
from ptq161.tracking.read import RunData, read_run
from ptq161.tracking.record import RunRecord
from tests.cache.runs import Run, execute, model_files, plain, scores

FORK = multiprocessing.get_context("fork")


def start(overrides: list[str], run_dir: Path, before: Callable[[], None] = lambda: None) -> Any:
    """Run in another process, which first calls ``before``."""

    def child() -> None:
        os.dup2(os.open(os.devnull, os.O_WRONLY), 1)
        os.dup2(os.open(os.devnull, os.O_WRONLY), 2)
        # Bars of forked processes share a lock, which a killed one would never give back (as in the sweep's workers).
        tqdm.set_lock(threading.RLock())
        before()
        execute(overrides, run_dir)

    process = FORK.Process(target=child)
    process.start()
    return process


def kill_at(operation: int) -> None:
    """Let this process kill itself just before so many operations on files and numbers that are recorded."""
    left = iter(range(operation, 0, -1))

    def counted(function: Callable[..., Any]) -> Callable[..., Any]:
        def call(*args: Any, **kwargs: Any) -> Any:
            if next(left) == 1:
                os.kill(os.getpid(), signal.SIGKILL)
            return function(*args, **kwargs)

        return call

    for owner, name in [(os, "fsync"), (os, "replace"), (os, "rename"), (os, "link"), (RunRecord, "metric")]:
        setattr(owner, name, counted(getattr(owner, name)))


def test_parallel_runs_compute_once(run: Run, settings: list[str], tmp_path: Path) -> None:
    processes = [start(settings, tmp_path / str(i)) for i in range(3)]
    for process in processes:
        process.join(120)
    assert [process.exitcode for process in processes] == [0, 0, 0]
    runs = [read_run(tmp_path / str(i)) for i in range(3)]
    assert [r.manifest.get("reused_from") is not None for r in runs].count(False) == 1
    assert len({json.dumps(scores(r)) for r in runs}) == len({str(model_files(r)) for r in runs}) == 1


def assert_never_interrupted(found: RunData, whole: RunData) -> None:
    """What ``found`` holds is what ``whole`` does, byte for byte but for times."""
    assert model_files(found) == model_files(whole)
    assert scores(found) == scores(whole)
    assert plain(found.metrics) == plain(whole.metrics)
    assert [s["text"] for s in found.samples] == [s["text"] for s in whole.samples]


def test_killed_at_random_operations_until_it_is_finished(run: Run, settings: list[str], tmp_path: Path) -> None:
    whole, moments, killed = run("whole", "cache=false"), random.Random(0), 0
    while True:
        # Later and later, so that it comes to an end.
        operation = moments.randint(1, 40 + 10 * killed)
        process = start(settings, tmp_path / f"attempt{killed}", functools.partial(kill_at, operation))
        process.join(120)
        if process.exitcode != -signal.SIGKILL:
            break
        killed += 1
    assert killed >= 10
    found = read_run(tmp_path / f"attempt{killed}")
    assert_never_interrupted(found, whole)
    assert all(entry.finished for entry in stored_entries(tmp_path / "store"))


def test_killed_at_random_times_until_it_is_finished(run: Run, settings: list[str], tmp_path: Path) -> None:
    whole, moments = run("whole", "cache=false"), random.Random(0)
    began = time.monotonic()
    start([*settings, "cache=false"], tmp_path / "timed").join(120)
    seconds = time.monotonic() - began
    for attempt in range(16):
        process = start(settings, tmp_path / f"attempt{attempt}")
        process.join(seconds * moments.uniform(0, 0.3 + attempt / 15) if attempt < 15 else 120)
        if process.exitcode is not None:
            break
        process.kill()
        process.join()
    assert process.exitcode == 0
    assert_never_interrupted(read_run(tmp_path / f"attempt{attempt}"), whole)
    assert all(entry.finished for entry in stored_entries(tmp_path / "store"))
