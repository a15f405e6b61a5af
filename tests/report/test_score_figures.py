"""What is drawn of scores: against bits, against swept numbers, by variant."""

from __future__ import annotations

import math
from typing import Any

import plotly.graph_objects as go
import pytest

from ptq161.errors import UserError
from ptq161.report.__main__ import main
from ptq161.report.collect import collect
from ptq161.report.published import Published
from ptq161.report.results import Results, results_of
from ptq161.report.score_figures import MOST_LABELS, MOST_LINES, bits_figure, sweep_figure, variants_figure
from ptq161.report.static import draw, render
from tests.report.conftest import WriteRun

PPL, ACC = "ppl/boolq@512", "zero_shot/piqa/acc"
RESTORED = {"name": "restorative_lora", "steps": 40}


def named(figure: go.Figure) -> dict[str, Any]:
    """Name -> its trace, of the first panel."""
    return {trace.name: trace for trace in reversed(figure.data) if trace.name and trace.xaxis in (None, "x")}


def points(trace: Any) -> list[tuple[float, float]]:
    return [(float(x), float(y)) for x, y in zip(trace.x, trace.y, strict=True)]


def legend(figure: go.Figure) -> list[str]:
    return [trace.name for trace in figure.data if trace.showlegend]


def full_precision(figure: go.Figure) -> list[str]:
    return [next(filter(None, trace.text)) for trace in figure.data if trace.line.dash == "dash"]


def texts(figure: go.Figure) -> set[str]:
    return {text for trace in figure.data for text in (() if trace.text is None else trace.text) if text}


@pytest.fixture
def sweep(write_run: WriteRun) -> Results:
    """The ratios out of order, as a user may type them."""
    ratios = {0.2: 60.0, 0.0: 900.0, 0.3: 40.0}
    return results_of(collect([write_run(str(r), mask_ratio=r, ppl=ppl) for r, ppl in ratios.items()]).runs)


def test_a_sweep_is_a_panel_per_metric_over_full_precision(sweep: Results) -> None:
    figure = sweep_figure(sweep, "mask_ratio", [ACC, PPL])
    accuracy, perplexity = (trace for trace in figure.data if trace.name == "ptq161")
    assert points(perplexity) == [(0.0, 900.0), (0.2, 60.0), (0.3, 40.0)]
    assert (perplexity.mode, points(accuracy)) == ("lines+markers", [(0.0, 0.55), (0.2, 0.55), (0.3, 0.55)])
    assert [figure.layout[axis].title.text for axis in ("yaxis", "yaxis2", "xaxis")] == [ACC, PPL, "mask_ratio"]
    assert (figure.layout.yaxis.type, figure.layout.yaxis2.type) == (None, "log")
    (_, dashed) = (trace for trace in figure.data if trace.line.dash == "dash")
    assert (set(dashed.y), full_precision(figure)) == ({18.0}, ["full precision 66.0", "full precision 18.00"])
    assert legend(figure) == ["ptq161"]
    low, high = draw(figure).axes[1].get_ylim()
    assert low < 18 and high > 900


def test_runs_that_differ_in_more_have_lines_of_their_own(write_run: WriteRun) -> None:
    folders = [write_run(f"{r} {b}", mask_ratio=r, block_size=b) for r in (0.1, 0.2) for b in (1, 2)]
    figure = sweep_figure(results_of(collect([*folders, write_run("rtn", "rtn")]).runs), "mask_ratio", [PPL])
    assert legend(figure) == ["block_size=1", "block_size=2"]
    assert [points(trace) for trace in named(figure).values()] == [[(0.1, 100.0), (0.2, 100.0)]] * 2
    assert texts(figure) == {"block_size=1", "block_size=2", "full precision 18.00"}  # at the lines' ends, in print


def test_more_lines_than_one_tells_apart_are_points_of_their_methods(write_run: WriteRun) -> None:
    sizes = range(1, MOST_LINES + 2)
    folders = [write_run(f"{r} {b}", mask_ratio=r, block_size=b) for r in (0.1, 0.2) for b in sizes]
    (trace,) = named(sweep_figure(results_of(collect(folders).runs), "mask_ratio", [PPL])).values()
    assert (trace.name, trace.mode, len(trace.x)) == ("ptq161", "markers", 2 * len(sizes))


def test_seeds_are_one_line_with_bars(write_run: WriteRun) -> None:
    folders = [write_run(f"{r} {s}", mask_ratio=r, seed=s, ppl=100 + 10 * s) for r in (0.1, 0.2) for s in (0, 1, 2)]
    (trace,) = named(sweep_figure(results_of(collect(folders).runs), "mask_ratio", [PPL])).values()
    assert list(trace.y) == [110.0, 110.0]
    assert (list(trace.error_y.array), list(trace.error_y.arrayminus)) == ([10.0, 10.0], [10.0, 10.0])
    assert "seeds 0, 1, 2" in trace.hovertext[0] and "110.0 [100.0, 120.0]" in trace.hovertext[0]


