"""Comparing two records, and which runs can be replayed."""

from __future__ import annotations

import json
import math
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from ptq161.errors import UserError
from ptq161.files.strict_json import decode_json, encode_json
from ptq161.replay.__main__ import _print_comparison, _read_finished, _replayed_config, main
from ptq161.replay.compare import Place, _relative_difference, _values, compare
from ptq161.tracking.read import RunData, read_run
from ptq161.tracking.record import RunRecord
from ptq161.tracking.settings import TrackerConfig

RESULTS = {
    "metrics": {"ppl/boolq@512": 30.5, "bits_per_weight": 1.72},
    "full_precision": {"ppl/boolq@512": 20.5},
    "protocol": {"ppl/boolq@512": {"standard_error": 0.5, "split": "validation", "n_tokens": 512}},
    "seconds": {"quantize": 12.0},
    "peak_memory_bytes": 10**9,
}
LINES = [("loss", 0.5, {"block": 0, "epoch": 0}), ("loss", 0.25, {"block": 0, "epoch": 1}), ("seconds", 3.0, {})]

Record = Callable[..., RunData]


@pytest.fixture
def record(tmp_path: Path) -> Record:
    def written(name: str, results: Any = RESULTS, lines: Any = LINES, **facts: Any) -> RunData:
        config = {"dtype": "auto", "method": {"name": "ptq161", "compute_dtype": "auto"}, "tracker": {"name": "wandb"}}
        tracker = TrackerConfig("none")
        with RunRecord.open(tmp_path / name, config=config, tracker=tracker, seeds={}, job_name="demo") as run:
            run.describe(checkpoint_sha256="c0ffee", device="cpu", dtype="float32")
            run.describe(**facts)
            for key, value, where in lines:
                run.metric(key, value, **where)
            if results is not None:
                run.finish(results)
        return read_run(tmp_path / name)

    return written


def changed(document: dict[str, Any], *path: str, to: Any) -> dict[str, Any]:
    copy = json.loads(json.dumps(document))
    place = copy
    for key in path[:-1]:
        place = place[key]
    place[path[-1]] = to
    return copy


def test_everything_that_a_run_computes_is_compared_and_no_clock(record: Record) -> None:
    assert _values(record("a")) == {
        Place("metrics", "ppl/boolq@512", ""): 30.5,
        Place("metrics", "bits_per_weight", ""): 1.72,
        Place("full_precision", "ppl/boolq@512", ""): 20.5,
        Place("protocol", "standard_error", "ppl/boolq@512"): 0.5,
        Place("protocol", "split", "ppl/boolq@512"): "validation",
        Place("protocol", "n_tokens", "ppl/boolq@512"): 512,
        Place("metrics.jsonl", "loss", "block=0 epoch=0"): 0.5,
        Place("metrics.jsonl", "loss", "block=0 epoch=1"): 0.25,
    }


def test_equal_runs_are_equal_whatever_the_clock_says(record: Record) -> None:
    results = changed(changed(RESULTS, "seconds", "quantize", to=99.0), "peak_memory_bytes", to=1)
    speeds = [(f"{stage}_tokens_per_second", 500.0, {"step": 0}) for stage in ("preprocess", "finetune")]
    slower = [(name, 400.0, where) for name, _, where in speeds]
    comparison = compare(
        record("a", lines=[*LINES, *speeds]), record("b", results, [*LINES[:2], ("seconds", 77.0, {}), *slower])
    )
    assert comparison.equal
    assert (comparison.n_values, comparison.n_different, comparison.missing, comparison.extra) == (8, 0, [], [])
    assert comparison.hashes == {"checkpoint_sha256": ("c0ffee", "c0ffee")}
    assert comparison.environment == {}


@pytest.mark.parametrize(
    "path",
    [("metrics", "ppl/boolq@512"), ("full_precision", "ppl/boolq@512"), ("protocol", "ppl/boolq@512", "n_tokens")],
)
def test_the_last_bit_of_a_result_counts(record: Record, path: tuple[str, ...]) -> None:
    value = RESULTS
    for key in path:
        value = value[key]
    comparison = compare(record("a"), record("b", changed(RESULTS, *path, to=math.nextafter(value, math.inf))))
    assert not comparison.equal and comparison.n_different == 1
    assert compare(record("a"), record("b", changed(RESULTS, *path, to=math.nextafter(value, math.inf))), 1e-9).equal


def test_the_largest_difference_of_a_name_is_reported_with_its_place(record: Record) -> None:
    lines = [("loss", 0.5 * 1.01, {"block": 0, "epoch": 0}), ("loss", 0.25 / 2, {"block": 0, "epoch": 1})]
    comparison = compare(record("a"), record("b", lines=lines), tolerance=0.1)
    (loss,) = [metric for metric in comparison.metrics if metric.name == "loss"]
    assert (loss.n_values, loss.n_different, loss.largest_relative_difference) == (2, 1, 0.5)
    assert (loss.where, loss.recorded, loss.replayed) == ("block=0 epoch=1", 0.25, 0.125)
    assert not comparison.equal
    assert compare(record("a"), record("b", lines=lines), tolerance=0.5).equal


def test_a_number_that_is_not_found_again_is_a_difference_and_a_new_one_is_not(record: Record) -> None:
    full, less = record("a"), record("b", lines=LINES[:1])
    comparison = compare(full, less)
    assert comparison.missing == [Place("metrics.jsonl", "loss", "block=0 epoch=1")] and not comparison.equal
    comparison = compare(less, full)
    assert comparison.extra == [Place("metrics.jsonl", "loss", "block=0 epoch=1")] and comparison.equal


def test_a_number_written_twice_counts_as_last_written(record: Record) -> None:
    assert compare(record("a", lines=[("loss", 9.0, {"block": 0, "epoch": 0}), *LINES]), record("b")).equal


