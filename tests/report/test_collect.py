"""Which runs are found, and what they say."""

from __future__ import annotations

import json
import re
from pathlib import Path

import pytest

from ptq161.report.collect import collect
from tests.report.conftest import WriteRun


def test_a_sweep_is_read_in_the_order_of_its_jobs_and_each_run_once(tmp_path: Path, write_run: WriteRun) -> None:
    for number in (10, 2, 0):
        write_run(f"sweep/{number}", mask_ratio=number / 100)
    found = collect([tmp_path / "sweep" / "2", tmp_path / "sweep", tmp_path])
    assert found.problems == []
    assert [run.run_dir.name for run in found.runs if run.run_dir] == ["2", "0", "10"]


def test_what_a_run_says(write_run: WriteRun) -> None:
    (run,) = collect([write_run("run", ppl=123.5, bits=1.72)]).runs
    assert (run.method, run.model, run.value("mask_ratio"), run.value("calib")) == ("ptq161", "tiny", 0.2, "squad")
    assert (run.metrics["bits_per_weight"], run.metrics["ppl/boolq@512"]) == (1.72, 123.5)
    assert run.standard_errors == {"ppl/boolq@512": 2.5}
    assert (run.total_seconds, run.peak_memory_bytes, run.commit, run.seed) == (21.5, 2.5e9, "01234567", 0)


def test_preprocessing_is_part_of_the_method(write_run: WriteRun) -> None:
    (run,) = collect([write_run("run", preprocess={"name": "restorative_lora"})]).runs
    assert run.method == "ptq161+preprocessing"


def test_finetuning_is_part_of_the_method_and_what_was_before_it_a_run(write_run: WriteRun) -> None:
    results = {"metrics": {"ppl/boolq@512": 80.0}, "before_finetune": {"ppl/boolq@512": 120.0}, "protocol": {}}
    finetune = {"name": "codes", "text": "corpora", "corpora": ["coqa"]}
    (run,) = collect([write_run("run", preprocess={"name": "lora"}, finetune=finetune, results=results)]).runs
    assert (run.method, run.calibration_text) == ("ptq161+preprocessing+finetuning", "coqa, squad")
    before = run.before_finetune
    assert before is not None and before.run_dir is None and before.identity != run.identity
    assert (before.method, before.calibration_text) == ("ptq161+preprocessing", "squad")
    assert (before.metrics, before.value("finetune")) == ({"ppl/boolq@512": 120.0}, "none")


def test_a_stored_checkpoint_has_no_method_of_its_own(write_run: WriteRun) -> None:
    run_dir = write_run("run")
    (run_dir / "config.yaml").write_text("model: {name: tiny}\n")
    (run,) = collect([run_dir]).runs
    assert (run.method, run.value("mask_ratio")) == ("stored checkpoint", None)


def test_unfinished_runs_are_reported_and_skipped(tmp_path: Path, write_run: WriteRun) -> None:
    write_run("sweep/0")
    write_run("sweep/1", finish=False)
    (tmp_path / "sweep/2/.hydra").mkdir(parents=True)
    found = collect([tmp_path / "sweep"])
    assert len(found.runs) == 1
    without_results, without_record = sorted(found.problems)
    assert "sweep/1 is skipped: it has no results (state: failed, the run ended without results)" in without_results
    assert "sweep/2 is skipped: its job ended before it began a record" in without_record


@pytest.mark.parametrize(
    ("file", "content", "pattern"),
    [
        ("manifest.json", "{", "is not a run directory"),
        ("manifest.json", '{"schema_version": 99}', "schema_version 99"),
        ("manifest.json", '{"schema_version": 0}', "schema_version 0; this version of ptq161 reads"),
        ("manifest.json", '{"schema_version": 1, "nonfinite": 3}', "cannot be read"),
        ("results.json", '{"schema_version": 1}', "malformed"),
        ("results.json", '{"schema_version": 1, "metrics": [1]}', "malformed"),
        ("results.json", '{"schema_version": 1, "metrics": {}, "protocol": {"ppl": 3}}', "malformed"),
        ("results.json", '{"metr', "cannot be read"),
        ("config.yaml", "a: [", "cannot be read"),
        ("config.yaml", "method: {name: rtn}", "does not name the model"),
    ],
)
def test_damaged_records_are_reported_and_the_others_kept(
    tmp_path: Path, write_run: WriteRun, file: str, content: str, pattern: str
) -> None:
    write_run("sweep/0")
    (write_run("sweep/1") / file).write_text(content)
    found = collect([tmp_path / "sweep"])
    assert [run.run_dir for run in found.runs] == [tmp_path / "sweep" / "0"]
    assert any(re.search(pattern, problem) for problem in found.problems), found.problems


def test_scores_that_are_no_numbers_are_left_out(write_run: WriteRun) -> None:
    run_dir = write_run("run")
    document = json.loads((run_dir / "results.json").read_text())
    document["metrics"]["ppl/boolq@512"] = "much"
    (run_dir / "results.json").write_text(json.dumps(document))
    found = collect([run_dir])
    assert "ppl/boolq@512" not in found.runs[0].metrics
    assert any("ppl/boolq@512" in problem and "'much' is no number" in problem for problem in found.problems)


def test_a_folder_without_runs_is_named(tmp_path: Path) -> None:
    found = collect([tmp_path, tmp_path / "missing"])
    assert found.runs == []
    assert f"{tmp_path} holds no run." in found.problems
    assert any("missing cannot be read" in problem for problem in found.problems)
