"""Killed runs end as undisturbed ones do, and the benchmark that says so notices where one does not."""

from __future__ import annotations

import json
import re
import shutil
from pathlib import Path
from types import ModuleType

import pytest

from ptq161.cache.store import Store, stored_entries
from ptq161.files.checksums import sums_of
from ptq161.tracking.record import RunRecord
from ptq161.tracking.settings import TrackerConfig
from tests.benchmarks.conftest import ROOT, script


@pytest.mark.slow
def test_killed_runs_end_as_undisturbed_ones() -> None:
    ended = script("kills.py", "--n", "4", "--seed", "20", "--method", "ptq161", "rtn")
    assert ended.returncode == 0, ended.stdout + ended.stderr
    figures = re.fullmatch(
        r"4 runs, (\d+) kills \(per run: .*\), 0 failures, \d+ leftovers, [\d.]+ minutes\n", ended.stdout
    )
    assert figures is not None, ended.stdout
    assert int(figures[1]) > 0  # how many depends on the machine's pace in the undisturbed runs


@pytest.fixture
def kills(monkeypatch: pytest.MonkeyPatch) -> ModuleType:
    monkeypatch.syspath_prepend(str(ROOT / "benchmarks"))
    import kills

    module: ModuleType = kills
    return module


@pytest.fixture
def place(tmp_path: Path) -> Path:
    """What a run leaves in its working directory: a record and a store."""
    with RunRecord.open(
        tmp_path / "run", config={"a": 1}, tracker=TrackerConfig("none"), seeds={"seed": 0}, job_name="test"
    ) as record:
        record.metric("loss", 0.5, block=0)
        record.metric("seconds", 0.25, block=0)
        record.sample("quantized", "a text")
        record.finish({"metrics": {"perplexity": 30.0}, "seconds": {"load": 1.0}})
    (tmp_path / "run" / "SHA256SUMS").unlink()  # the tests change files, and look at what else differs
    (tmp_path / "run" / "checkpoint").mkdir()
    (tmp_path / "run" / "checkpoint" / "packed.safetensors").write_bytes(b"weights")
    Store(tmp_path / "store").remember("scores", {"a": 1}, lambda: {"perplexity": 30.0})
    return tmp_path


def edit(file: Path, before: str, after: str) -> None:
    text = file.read_text()
    assert before in text
    file.write_text(text.replace(before, after, 1))


def test_times_may_differ(kills: ModuleType, place: Path) -> None:
    expected = kills._record(place / "run")
    edit(place / "run" / "metrics.jsonl", "0.25", "0.75")
    edit(place / "run" / "results.json", '"load": 1.0', '"load": 2.0')
    assert list(kills._problems(place, expected)) == []


@pytest.mark.parametrize(
    ("file", "before", "after", "problem"),
    [
        ("results.json", "30.0", "30.1", "results.metrics is"),
        ("metrics.jsonl", "0.5", "0.6", r"metrics \[0\] of 2"),
        ("metrics.jsonl", "loss", "lost", r"metrics \[0\] of 2"),
        ("samples.jsonl", "a text", "another", r"samples \[0\] of 1"),
        ("checkpoint/packed.safetensors", "weights", "weight!", r"checkpoint\.packed\.safetensors is"),
        ("manifest.json", '"finished"', '"running"', "no record is finished"),
    ],
)
def test_everything_else_is_a_problem(
    kills: ModuleType, place: Path, file: str, before: str, after: str, problem: str
) -> None:
    expected = kills._record(place / "run")
    edit(place / "run" / file, before, after)
    (found,) = kills._problems(place, expected)
    assert re.search(problem, found)


def test_a_second_record_with_other_results_is_a_problem(kills: ModuleType, place: Path) -> None:
    expected = kills._record(place / "run")
    shutil.copytree(place / "run", place / "outputs" / "second")
    edit(place / "outputs" / "second" / "results.json", "30.0", "29.0")
    (found,) = kills._problems(place, expected)
    assert found.startswith("outputs/second differs")


def test_an_entry_that_is_not_whole_is_a_problem(kills: ModuleType, place: Path) -> None:
    expected = kills._record(place / "run")
    (entry,) = stored_entries(place / "store")
    edit(entry.folder / "value.json", "30.0", "30.1")
    (found,) = kills._problems(place, expected)
    assert "is not whole: value.json has another SHA-256" in found
    (entry.folder / "value.json").unlink()
    (found,) = kills._problems(place, expected)
    assert "is not whole: value.json cannot be read" in found


def test_an_entry_with_another_fingerprint_is_a_problem(kills: ModuleType, place: Path) -> None:
    expected = kills._record(place / "run")
    (entry,) = stored_entries(place / "store")
    (entry.folder / "fingerprint.json").write_text(json.dumps({"a": 2}))
    (entry.folder / "SHA256SUMS").write_text(sums_of(entry.folder))
    (found,) = kills._problems(place, expected)
    assert "is not what its name says" in found
