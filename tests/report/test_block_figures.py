"""What is drawn of blocks and linears, for print and on the page."""

from __future__ import annotations

import math

import plotly.graph_objects as go
import pytest

from ptq161.report import interactive
from ptq161.report.block_figures import cost_figure, error_figure, loss_figure, preprocess_figure, salient_figure
from ptq161.report.collect import Run
from ptq161.report.details import Details
from ptq161.report.figures import render
from ptq161.report.results import Result
from ptq161.report.sections import sections


def details(label: str, *, worst: float = 0.5) -> Details:
    return Details(
        run=Run(None, label, "tiny", {}, {}),
        label=label,
        loss={0: {0: 4.0, 1: 5.0}, 1: {0: 2.0, 1: worst}},
        preprocess_loss={0: {10: 3.0, 20: 2.5}, 1: {10: 2.4}},
        error={"q_proj": {0: 0.01, 1: worst}, "up_proj": {1: 0.0}},
        salient={"q_proj": {0: 12.0, 1: 12.0}},
        seconds={0: 1.5, 1: 1.6},
    )


def test_the_last_epoch_over_the_first_faint() -> None:
    (axes,) = loss_figure([details("a"), details("b")]).axes
    assert [line.get_ydata().tolist() for line in axes.lines[:2]] == [[2.0, 0.5], [4.0, 5.0]]
    assert axes.get_legend_handles_labels()[1] == ["a", "b"]
    assert axes.get_yscale() == "log"


def test_a_line_for_each_round_of_preprocessing() -> None:
    (axes,) = preprocess_figure([details("a")]).axes
    assert axes.get_legend_handles_labels()[1] == ["a round 0", "a round 1"]


def test_a_heat_map_for_each_run_on_one_scale() -> None:
    *panels, bar = error_figure([details("a"), details("b", worst=0.9)]).axes
    assert [axes.get_title() for axes in panels] == ["a", "b"]
    assert [label.get_text() for label in panels[0].get_yticklabels()] == ["q_proj", "up_proj"]
    assert panels[0].images[0].norm is panels[1].images[0].norm
    assert bar.get_ylim() == pytest.approx((0.01, 0.9))


@pytest.mark.parametrize("worst", [math.inf, math.nan, 0.0])
def test_numbers_without_a_place_on_the_scale_are_left_out(worst: float) -> None:
    runs = [details("a", worst=worst)]
    for figure in (loss_figure(runs), error_figure(runs), salient_figure(runs)):
        assert render(figure)["png"].startswith(b"\x89PNG")
    charts = [chart for section in sections([], [], runs, []) for chart in section.charts.values()]
    assert len(charts) == 5
    for chart in charts:
        go.Figure(chart)


def test_the_colours_of_a_heat_map_follow_the_logarithm() -> None:
    (trace,) = interactive.heat_map(details("a").error, (0.01, 1.0), "error", is_log=True)["data"]
    assert (trace["zmin"], trace["zmax"]) == (-2.0, 0.0)
    assert trace["z"] == [[-2.0, math.log10(0.5)], [None, None]]
    assert trace["customdata"] == [[0.01, 0.5], [None, 0.0]]


def test_seconds_are_stacked_by_stage() -> None:
    run = Run(None, "rtn", "tiny", {}, {}, seconds={"load": 1.0, "quantize": 20.0}, peak_memory_bytes=2e9)
    time, memory = cost_figure([Result((run,))], ["rtn"]).axes
    assert [(bar.get_x(), bar.get_width()) for bar in time.patches] == [(0.0, 1.0), (1.0, 20.0)]
    assert [bar.get_width() for bar in memory.patches] == [2.0]
