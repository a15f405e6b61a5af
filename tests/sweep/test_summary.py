"""The line at the end of a sweep: each run counted once, by its outcome."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest

from ptq161.files.strict_json import encode_json
from ptq161.sweep.failures import Failure, record_failure
from ptq161.sweep.summary import print_summary

BEGAN = "2026-01-02T00:00:00.000+00:00"


def write_manifest(sweep: Path, name: str, state: str, job: int = 0, /, **manifest: Any) -> None:
    folder = sweep / name
    folder.mkdir(parents=True)
    start = "2026-01-02T00:00:01.000+00:00"
    document = {"sweep": {"dir": str(sweep), "job": job}, "start": start, "exit_state": state, **manifest}
    (folder / "manifest.json").write_text(encode_json(document))


def summary(sweep: Path, capsys: pytest.CaptureFixture[str]) -> str:
    print_summary(sweep, BEGAN)
    return capsys.readouterr().out.partition(". Records: ")[0]


def test_each_run_counts_once_by_its_outcome(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    write_manifest(tmp_path, "0", "finished", 0)
    write_manifest(tmp_path, "1", "finished", 1, reused_from={"run_dir": "elsewhere"})
    write_manifest(tmp_path, "2", "failed", 2)
    write_manifest(tmp_path, "3", "running", 3)  # killed
    write_manifest(tmp_path, "axis/4", "interrupted", 4)
    assert summary(tmp_path, capsys) == "Sweep of 5 runs: 1 computed, 1 reused, 1 failed, 2 interrupted"


def test_runs_of_others_do_not_count(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    write_manifest(tmp_path, "0", "finished", 0)
    write_manifest(tmp_path, "earlier", "failed", 1, start="2026-01-01T23:59:59.000+00:00")
    write_manifest(tmp_path, "single", "finished", sweep=None)
    write_manifest(tmp_path, "inner/0", "finished", sweep={"dir": str(tmp_path / "inner"), "job": 0})
    for name, content in {"0.1.0": '{"exit_state": "finished"}', "damaged": "{", "website": '{"name": "app"}'}.items():
        (tmp_path / name).mkdir(exist_ok=True)
        (tmp_path / name / "manifest.json").write_text(content)
    assert summary(tmp_path, capsys) == "Sweep of 1 runs: 1 computed, 0 reused, 0 failed"


@pytest.mark.parametrize("copy", ["wandb/offline-run-1/files", "replay/1"])
def test_copies_do_not_count(tmp_path: Path, capsys: pytest.CaptureFixture[str], copy: str) -> None:
    write_manifest(tmp_path, "0", "finished")
    write_manifest(tmp_path, f"0/{copy}", "finished")
    assert summary(tmp_path, capsys) == "Sweep of 1 runs: 1 computed, 0 reused, 0 failed"


def test_a_job_that_failed_before_its_record_began_counts(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    write_manifest(tmp_path, "0", "failed", 0)
    for job in (0, 1):
        record_failure(str(tmp_path), Failure(job, [], "no.", str(tmp_path / str(job))))
    assert summary(tmp_path, capsys) == "Sweep of 2 runs: 0 computed, 0 reused, 2 failed"
