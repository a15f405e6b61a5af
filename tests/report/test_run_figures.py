"""What is drawn of blocks and linears, of time and memory."""

from __future__ import annotations

import math
from collections.abc import Mapping
from typing import Any

import pandas as pd
import pytest

from ptq161.report.collect import Run
from ptq161.report.results import results_of
from ptq161.report.run_figures import (
    MOST_PANELS,
    color_bounds,
    cost_figure,
    epochs_figure,
    finetune_figure,
    heat_maps,
    loss_figure,
    preprocess_figure,
    time_memory_figure,
)
from ptq161.report.sections import sections
from ptq161.report.static import draw, render

LOSS = [(0, 0, 4.0), (0, 1, 5.0), (1, 0, 2.0)]


def details(*labels: str, worst: float = 0.5) -> dict[str, pd.DataFrame]:
    """Two blocks and two epochs of each run; the last number is ``worst``."""
    rows: Mapping[str, tuple[list[str], list[tuple[Any, ...]]]] = {
        "loss": (["epoch", "block", "value"], [*LOSS, (1, 1, worst)]),
        "preprocess_loss": (["round", "step", "value"], [(0, 10, 3.0), (0, 20, 2.5), (1, 10, 2.4)]),
        "output_error": (["kind", "block", "value"], [("q_proj", 0, 0.01), ("q_proj", 1, worst), ("up_proj", 1, 0.0)]),
        "salient_channels": (["kind", "block", "value"], [("q_proj", 0, 12.0), ("q_proj", 1, 12.0)]),
        "finetune_loss": (["step", "value"], [(0, 2.0), (1, 1.5)]),
        "finetune_held_out_loss": (["step", "value"], [(0, 2.2), (2, 1.6)]),
        "code_bits": (["kind", "block", "value"], [("q_proj", 0, 1.75), ("up_proj", 0, 1.5), ("q_proj", 1, 1.25)]),
        "seconds": (["block", "value"], [(0, 1.5), (1, 1.6)]),
    }
    return {
        name: pd.concat([pd.DataFrame(values, columns=columns).assign(label=label) for label in labels])
        for name, (columns, values) in rows.items()
    }


def test_the_last_epoch_over_the_first_faint() -> None:
    figure = loss_figure(details("a", "b")["loss"])
    last, faint = figure.data[:2], figure.data[2:]
    assert [list(trace.y) for trace in (last[0], faint[0])] == [[2.0, 0.5], [4.0, 5.0]]
    assert [trace.name for trace in last] == [trace.name for trace in faint] == ["a", "b"]
    assert [trace.line.color for trace in last] == [trace.line.color for trace in faint]
    assert [trace.opacity for trace in figure.data] == [None, None, 0.35, 0.35]
    assert [trace.showlegend for trace in figure.data] == [True, True, False, False]
    assert figure.layout.yaxis.type == "log"


def test_the_first_epoch_of_many_runs_is_left_out() -> None:
    labels = [str(n) for n in range(MOST_PANELS + 1)]
    assert [trace.name for trace in loss_figure(details(*labels)["loss"]).data] == labels


def test_a_line_for_each_epoch() -> None:
    figure = epochs_figure(details("a")["loss"])
    assert {trace.name: list(trace.y) for trace in figure.data} == {"epoch 0": [4.0, 5.0], "epoch 1": [2.0, 0.5]}


def test_a_line_for_each_round_of_preprocessing() -> None:
    first, second = preprocess_figure(details("a")["preprocess_loss"]).data
    assert [(trace.name, list(trace.x), list(trace.y)) for trace in (first, second)] == [
        ("a, round 0", [10, 20], [3.0, 2.5]),
        ("a, round 1", [10], [2.4]),
    ]
    assert first.line.color == second.line.color and first.line.dash != second.line.dash


def test_a_line_for_training_and_held_out_losses() -> None:
    found = details("a")
    losses = [found["finetune_loss"].assign(held_out=False), found["finetune_held_out_loss"].assign(held_out=True)]
    trained, held_out = finetune_figure(pd.concat(losses)).data
    assert (trained.name, list(trained.x), list(trained.y)) == ("a", [0, 1], [2.0, 1.5])
    assert (held_out.name, list(held_out.x), list(held_out.y)) == ("a, held out", [0, 2], [2.2, 1.6])
    assert trained.line.color == held_out.line.color and held_out.line.dash == "dot"


