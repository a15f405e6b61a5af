"""Which runs are found, and in what they differ."""

from __future__ import annotations

import json
import re
from pathlib import Path

import pytest

from ptq161.report.collect import (
    collect,
    differing_keys,
    full_precision_runs,
    is_perplexity,
    metric_names,
    quantized_runs,
)
from tests.report.conftest import FULL, WriteRun


def test_a_sweep_is_read_in_the_order_of_its_jobs_and_each_run_once(tmp_path: Path, write_run: WriteRun) -> None:
    for number in (10, 2, 0):
        write_run(f"sweep/{number}", mask_ratio=number / 100)
    found = collect([tmp_path / "sweep" / "2", tmp_path / "sweep", tmp_path])
    assert found.problems == []
    assert [run.run_dir.name for run in found.runs if run.run_dir] == ["2", "0", "10"]


def test_what_a_run_says(write_run: WriteRun) -> None:
    (run,) = collect([write_run("run", ppl=123.5, bits=1.72)]).runs
    assert (run.method, run.model, run.value("mask_ratio"), run.value("calib")) == ("ptq161", "tiny", 0.2, "squad")
    assert (run.bits, run.nominal_bits, run.metrics["ppl/boolq@512"]) == (1.72, 1.6, 123.5)
    assert run.standard_errors == {"ppl/boolq@512": 2.5}
    assert (run.total_seconds, run.commit) == (21.5, "01234567")
    assert metric_names([run]) == ["ppl/boolq@512", "zero_shot/piqa/acc", "zero_shot/piqa/acc_norm"]


def test_preprocessing_is_part_of_the_method(write_run: WriteRun) -> None:
    (run,) = collect([write_run("run", preprocess={"name": "restorative_lora"})]).runs
    assert run.method == "ptq161+preprocessing"


def test_a_stored_checkpoint_has_no_method_of_its_own(write_run: WriteRun) -> None:
    run_dir = write_run("run")
    (run_dir / "config.yaml").write_text("model: {name: tiny}\n")
    (run,) = collect([run_dir]).runs
    assert (run.method, run.value("mask_ratio")) == ("stored checkpoint", None)


def test_runs_of_one_method_differ_in_what_was_swept(write_run: WriteRun) -> None:
    runs = collect([write_run("a", mask_ratio=0.1), write_run("b", mask_ratio=0.3, seed=1)]).runs
    assert differing_keys(runs) == ["mask_ratio", "seed"]


def test_settings_of_different_methods_are_no_difference(write_run: WriteRun) -> None:
    folders = [
        write_run("rtn", "rtn", settings={"bits": 2}),
        write_run("billm", "billm", settings={"saliency": "hessian"}),
        write_run("ptq161"),
    ]
    assert differing_keys(collect(folders).runs) == []
    folders.append(write_run("rtn3", "rtn", settings={"bits": 3}))
    assert differing_keys(collect(folders).runs) == ["method.bits"]


def test_a_swept_group_is_named_by_its_option(write_run: WriteRun) -> None:
    folders = [
        write_run("squad"),
        write_run("c4", calib={"name": "c4", "n_samples": 128}),
    ]
    assert differing_keys(collect(folders).runs) == ["calib"]


def test_full_precision_once_for_all_runs_that_agree(write_run: WriteRun) -> None:
    runs = collect([write_run("a", mask_ratio=0.1), write_run("b")]).runs
    (full,) = full_precision_runs(runs)
    assert (full.run_dir, full.method, full.metrics, full.value("mask_ratio")) == (None, "none", FULL, None)
    own = write_run("none", "none")
    runs = collect([*(run.run_dir for run in runs if run.run_dir), own]).runs
    (full,) = full_precision_runs(runs)
    assert (full.run_dir, full.standard_errors) == (own, {"ppl/boolq@512": 2.5})
    assert len(quantized_runs(runs)) == 2


def test_full_precision_twice_where_runs_disagree(write_run: WriteRun) -> None:
    other = {"metrics": {"ppl/boolq@512": 99.0}, "full_precision": {**FULL, "ppl/boolq@512": 18.1}, "protocol": {}}
    runs = collect([write_run("a"), write_run("b", results=other)]).runs
    assert [run.metrics["ppl/boolq@512"] for run in full_precision_runs(runs)] == [18.0, 18.1]


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
    ("file", "content", "told"),
    [
        ("manifest.json", "{", "no run directory"),
        ("manifest.json", '{"schema_version": 99}', "schema_version 99"),
        ("manifest.json", '{"schema_version": 1, "nonfinite": 3}', "malformed"),
        ("results.json", '{"schema_version": 1}', "malformed"),
        ("results.json", '{"schema_version": 1, "metrics": [1]}', "malformed"),
        ("results.json", '{"schema_version": 1, "metrics": {}, "protocol": {"ppl": 3}}', "malformed"),
        ("results.json", '{"metr', "cannot be read"),
        ("config.yaml", "a: [", "cannot be read"),
        ("config.yaml", "method: {name: rtn}", "does not name the model"),
    ],
)
def test_damaged_records_are_reported_and_the_others_kept(
    tmp_path: Path, write_run: WriteRun, file: str, content: str, told: str
) -> None:
    write_run("sweep/0")
    (write_run("sweep/1") / file).write_text(content)
    found = collect([tmp_path / "sweep"])
    assert [run.run_dir for run in found.runs] == [tmp_path / "sweep" / "0"]
    assert any(re.search(told, problem) for problem in found.problems), found.problems


def test_scores_that_are_no_numbers_are_left_out(write_run: WriteRun) -> None:
    run_dir = write_run("run")
    document = json.loads((run_dir / "results.json").read_text())
    document["metrics"]["ppl/boolq@512"] = "much"
    (run_dir / "results.json").write_text(json.dumps(document))
    found = collect([run_dir])
    assert "ppl/boolq@512" not in found.runs[0].metrics
    assert "ppl/boolq@512" in found.problems[0] and "'much' is no number" in found.problems[0]


def test_a_folder_without_runs_is_named(tmp_path: Path) -> None:
    found = collect([tmp_path, tmp_path / "missing"])
    assert found.runs == []
    assert f"{tmp_path} holds no run." in found.problems
    assert any("missing cannot be read" in problem for problem in found.problems)


def test_perplexities_are_told_from_accuracies() -> None:
    assert is_perplexity("ppl/boolq@512") and is_perplexity("zero_shot/lambada/perplexity")
    assert not is_perplexity("zero_shot/lambada/acc")
