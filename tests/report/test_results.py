"""What is one result, in what results differ, and which of them are on the front."""

from __future__ import annotations

import json
from pathlib import Path

import pandas as pd
import pytest

from ptq161.report.collect import collect
from ptq161.report.keys import differing_keys, swept_numbers
from ptq161.report.results import FULL, QUANTIZED, RESTORED, Results, metric_names, pareto_front, results_of
from ptq161.tracking.metric_names import better, is_perplexity
from tests.report import conftest
from tests.report.conftest import WriteRun

PPL = "ppl/boolq@512"


def results(*folders: Path) -> Results:
    return results_of(collect(folders).runs)


def scores(results: Results, metric: str = PPL, kind: str = QUANTIZED) -> list[float]:
    return list(results.score(metric).value[results.rows.kind == kind])


def test_seeds_are_one_result(write_run: WriteRun) -> None:
    folders = [write_run(f"{r} {s}", mask_ratio=r, seed=s, ppl=100 * r + s) for s in (0, 1, 2) for r in (0.1, 0.3)]
    found = results(*folders).quantized
    first, second = found.rows.itertuples()
    assert (first.seeds, list(found.config["mask_ratio"]), scores(found)[0]) == ("0 1 2", [0.1, 0.3], 11.0)
    assert (second.bits, second.nominal_bits, second.seconds) == (1.7, 1.6, 21.5)
    assert [run.seed for run in second.runs] == [0, 1, 2]
    assert found.seconds.iloc[1].to_dict() == {"load": 1.0, "quantize": 20.5}
    assert differing_keys(found.config) == ["mask_ratio"]


def test_a_score_reaches_to_its_interval_or_its_standard_error(write_run: WriteRun) -> None:
    folders = [write_run(f"s{seed}", seed=seed, ppl=ppl) for seed, ppl in enumerate((90.0, 100.0, 110.0))]
    seeds, alone = results(*folders, write_run("rtn", "rtn", 565.0)).of(PPL).iloc[1:].itertuples()
    assert (seeds.value, seeds.low, seeds.high, seeds.down, seeds.up) == (100.0, 90.0, 110.0, 10.0, 10.0)
    assert (alone.value, alone.standard_error, alone.down, alone.up) == (565.0, 2.5, 2.5, 2.5)


@pytest.mark.parametrize("value", [float("inf"), float("nan"), 0.0])
def test_what_has_no_place_on_an_axis_is_not_drawn(write_run: WriteRun, value: float) -> None:
    found = results(write_run("a", ppl=value)).quantized
    assert len(found.rows) == 1 and found.of(PPL).empty
    assert len(found.of("zero_shot/piqa/acc")) == 1


def test_a_repetition_counts_once_and_is_reported(write_run: WriteRun) -> None:
    runs = collect([write_run("a", ppl=10.0), write_run("b", ppl=20.0), write_run("c", seed=1, ppl=30.0)]).runs
    problems: list[str] = []
    assert scores(results_of(runs, problems)) == [20.0]
    (problem,) = problems
    assert f"{runs[1].run_dir} repeats {runs[0].run_dir}" in problem


def test_a_run_that_took_over_earlier_numbers_is_no_repetition_to_report(write_run: WriteRun) -> None:
    first, second = write_run("a"), write_run("b")
    manifest = json.loads((second / "manifest.json").read_text())
    (second / "manifest.json").write_text(json.dumps({**manifest, "reused_from": {"run_dir": str(first)}}))
    problems: list[str] = []
    (row,) = results_of(collect([first, second]).runs, problems).quantized.rows.itertuples()
    assert (len(row.runs), problems) == (1, [])


def test_results_of_one_method_differ_in_what_was_swept(write_run: WriteRun) -> None:
    found = results(write_run("a", mask_ratio=0.1), write_run("b", mask_ratio=0.3, seed=1)).quantized
    assert differing_keys(found.config) == swept_numbers(found.config) == ["mask_ratio"]
    assert list(found.rows.label) == ["ptq161 mask_ratio=0.1", "ptq161 mask_ratio=0.3"]


def test_settings_of_different_methods_are_no_difference(write_run: WriteRun) -> None:
    folders = [
        write_run("rtn", "rtn", settings={"bits": 2}),
        write_run("billm", "billm", settings={"saliency": "hessian"}),
        write_run("ptq161"),
    ]
    assert differing_keys(results(*folders).quantized.config) == []
    folders.append(write_run("rtn3", "rtn", settings={"bits": 3}))
    found = results(*folders).quantized
    assert differing_keys(found.config) == ["method.bits"]
    assert list(found.rows.label) == ["rtn bits=2", "billm", "ptq161", "rtn bits=3"]


def test_a_key_that_older_runs_lack_and_one_without_effect_are_no_difference(write_run: WriteRun) -> None:
    calib = {"name": "squad", "n_samples": 8, "seq_len": 512}
    old = write_run("old", calib=calib)
    new = write_run("new", calib=calib | {"masking": "none", "mask_token": None, "masking_prefix": 0.25})
    masked = write_run("masked", calib=calib | {"masking": "linear", "mask_token": 7, "masking_prefix": 0.25})
    again = write_run("again", calib=calib, force=True, cache=False, on_error="stop")
    assert differing_keys(results(old, new, again).quantized.config) == []
    assert "calib.masking" in differing_keys(results(old, masked).quantized.config)


def test_a_swept_group_is_named_by_its_option(write_run: WriteRun) -> None:
    found = results(write_run("squad"), write_run("c4", calib={"name": "c4", "n_samples": 128})).quantized
    assert differing_keys(found.config) == ["calib"]
    assert swept_numbers(found.config) == []