@pytest.mark.parametrize("x", ["mask_ratio", "method"])
def test_a_perplexity_that_is_not_finite_is_not_drawn(write_run: WriteRun, x: str) -> None:
    runs = results_of(collect([write_run("a", ppl=math.inf, mask_ratio=0.1), write_run("b")]).runs)
    assert points(named(sweep_figure(runs, "mask_ratio", [PPL]))["ptq161"]) == [(0.2, 100.0)]
    nothing = runs.select(runs.of(PPL).reindex(runs.rows.index).value.isna())
    for figure in (bits_figure(runs, [PPL]), bits_figure(nothing, [PPL]), sweep_figure(nothing, "mask_ratio", [PPL])):
        assert render(figure)["png"].startswith(b"\x89PNG")


def test_bits_against_perplexity(write_run: WriteRun) -> None:
    methods = {"rtn": (565.0, 2.05), "billm": (70.0, 2.9), "ptq161": (50.0, 1.72)}
    runs = results_of(collect([write_run(name, name, *values) for name, values in methods.items()]).runs)
    point = Published("A paper", "Table 1", "tiny", "nanoquant", "1.00", 1.02, PPL, 30.0)
    foreign = Published("A paper", "", "other", "billm", "1.1", None, PPL, 30.0)
    other = Published("A paper", "Table 2", "tiny", "dbw", "1.61", None, PPL, 40.0, "c4", "29M")
    figure = bits_figure(runs, [PPL], [point, foreign, other])
    traces = named(figure)
    assert {name: points(traces[name]) for name in methods} == {n: [(b, p)] for n, (p, b) in methods.items()}
    assert points(traces["nominal bits"]) == [(1.6, ppl) for ppl, _ in methods.values()]
    assert points(traces["published"]) == [(1.02, 30.0)]
    assert traces["published"].hovertext == ("nanoquant, tiny: 30.00<br>A paper, Table 1",)
    assert points(traces["published, calibrated on c4"]) == [(1.61, 40.0)]
    assert traces["published, calibrated on c4"].hovertext == ("dbw, tiny: 40.00<br>A paper, Table 2<br>29M tokens",)
    assert points(traces["Pareto front"]) == [(1.72, 50.0)]
    assert figure.layout.yaxis.type == "log"
    assert texts(figure) == {*methods, "nanoquant", "dbw", "full precision 18.00"}
    assert "<b>rtn</b><br>ppl/boolq@512 565.0 ± 2.50<br>2.05 bits measured, 1.60 nominal" in traces["rtn"].hovertext[0]


def test_the_models_of_two_lines_of_full_precision_are_named(write_run: WriteRun) -> None:
    other = {"metrics": {PPL: 50.0, "bits_per_weight": 2.0}, "full_precision": {PPL: 17.0}, "protocol": {}}
    folders = [write_run("a"), write_run("b", model={"name": "other"}, results=other)]
    figure = bits_figure(results_of(collect(folders).runs), [PPL])
    assert full_precision(figure) == ["full precision, tiny 18.00", "full precision, other 17.00"]


def test_more_points_than_one_reads_have_a_legend_instead_of_labels(write_run: WriteRun) -> None:
    folders = [write_run(str(n), mask_ratio=n / 100) for n in range(MOST_LABELS + 1)]
    figure = bits_figure(results_of(collect(folders).runs), [PPL])
    assert texts(figure) == {"full precision 18.00"}
    (shown,) = draw(figure).legends
    assert "ptq161" in [text.get_text() for text in shown.get_texts()]


def test_runs_of_one_method_are_told_apart(sweep: Results) -> None:
    assert "ptq161 mask_ratio=0.3" in texts(bits_figure(sweep, [PPL]))


def test_nothing_to_draw(write_run: WriteRun) -> None:
    runs = results_of(collect([write_run("rtn", "rtn")]).runs)
    with pytest.raises(UserError, match="no run has both mask_ratio and one of ppl/boolq@512"):
        sweep_figure(runs, "mask_ratio", [PPL])
    with pytest.raises(UserError, match="no run has both bits and one of ppl/other"):
        bits_figure(runs, ["ppl/other"])
    full = results_of(collect([write_run("none", "none")]).runs)
    with pytest.raises(
        UserError, match=r"^no run has both method and one of ppl/boolq@512: there is nothing to draw\.$"
    ):
        variants_figure(full, "method", [PPL])


