"""Run directories in a folder: each once, and none of the copies that the W&B mirror keeps below one."""

from __future__ import annotations

from pathlib import Path

import pytest

from ptq161.tracking.find import RUN_FOLDERS, Found, find, find_runs, hidden_in
from ptq161.tracking.settings import TrackerConfig
from tests.tracking.conftest import OpenRecord


def write_manifest(folder: Path) -> Path:
    folder.mkdir(parents=True)
    (folder / "manifest.json").write_text("{}")
    return folder


def test_runs_at_any_depth_in_the_order_of_their_paths(tmp_path: Path) -> None:
    runs = [write_manifest(tmp_path / name) for name in ("b/1", "a", "b/0/deep/run", "c/x")]
    (tmp_path / "d" / ".hydra").mkdir(parents=True)
    assert list(find_runs(tmp_path)) == sorted(runs)
    assert list(find_runs(tmp_path / "b")) == [tmp_path / "b/0/deep/run", tmp_path / "b/1"]


@pytest.mark.parametrize("copy", ["wandb/offline-run-1/files", "replay/2026-01-01_12-00-00", "checkpoint", ".hydra/a"])
def test_no_copy_of_a_record_is_a_run(tmp_path: Path, copy: str) -> None:
    run = write_manifest(tmp_path / "sweep" / "0")
    write_manifest(run / copy)
    assert list(find_runs(tmp_path)) == [run]
    assert list(find_runs(run)) == [run]
    assert find_runs(run / copy) == [run / copy]  # where one asks for it


def test_a_sweep_inside_a_run_directory_is_found(tmp_path: Path) -> None:
    runs = [write_manifest(tmp_path / name) for name in ("run", "run/2", "run/10", "run/axis/0")]
    assert find_runs(tmp_path) == runs


def test_the_stores_copies_are_no_runs(tmp_path: Path) -> None:
    (write_manifest(tmp_path / "store" / "results" / ("0" * 64)) / "fingerprint.json").write_text("{}")
    (tmp_path / "resumed").mkdir()
    (tmp_path / "resumed" / "fingerprint.json").write_text("{}")
    run = write_manifest(tmp_path / "resumed" / "run")
    assert find_runs(tmp_path) == [run]


def test_what_is_no_run_yet(tmp_path: Path) -> None:
    run = write_manifest(tmp_path / "sweep" / "0")
    (run / ".hydra").mkdir()
    (tmp_path / "sweep" / "1" / ".hydra").mkdir(parents=True)
    (tmp_path / "sweep" / "multirun.yaml").write_text("")
    (tmp_path / "sweep" / "link").symlink_to(run)
    assert find(tmp_path) == Found([run], [tmp_path / "sweep" / "1"], [tmp_path / "sweep"], [])


def test_what_a_record_hides(tmp_path: Path) -> None:
    run = write_manifest(tmp_path / "run")
    for name in RUN_FOLDERS:
        assert hidden_in(run / name / "a" / "b") == hidden_in(run / name) == run
        assert hidden_in(tmp_path / name / "run") is None
    assert hidden_in(run) is hidden_in(run / "0") is None


def test_the_copies_of_the_mirror_itself(
    tmp_path: Path, open_record: OpenRecord, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("WANDB_MODE", "offline")
    with open_record(tracker=TrackerConfig("wandb")) as record:
        record.finish({"metrics": {}, "full_precision": {}})
    assert len(list(record.run_dir.rglob("manifest.json"))) > 1
    assert list(find_runs(tmp_path)) == [record.run_dir]


def test_a_folder_without_runs(tmp_path: Path) -> None:
    assert list(find_runs(tmp_path)) == []
    assert list(find_runs(tmp_path / "none")) == []