def test_lists_are_told_apart_and_are_no_numbers(write_run: WriteRun) -> None:
    found = results(*(write_run(str(n), eval={"name": "quick", "corpora": ["boolq"] * n}) for n in (1, 2))).quantized
    assert differing_keys(found.config) == ["eval.corpora"]
    assert swept_numbers(found.config) == []
    assert list(found.rows.label) == ["ptq161 corpora=['boolq']", "ptq161 corpora=['boolq', 'boolq']"]


def test_results_that_nothing_tells_apart_are_numbered(write_run: WriteRun) -> None:
    first, second = write_run("a"), write_run("b")
    manifest = json.loads((second / "manifest.json").read_text())
    (second / "manifest.json").write_text(json.dumps({**manifest, "sources_sha256": "other"}))
    assert list(results(first, second).quantized.rows.label) == ["ptq161", "ptq161 (2)"]


def test_full_precision_once_for_all_runs_that_agree(write_run: WriteRun) -> None:
    folders = [write_run("a", mask_ratio=0.1), write_run("b")]
    found = results(*folders)
    full = found.select(found.rows.kind == FULL)
    (row,) = full.rows.itertuples()
    assert (row.run_dir, row.method, row.label) == ("", "none", "full precision")
    assert {name: full.score(name).value.item() for name in conftest.FULL} == conftest.FULL
    assert full.config["mask_ratio"].isna().all()
    own = write_run("none", "none")
    found = results(*folders, own)
    (row,) = found.rows[found.rows.kind == FULL].itertuples()
    assert (row.run_dir, found.score(PPL).standard_error.iloc[0]) == (str(own), 2.5)
    assert list(found.rows.kind) == [FULL, QUANTIZED, QUANTIZED]


def test_full_precision_twice_where_runs_disagree(write_run: WriteRun) -> None:
    other = {"metrics": {PPL: 99.0}, "full_precision": {**conftest.FULL, PPL: 18.1}, "protocol": {}}
    found = results(write_run("a"), write_run("b", "rtn", results=other))
    assert scores(found, kind=FULL) == [18.0, 18.1]


def test_preprocessed_models_once_each(write_run: WriteRun) -> None:
    def document(ppl: float, merged: float) -> dict[str, object]:
        return {"metrics": {PPL: ppl}, "full_precision": conftest.FULL, "merged": {PPL: merged}, "protocol": {}}

    first, fresh = ({"preprocess": {"name": "restorative_lora", "mask": mask}} for mask in ("first", "fresh"))
    found = results(
        write_run("a", results=document(90.0, 20.0), **first),
        write_run("b", results=document(80.0, 20.0), **fresh),
        write_run("c", "rtn", results=document(70.0, 22.0), **fresh),
    )
    assert list(zip(found.rows.kind, found.rows.method, found.score(PPL).value, strict=True)) == [
        (FULL, "none", 18.0),
        (RESTORED, "ptq161+preprocessing, not quantized", 20.0),
        (RESTORED, "rtn+preprocessing, not quantized", 22.0),
        (QUANTIZED, "ptq161+preprocessing", 90.0),
        (QUANTIZED, "ptq161+preprocessing", 80.0),
        (QUANTIZED, "rtn+preprocessing", 70.0),
    ]


def test_models_before_their_finetuning_once_each(write_run: WriteRun) -> None:
    def document(ppl: float, before: float) -> dict[str, object]:
        return {"metrics": {PPL: ppl}, "before_finetune": {PPL: before}, "protocol": {}}

    short, long = ({"finetune": {"name": "scales", "steps": steps}} for steps in (30, 60))
    found = results(
        write_run("a", results=document(90.0, 120.0), **short),
        write_run("b", results=document(80.0, 120.0), **long),
        write_run("c", "rtn", results=document(70.0, 150.0), **long),
        write_run("d", "rtn", results={"metrics": {PPL: 150.0}, "protocol": {}}),
    )
    assert list(zip(found.rows.method, found.score(PPL).value, strict=True)) == [
        ("ptq161+finetuning", 90.0),
        ("ptq161+finetuning", 80.0),
        ("rtn+finetuning", 70.0),
        ("rtn", 150.0),
        ("ptq161", 120.0),
    ]
    assert set(found.rows.kind) == {QUANTIZED}


def test_the_front_is_what_nothing_beats_in_both(write_run: WriteRun) -> None:
    points = {"rtn": (500.0, 2.0), "gptq": (400.0, 2.0), "billm": (300.0, 2.9), "pb_llm": (350.0, 2.95)}
    folders = [write_run(name, name, *point) for name, point in points.items()]
    found = results(*folders, write_run("inf", "awq", float("inf"), 0.5)).quantized

    def front(metric: str) -> list[str]:
        return list(pareto_front(found.of(metric), metric).method)

    assert (front(PPL), front("zero_shot/piqa/acc")) == (["gptq", "billm"], ["awq"])
    assert pareto_front(pd.DataFrame({"bits": [None], "value": [1.0]}, dtype=float), PPL).empty


def test_scores_are_named_perplexities_first(write_run: WriteRun) -> None:
    assert metric_names(results(write_run("a"))) == [PPL, "zero_shot/piqa/acc", "zero_shot/piqa/acc_norm"]
    assert is_perplexity(PPL) and is_perplexity("zero_shot/lambada/perplexity")
    assert not is_perplexity("zero_shot/lambada/acc")
    assert [better(name) for name in (PPL, "zero_shot/lambada/acc", "linear_bytes")] == [-1, 1, -1]