def test_a_heat_map_for_each_run_on_one_scale() -> None:
    values = pd.concat([details("a")["output_error"], details("b", worst=0.9)["output_error"]])
    figure = heat_maps(values, "error", is_log=True)
    assert [note.text for note in figure.layout.annotations] == ["a", "b"]
    assert [list(trace.y) for trace in figure.data] == [["q_proj", "up_proj"]] * 2
    scale = figure.layout.coloraxis
    assert (10**scale.cmin, 10**scale.cmax) == pytest.approx((0.01, 0.9))
    assert scale.colorbar.ticktext[-1] == "0.9"
    *panels, bar = draw(figure).axes
    assert [axes.get_title() for axes in panels] == ["a", "b"]
    assert [label.get_text() for label in panels[0].get_yticklabels()] == ["q_proj", "up_proj"]
    assert bar.get_ylim() == pytest.approx((scale.cmin, scale.cmax))


@pytest.mark.parametrize("worst", [math.inf, math.nan, 0.0])
def test_numbers_without_a_place_on_the_scale_are_left_out(worst: float) -> None:
    found = details("a", worst=worst)
    assert loss_figure(found["loss"]).layout.yaxis.type is None
    assert color_bounds(found["output_error"], is_log=True) == (0.01, 0.01)
    run = Run(None, "a", "tiny", {}, {})
    shown = sections(results_of([run]), {"a": run}, found, [], [])
    assert [section.key for section in shown] == [
        "loss",
        "preprocessing",
        "finetuning",
        "error",
        "salient",
        "plan",
        "cost",
    ]
    for section in shown:
        for figure in section.prints.values():
            assert render(figure)["png"].startswith(b"\x89PNG")


def test_the_colors_of_a_heat_map_follow_the_logarithm() -> None:
    (trace,) = heat_maps(details("a")["output_error"], "error", (0.01, 1.0), is_log=True).data
    (low, high), (missing, zero) = trace.z
    assert (low, high) == (-2.0, math.log10(0.5)) and math.isnan(missing) and math.isnan(zero)
    assert trace.customdata[0].tolist() == [0.01, 0.5] and trace.customdata[1][1] == 0.0


def test_the_plan_is_a_heat_map_of_runs_that_have_one() -> None:
    found, runs = details("a", "b"), {label: Run(None, label, "tiny", {}, {}) for label in ("a", "b")}
    found["code_bits"] = found["code_bits"][found["code_bits"].label == "a"]
    (plan,) = (
        section for section in sections(results_of([*runs.values()]), runs, found, [], []) if section.key == "plan"
    )
    assert (list(plan.charts), list(plan.prints), list(plan.runs)) == (["a"], ["plan"], [runs["a"]])
    (trace,) = plan.charts["a"].data
    assert (list(trace.y), list(trace.x)) == (["q_proj", "up_proj"], [0, 1])
    assert trace.z[0].tolist() == [1.75, 1.25] and trace.z[1][0] == 1.5 and math.isnan(trace.z[1][1])
    assert trace.hovertemplate == "block %{x}, %{y}<br>bits per code %{customdata:.4g}<extra></extra>"
    found["code_bits"] = found["code_bits"][:0]
    assert "plan" not in [section.key for section in sections(results_of([*runs.values()]), runs, found, [], [])]


def test_seconds_are_stacked_by_stage_beside_the_memory() -> None:
    run = Run(None, "rtn", "tiny", {}, {}, seconds={"load": 1.0, "quantize": 20.0}, peak_memory_bytes=2e9)
    figure = cost_figure(results_of([run]))
    assert [(trace.name, list(trace.x)) for trace in figure.data] == [
        ("load", [1.0]),
        ("quantize", [20.0]),
        ("peak memory", [2.0]),
    ]
    time, memory = draw(figure).axes
    assert [(bar.get_x(), bar.get_width()) for bar in time.patches] == [(0.0, 1.0), (1.0, 20.0)]
    assert [bar.get_width() for bar in memory.patches] == [2.0]
    (point,) = time_memory_figure(results_of([run])).data
    assert (point.name, list(point.x), list(point.y)) == ("rtn", [21.0], [2.0])
