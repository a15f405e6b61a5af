"""The line at the end of a sweep: each run counted once, by its outcome."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest

from ptq161.files.strict_json import encode_json
from ptq161.sweep.summary import print_summary

BEGAN = "2026-01-02T00:00:00.000+00:00"


def write_manifest(folder: Path, state: str, **manifest: Any) -> None:
    folder.mkdir(parents=True)
    document = {"start": "2026-01-02T00:00:01.000+00:00", "exit_state": state, **manifest}
    (folder / "manifest.json").write_text(encode_json(document))


def test_each_run_counts_once_by_its_outcome(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    write_manifest(tmp_path / "0", "finished")
    write_manifest(tmp_path / "1", "finished", reused_from={"run_dir": "elsewhere"})
    write_manifest(tmp_path / "2", "failed")
    write_manifest(tmp_path / "3", "running")  # killed
    write_manifest(tmp_path / "axis" / "4", "interrupted")
    write_manifest(tmp_path / "earlier", "failed", start="2026-01-01T23:59:59.000+00:00")
    (tmp_path / "damaged").mkdir()
    (tmp_path / "damaged" / "manifest.json").write_text("{")
    print_summary(tmp_path, BEGAN)
    printed = capsys.readouterr().out
    assert printed.startswith("Sweep of 6 runs: 1 computed, 1 reused, 1 failed, 3 interrupted. Records: ")


def test_copies_of_the_mirror_do_not_count(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    write_manifest(tmp_path / "0", "finished")
    write_manifest(tmp_path / "0" / "wandb" / "offline-run-1" / "files", "finished")
    print_summary(tmp_path, BEGAN)
    assert capsys.readouterr().out.startswith("Sweep of 1 runs: 1 computed, 0 reused, 0 failed. Records: ")
