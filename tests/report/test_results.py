"""What is one result, in what results differ, and which of them are on the front."""

from __future__ import annotations

import json
from pathlib import Path

from ptq161.report.collect import collect
from ptq161.report.results import (
    Result,
    baselines,
    differing_keys,
    labels,
    metric_names,
    pareto_front,
    quantized,
    results_of,
    swept_numbers,
)
from ptq161.tracking.metric_names import is_perplexity
from tests.report.conftest import FULL, WriteRun

PPL = "ppl/boolq@512"


def results(*folders: Path) -> list[Result]:
    return results_of(collect(folders).runs)


def test_seeds_are_one_result(write_run: WriteRun) -> None:
    folders = [write_run(f"{r} {s}", mask_ratio=r, seed=s, ppl=100 * r + s) for s in (0, 1, 2) for r in (0.1, 0.3)]
    first, second = results(*folders)
    assert (first.seeds, first.value("mask_ratio"), first.metrics[PPL]) == ([0, 1, 2], 0.1, 11.0)
    assert (second.bits, second.nominal_bits, second.total_seconds) == (1.7, 1.6, 21.5)
    assert differing_keys([first, second]) == ["mask_ratio"]


def test_a_repetition_counts_once_and_is_told(write_run: WriteRun) -> None:
    runs = collect([write_run("a", ppl=10.0), write_run("b", ppl=20.0), write_run("c", seed=1, ppl=30.0)]).runs
    problems: list[str] = []
    (result,) = results_of(runs, problems)
    assert result.metrics[PPL] == 20.0
    (problem,) = problems
    assert f"{runs[1].run_dir} repeats {runs[0].run_dir}" in problem


def test_a_run_that_took_over_earlier_numbers_is_no_repetition_to_tell(write_run: WriteRun) -> None:
    first, second = write_run("a"), write_run("b")
    manifest = json.loads((second / "manifest.json").read_text())
    (second / "manifest.json").write_text(json.dumps({**manifest, "reused_from": {"run_dir": str(first)}}))
    problems: list[str] = []
    (result,) = results_of(collect([first, second]).runs, problems)
    assert (len(result.runs), problems) == (1, [])


def test_results_of_one_method_differ_in_what_was_swept(write_run: WriteRun) -> None:
    found = results(write_run("a", mask_ratio=0.1), write_run("b", mask_ratio=0.3, seed=1))
    assert differing_keys(found) == swept_numbers(found) == ["mask_ratio"]
    assert labels(found) == ["ptq161 mask_ratio=0.1", "ptq161 mask_ratio=0.3"]


def test_settings_of_different_methods_are_no_difference(write_run: WriteRun) -> None:
    folders = [
        write_run("rtn", "rtn", settings={"bits": 2}),
        write_run("billm", "billm", settings={"saliency": "hessian"}),
        write_run("ptq161"),
    ]
    assert differing_keys(results(*folders)) == []
    folders.append(write_run("rtn3", "rtn", settings={"bits": 3}))
    found = results(*folders)
    assert differing_keys(found) == ["method.bits"]
    assert labels(found) == ["rtn bits=2", "billm", "ptq161", "rtn bits=3"]


def test_a_swept_group_is_named_by_its_option(write_run: WriteRun) -> None:
    found = results(write_run("squad"), write_run("c4", calib={"name": "c4", "n_samples": 128}))
    assert differing_keys(found) == ["calib"]
    assert swept_numbers(found) == []


def test_full_precision_once_for_all_runs_that_agree(write_run: WriteRun) -> None:
    folders = [write_run("a", mask_ratio=0.1), write_run("b")]
    (full,) = baselines(results(*folders))
    assert (full.runs[0].run_dir, full.method, full.metrics, full.value("mask_ratio")) == (None, "none", FULL, None)
    own = write_run("none", "none")
    found = results(*folders, own)
    (full,) = baselines(found)
    assert (full.runs[0].run_dir, full.estimates[PPL].standard_error) == (own, 2.5)
    assert len(quantized(found)) == 2


def test_full_precision_twice_where_runs_disagree(write_run: WriteRun) -> None:
    other = {"metrics": {PPL: 99.0}, "full_precision": {**FULL, PPL: 18.1}, "protocol": {}}
    found = results(write_run("a"), write_run("b", "rtn", results=other))
    assert [result.metrics[PPL] for result in baselines(found)] == [18.0, 18.1]


def test_preprocessed_models_once_each(write_run: WriteRun) -> None:
    def document(ppl: float, merged: float) -> dict[str, object]:
        return {"metrics": {PPL: ppl}, "full_precision": FULL, "merged": {PPL: merged}, "protocol": {}}

    first, fresh = ({"preprocess": {"name": "restorative_lora", "mask": mask}} for mask in ("first", "fresh"))
    found = results(
        write_run("a", results=document(90.0, 20.0), **first),
        write_run("b", results=document(80.0, 20.0), **fresh),
        write_run("c", "rtn", results=document(70.0, 22.0), **fresh),
    )
    assert [(r.method, r.metrics[PPL]) for r in baselines(found)] == [
        ("none", 18.0),
        ("ptq161+preprocessing, not quantized", 20.0),
        ("rtn+preprocessing, not quantized", 22.0),
    ]
    assert [result.metrics[PPL] for result in quantized(found)] == [90.0, 80.0, 70.0]


def test_the_front_is_what_nothing_beats_in_both(write_run: WriteRun) -> None:
    points = {"rtn": (500.0, 2.0), "gptq": (400.0, 2.0), "billm": (300.0, 2.9), "pb_llm": (350.0, 2.95)}
    found = results(*(write_run(name, name, *point) for name, point in points.items()))
    found += results(write_run("inf", "awq", float("inf"), 0.5))
    assert [result.method for result in pareto_front(found, PPL)] == ["gptq", "billm"]
    assert [result.method for result in pareto_front(found, "zero_shot/piqa/acc")] == ["awq"]


def test_scores_are_named_perplexities_first(write_run: WriteRun) -> None:
    assert metric_names(results(write_run("a"))) == [PPL, "zero_shot/piqa/acc", "zero_shot/piqa/acc_norm"]
    assert is_perplexity(PPL) and is_perplexity("zero_shot/lambada/perplexity")
    assert not is_perplexity("zero_shot/lambada/acc")