# Variants


@pytest.fixture
def before_and_after(write_run: WriteRun) -> Results:
    runs = [
        write_run(f"{method} {i}", method, ppl, preprocess=preprocess)
        for method, values in {"rtn": (500.0, 400.0), "ptq161": (90.0, 60.0)}.items()
        for i, (ppl, preprocess) in enumerate(zip(values, ({"name": "none"}, RESTORED), strict=True))
    ]
    return results_of(collect([*runs, write_run("mask", "mask", 200.0)]).runs)


def in_rows(figure: go.Figure) -> dict[str, list[tuple[float, int]]]:
    """Name -> (value, row), without what spreads the colors of a row."""
    filled = [trace for trace in figure.data if trace.mode == "markers" and trace.marker.symbol == "circle"]
    return {trace.name: [(value, round(row)) for value, row in points(trace)] for trace in filled}


def test_methods_before_and_after_share_a_row(before_and_after: Results) -> None:
    figure = variants_figure(before_and_after, "method", [PPL])
    assert list(figure.layout.yaxis.ticktext) == ["rtn", "ptq161", "mask"]
    assert in_rows(figure) == {
        "preprocess=none": [(500.0, 0), (90.0, 1), (200.0, 2)],
        "preprocess=restorative_lora": [(400.0, 0), (60.0, 1)],
    }
    layout = figure.layout
    assert (layout.xaxis.type, layout.xaxis.title.text, layout.yaxis.title.text) == ("log", PPL, "method")
    low, high = layout.yaxis.range
    assert low > high  # the first row is on top
    (dashed,) = (trace for trace in figure.data if trace.line.dash == "dash")
    assert set(dashed.x) == {18.0}


def test_a_preprocessed_model_is_a_hollow_point(write_run: WriteRun) -> None:
    document = {"metrics": {PPL: 60.0}, "full_precision": {PPL: 18.0}, "merged": {PPL: 40.0}, "protocol": {}}
    folders = [write_run("before", "rtn", 90.0), write_run("after", "rtn", preprocess=RESTORED, results=document)]
    figure = variants_figure(results_of(collect(folders).runs), "method", [PPL])
    hollow = named(figure)["preprocessed, not quantized"]
    assert (hollow.marker.symbol, list(hollow.x)) == ("circle-open", [40.0])
    assert hollow.hovertext[0].endswith("not quantized<br>40.00")
    assert in_rows(figure) == {"preprocess=none": [(90.0, 0)], "preprocess=restorative_lora": [(60.0, 0)]}
    assert legend(figure)[-1] == "preprocessed, not quantized"


def test_methods_in_one_row_have_colors(before_and_after: Results) -> None:
    figure = variants_figure(before_and_after, "preprocess", [PPL])
    assert list(figure.layout.yaxis.ticktext) == ["none", "restorative_lora"]
    assert in_rows(figure) == {
        "rtn": [(500.0, 0), (400.0, 1)],
        "ptq161": [(90.0, 0), (60.0, 1)],
        "mask": [(200.0, 0)],
    }
    assert legend(figure) == ["rtn", "ptq161", "mask"]


def test_what_differs_between_rows_alone_is_no_label(write_run: WriteRun) -> None:
    runs = [write_run("squad"), write_run("c4", calib={"name": "c4", "n_samples": 128})]
    figure = variants_figure(results_of(collect(runs).runs), "calib", [PPL])
    assert list(figure.layout.yaxis.ticktext) == ["squad", "c4"]
    assert legend(figure) == []


def test_a_panel_per_metric_with_intervals_and_full_precision(write_run: WriteRun) -> None:
    runs = [write_run(str(seed), seed=seed, ppl=100.0 + 10 * seed) for seed in (0, 1, 2)]
    figure = variants_figure(results_of(collect(runs).runs), "method", [PPL, ACC])
    assert (figure.layout.xaxis.type, figure.layout.xaxis2.type) == ("log", None)
    assert list(figure.data[0].error_x.array) == list(figure.data[0].error_x.arrayminus) == [10.0]
    assert full_precision(figure) == ["full precision 18.00", "full precision 66.0"]


def test_the_program_draws_names_in_rows(write_run: WriteRun) -> None:
    folders = [write_run("squad"), write_run("c4", calib={"name": "c4", "n_samples": 128})]
    out = folders[0].parent / "out"
    assert main([*map(str, folders), "--out", str(out), "--x", "calib"]) == 0
    svg = (out / "figure.svg").read_text()
    assert all(f"<!-- {name} -->" in svg for name in ("squad", "c4", "calib", PPL))
