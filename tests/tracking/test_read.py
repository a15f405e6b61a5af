"""Damaged and foreign run directories."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

from ptq161.errors import UserError
from ptq161.tracking.read import read_metrics, read_run
from ptq161.tracking.record import RunRecord
from ptq161.tracking.settings import TrackerConfig
from tests.tracking.conftest import OpenRecord


@pytest.fixture
def run_dir(tmp_path: Path, open_record: OpenRecord) -> Path:
    with open_record() as record:
        record.metric("loss", 0.5, block=0)
        record.metric("loss", 0.25, block=1)
        record.finish({"metrics": {}})
    return tmp_path / "run"


def test_truncated_and_foreign_lines_are_skipped_and_reported(run_dir: Path) -> None:
    path = run_dir / "metrics.jsonl"
    path.write_bytes(path.read_bytes() + b'[1]\n{"time": 1}\n\xff\n{"time": 1, "name": "lo')
    run = read_run(run_dir)
    assert [entry["value"] for entry in run.metrics] == [0.5, 0.25]
    assert [f"line {i}" in problem for i, problem in zip((3, 4, 5, 6), run.problems, strict=True)] == [True] * 4


@pytest.mark.parametrize("name", ["manifest.json", "results.json"])
def test_another_layout_version_is_named(run_dir: Path, name: str) -> None:
    path = run_dir / name
    path.write_text(json.dumps({**json.loads(path.read_text()), "schema_version": 99}))
    with pytest.raises(UserError, match=rf"{name} has schema_version 99; .* reads 1\."):
        read_run(run_dir)


def test_a_foreign_folder_is_named(tmp_path: Path) -> None:
    with pytest.raises(UserError, match="is not a run directory"):
        read_run(tmp_path)
    (tmp_path / "manifest.json").write_text("{")
    with pytest.raises(UserError, match="is not a run directory"):
        read_run(tmp_path)


def test_broken_results_and_config_are_reported(run_dir: Path) -> None:
    (run_dir / "results.json").write_text('{"metrics": ')
    (run_dir / "config.yaml").write_text("a: [")
    run = read_run(run_dir)
    assert (run.results, run.config) == (None, {})
    assert ["config.yaml" in run.problems[0], "results.json" in run.problems[1], len(run.problems)] == [True, True, 2]


def test_missing_parts_of_a_young_run_are_no_tracebacks(run_dir: Path) -> None:
    for name in ("config.yaml", "metrics.jsonl", "results.json"):
        (run_dir / name).unlink()
    run = read_run(run_dir)
    assert (run.results, run.metrics, run.config, len(run.problems)) == (None, [], {}, 1)


@pytest.mark.parametrize("name", ["config.yaml", "manifest.json", "metrics.jsonl", "results.json", "samples.jsonl"])
def test_a_record_that_was_changed_after_its_run_is_told(name: str, tmp_path: Path) -> None:
    with RunRecord.open(tmp_path, config={"seed": 0}, tracker=TrackerConfig("none"), seeds={}, job_name="a") as record:
        record.metric("loss", 0.125, block=0)
        record.sample("quantized", "125")
        record.describe(n_blocks=125)
        record.finish({"metrics": {"ppl/a": 125.0}})
    assert read_run(tmp_path).problems == []
    file = tmp_path / name
    content = file.read_text()
    file.write_text(content.replace("125", "126") if "125" in content else content.replace("0", "1"))
    (problem,) = read_run(tmp_path).problems
    told: list[str] = []  # where metrics are read on their own, as the report does
    read_metrics(tmp_path, told)
    short = read_run(tmp_path, with_lines=False).problems
    expected = {"metrics.jsonl": (told, short), "samples.jsonl": ([], [])}.get(name, (short, told))
    assert expected == (([problem], []) if name != "samples.jsonl" else ([], []))
    assert problem == (
        f"{tmp_path} was changed after its run ended ({name} has another SHA-256 than SHA256SUMS says); "
        "delete SHA256SUMS if the change is meant."
    )
