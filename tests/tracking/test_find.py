"""Run directories in a folder: each once, and none of the copies that the W&B mirror keeps below one."""

from __future__ import annotations

from pathlib import Path

import pytest

from ptq161.tracking.find import find_runs
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


@pytest.mark.parametrize("copy", ["wandb/offline-run-1/files", "replay/2026-01-01_12-00-00"])
def test_nothing_below_a_run_is_another_one(tmp_path: Path, copy: str) -> None:
    run = write_manifest(tmp_path / "sweep" / "0")
    write_manifest(run / copy)
    assert list(find_runs(tmp_path)) == [run]
    assert list(find_runs(run)) == [run]


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
