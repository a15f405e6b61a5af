"""What is read of blocks and linears, and of which runs."""

from __future__ import annotations

from typing import Any

import pandas as pd

from ptq161.report.collect import collect
from ptq161.report.details import chosen_runs, read_details
from ptq161.report.results import results_of
from tests.report.conftest import WriteRun

LINES = [
    *[("loss", 2.0, {"block": b, "epoch": e}) for b in (0, 1) for e in (0, 1)],
    ("loss", 1.0, {"block": 0, "epoch": 1}),  # again, as after a kill
    ("output_error", 0.5, {"linear": "1.mlp.up_proj"}),
    ("output_error", 0.25, {"linear": "0.mlp.up_proj"}),
    ("output_error", 0.75, {"linear": "lm_head"}),  # belongs to no block
    ("salient_channels", 12.0, {"linear": "0.self_attn.q_proj"}),
    ("code_bits", 1.5, {"linear": "0.self_attn.q_proj"}),
    *[("code_bits", bits, {"linear": f"0.mlp.experts.{n}.up_proj"}) for n, bits in enumerate((9.0, 2.0))],
    ("code_bits", 1.0, {"linear": "0.mlp.experts.0.up_proj"}),  # again
    ("preprocess_loss", 3.0, {"round": 0, "step": 10}),
    ("seconds", 4.0, {"block": 0}),
    ("seconds", 9.0, {}),
]


def rows(frame: pd.DataFrame) -> list[tuple[Any, ...]]:
    return list(frame.itertuples(index=False, name=None))


def test_what_a_run_says_of_its_blocks(write_run: WriteRun) -> None:
    run_dir = write_run("a", lines=LINES)
    with (run_dir / "metrics.jsonl").open("a") as stream:
        stream.write('{"time": 1, "name": "loss", "val')
    problems: list[str] = []
    found = read_details({"a": collect([run_dir]).runs[0]}, problems)
    assert rows(found["loss"]) == [("a", 0, 0, 2.0), ("a", 0, 1, 2.0), ("a", 1, 0, 1.0), ("a", 1, 1, 2.0)]
    assert rows(found["output_error"]) == [("a", "up_proj", 0, 0.25), ("a", "up_proj", 1, 0.5)]
    assert rows(found["salient_channels"]) == [("a", "q_proj", 0, 12.0)]
    assert rows(found["code_bits"]) == [("a", "q_proj", 0, 1.5), ("a", "up_proj", 0, 1.5)]
    assert rows(found["preprocess_loss"]) == [("a", 0, 10, 3.0)]
    assert rows(found["seconds"]) == [("a", 0, 4.0)]
    (problem,) = problems
    assert f"line {len(LINES) + 1} of" in problem and "truncated" in problem


def test_lines_of_other_shapes_are_left_out(write_run: WriteRun) -> None:
    lines = [
        ("loss", 1.0, {"block": "x"}),
        ("loss", 1.0, {}),
        ("seconds", 1.0, {"block": 1.5}),
        ("loss", 2.0, {"block": 3}),
    ]
    found = read_details({"a": collect([write_run("a", lines=lines)]).runs[0]}, [])
    assert rows(found["loss"]) == [("a", 0, 3, 2.0)]
    assert found["seconds"].empty


def test_of_many_runs_the_front_and_one_seed_each_go_first(write_run: WriteRun) -> None:
    points = {"rtn": (500.0, 2.0), "gptq": (400.0, 2.5), "billm": (450.0, 2.9), "ptq161": (50.0, 1.7)}
    folders = [write_run(f"{m} {s}", m, *point, seed=s) for m, point in points.items() for s in (0, 1)]
    found = results_of(collect(folders).runs)

    def names(most: int) -> list[str]:
        return list(chosen_runs(found, most))

    assert names(1) == ["ptq161 seed=0"]
    assert names(2) == ["rtn seed=0", "ptq161 seed=0"]
    assert len(names(4)) == 4 and all(text.endswith("seed=0") for text in names(4))
    assert len(names(100)) == 8
    assert all(text == f"{run.method} seed={run.seed}" for text, run in chosen_runs(found).items())