def test_text_of_the_protocol_counts(record: Record) -> None:
    other = changed(RESULTS, "protocol", "ppl/boolq@512", "split", to="test")
    comparison = compare(record("a"), record("b", other), tolerance=0.5)
    assert not comparison.equal
    assert [m.largest_relative_difference for m in comparison.metrics if m.n_different] == [math.inf]


def test_the_checkpoint_must_be_the_same_unless_a_tolerance_is_given(record: Record) -> None:
    before, after = record("a"), record("b", checkpoint_sha256="decaf")
    assert not compare(before, after).equal
    assert compare(before, after).differing_hashes == ["checkpoint_sha256"]
    assert compare(before, after, tolerance=1e-6).equal


def test_differences_of_the_environment_are_reported(record: Record) -> None:
    before = record("a", device="cuda", versions={"torch": "2.9", "peft": "1"}, git={"commit": "abc", "dirty": False})
    after = record("b", versions={"torch": "2.10", "peft": "1"}, git=None)
    assert compare(before, after).environment == {
        "git.commit": ("abc", None),
        "git.dirty": (False, None),
        "versions.torch": ("2.9", "2.10"),
        "device": ("cuda", "cpu"),
    }


def test_the_report_is_json_and_the_table_names_what_differs(record: Record, capsys: pytest.CaptureFixture) -> None:
    nan = changed(RESULTS, "metrics", "ppl/boolq@512", to=math.nan)
    comparison = compare(record("a"), record("b", nan, LINES[:1], checkpoint_sha256="decaf", dtype="bfloat16"))
    document = decode_json(encode_json(comparison.document()))
    assert (document["equal"], document["n_values"], document["n_different"]) == (False, 7, 1)
    assert document["hashes"]["checkpoint_sha256"] == {"recorded": "c0ffee", "replayed": "decaf"}
    assert document["environment"]["dtype"] == {"recorded": "float32", "replayed": "bfloat16"}
    assert document["missing"] == [{"source": "metrics.jsonl", "name": "loss", "where": "block=0 epoch=1"}]
    _print_comparison(comparison, Path("out"))
    printed = capsys.readouterr().out
    verdict = "Not reproduced: 1 of 7 values differ, 1 are missing from the replay; "
    assert verdict + "hashes that differ: checkpoint_sha256." in printed
    assert "The replay has no loss block=0 epoch=1 (metrics.jsonl)." in printed and "decaf" in printed


finite = st.floats(allow_nan=False, allow_infinity=False)


@given(finite, finite)
def test_a_relative_difference_is_symmetric_and_zero_for_equal_numbers_only(a: float, b: float) -> None:
    difference = _relative_difference(a, b)
    assert difference == _relative_difference(b, a) >= 0
    if a == b:
        assert difference == 0
    assert _relative_difference(a, a) == 0


@pytest.mark.parametrize(
    ("a", "b", "expected"),
    [
        (1.0, 2.0, 0.5),
        (-1.0, 1.0, 2.0),
        (0.0, 1e-300, 1.0),
        (0, 0.0, 0.0),
        (math.nan, math.nan, 0.0),
        (math.nan, 1.0, math.inf),
        (math.inf, math.inf, 0.0),
        (math.inf, 1.0, math.inf),
        ("a", "a", 0.0),
        ("a", "b", math.inf),
        (None, 1.0, math.inf),
    ],
)
def test_relative_differences(a: Any, b: Any, expected: float) -> None:
    assert _relative_difference(a, b) == expected


def test_the_dtype_that_auto_meant_is_configuration_and_nothing_is_mirrored_or_found(record: Record) -> None:
    config = _replayed_config(record("a"))
    assert config["dtype"] == config["method"]["compute_dtype"] == "float32"
    assert config["tracker"] == {"name": "none"}
    assert config["cache"] is config["force"] is False


def refusal(capsys: pytest.CaptureFixture, *arguments: str) -> str:
    assert main(arguments) == 1
    printed = capsys.readouterr()
    assert printed.out == ""
    (sentence,) = printed.err.splitlines()
    return sentence


def test_what_cannot_be_replayed_is_refused_in_one_sentence(
    record: Record, tmp_path: Path, capsys: pytest.CaptureFixture
) -> None:
    assert "is not a run directory" in refusal(capsys, str(tmp_path / "nowhere"))
    record("unfinished", results=None)
    assert "did not finish (state: failed)" in refusal(capsys, str(tmp_path / "unfinished"))
    record("old")
    manifest = tmp_path / "old" / "manifest.json"
    manifest.write_text(manifest.read_text().replace('"schema_version": 1', '"schema_version": 0'))
    assert "schema_version 0" in refusal(capsys, str(tmp_path / "old"))
    record("done")
    for tolerance in ("-1", "nan", "inf"):
        sentence = f"--tolerance {float(tolerance)}: use 0"
        assert sentence in refusal(capsys, str(tmp_path / "done"), "--tolerance", tolerance)
    assert "holds a record already" in refusal(capsys, str(tmp_path / "done"), "--out", str(tmp_path / "old"))
    # The configuration of this record lacks most keys: it stands for one that another version wrote.
    assert "cannot be replayed: " in refusal(capsys, str(tmp_path / "done"))
    with (tmp_path / "done" / "metrics.jsonl").open("a") as file:
        file.write('{"time": 1')
    assert "is damaged (line 4" in refusal(capsys, str(tmp_path / "done"))


def test_a_damaged_configuration_is_refused(record: Record, tmp_path: Path) -> None:
    record("done")
    (tmp_path / "done" / "config.yaml").write_text("a: [")
    with pytest.raises(UserError, match="is damaged"):
        _read_finished(tmp_path / "done")
