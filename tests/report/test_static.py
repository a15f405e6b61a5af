"""A figure in print: the same series as on the page, and what print alone has."""

from __future__ import annotations

import itertools
from typing import Any

import numpy as np
import plotly.graph_objects as go
import pytest
from matplotlib.axes import Axes

from ptq161.report.collect import collect
from ptq161.report.details import chosen_runs, read_details
from ptq161.report.results import Results, metric_names, results_of
from ptq161.report.score_figures import bits_figure, sweep_figure, variants_figure
from ptq161.report.sections import Section, sections
from ptq161.report.static import draw, render
from ptq161.report.style import add, panels, titled
from tests.report.conftest import WriteRun
from tests.report.synthetic import write_records

PPL = "ppl/boolq@512"


@pytest.fixture(scope="module")
def shown(tmp_path_factory: pytest.TempPathFactory) -> list[Section]:
    """All sections of a sweep with several seeds."""
    folder = tmp_path_factory.mktemp("static")
    write_records(folder / "sweep", 30, with_metrics=4)
    results = results_of(collect([folder / "sweep"]).runs)
    runs = chosen_runs(results)
    names = metric_names(results)
    return sections(results, runs, read_details(runs, []), names, names, x="method")


def series(figure: go.Figure) -> set[str]:
    """Return the points of each series, as text: NaN is not equal to itself."""
    return {repr([trace.name, np.asarray(trace.x).tolist(), np.asarray(trace.y).tolist()]) for trace in figure.data}


def drawn(figure: go.Figure) -> list[Any]:
    """Everything that is drawn in print, in the order of the page's traces."""
    everything = []
    cursors: dict[Axes, int] = {}
    drawing = draw(figure)
    pairs = list(dict.fromkeys((trace.xaxis or "x", trace.yaxis or "y") for trace in figure.data))
    for trace in figure.data:
        axes = drawing.axes[pairs.index((trace.xaxis or "x", trace.yaxis or "y"))]
        cursor = cursors[axes] = cursors.get(axes, -1) + 1
        if trace.type == "scatter":
            line = axes.containers[cursor].lines[0]
            everything.append((line.get_xdata(), line.get_ydata()))
        elif trace.type == "bar":
            everything.append((axes.containers[cursor].datavalues,))
        else:
            everything.append((axes.images[cursor].get_array().filled(np.nan),))
    return everything


@pytest.mark.parametrize("key", ["bits", "sweeps", "loss", "error", "salient", "cost"])
def test_print_and_page_show_the_same_series(shown: list[Section], key: str) -> None:
    (section,) = (section for section in shown if section.key == key)
    figures = [*section.prints.values(), *itertools.islice(section.charts.values(), 3)]
    assert len(figures) >= 2
    for figure in figures:
        shown_on_page = {"scatter": ("x", "y"), "bar": ("x",), "heatmap": ("z",)}
        for trace, in_print in zip(figure.data, drawn(figure), strict=True):
            on_page = [np.asarray(trace[part], dtype=float) for part in shown_on_page[trace.type]]
            assert len(in_print[0])
            for ours, theirs in zip(in_print, on_page, strict=True):
                np.testing.assert_array_equal(np.asarray(ours, dtype=float), theirs)


@pytest.mark.parametrize("key", ["bits", "sweeps"])
def test_what_is_printed_is_on_the_page(shown: list[Section], key: str) -> None:
    """A printed figure shows several of the page's choices side by side, and no series that none of them has."""
    (section,) = (section for section in shown if section.key == key)
    on_page = set().union(*map(series, section.charts.values()))
    assert section.prints
    for figure in section.prints.values():
        assert series(figure) <= on_page


@pytest.fixture
def results(write_run: WriteRun) -> Results:
    folders = [write_run(name, name, 100.0, 2.0) for name in ("rtn", "gptq", "awq")]
    folders += [write_run(f"ratio {r}", mask_ratio=r, ppl=400 - 1000 * r, seed=s) for r in (0.1, 0.2) for s in (0, 1)]
    return results_of(collect(folders).runs)


def test_bars_are_as_long_as_on_the_page(write_run: WriteRun) -> None:
    folders = [write_run(f"{s}", seed=s, ppl=100 + 10 * s) for s in (0, 1, 2)]
    for figure, side in (
        (sweep_figure(results_of(collect(folders).runs), "mask_ratio", [PPL]), 1),
        (variants_figure(results_of(collect(folders).runs), "method", [PPL]), 0),
    ):
        segments = draw(figure).axes[0].containers[0].lines[2][0].get_segments()
        assert [segment[:, side].tolist() for segment in segments] == [[100.0, 120.0]]


def test_labels_of_equal_points_are_apart_and_beside_them(results: Results) -> None:
    drawing = draw(bits_figure(results, [PPL]))
    found = {text.get_text(): text for text in drawing.axes[0].texts}
    assert {"rtn", "gptq", "awq", "ptq161 mask_ratio=0.1", "full precision 18.00"} <= set(found)
    heights = sorted(found[name].xyann[1] for name in ("rtn", "gptq", "awq"))
    assert all(above - below >= 9 for below, above in itertools.pairwise(heights))
    drawing.draw_without_rendering()
    left, right = drawing.bbox.x0, drawing.bbox.x1
    assert all(left <= text.get_window_extent().x0 and text.get_window_extent().x1 <= right for text in found.values())


def test_what_is_labeled_needs_no_legend(results: Results) -> None:
    figure = sweep_figure(results.select(results.rows.method != "awq"), "mask_ratio", [PPL])
    drawing = draw(figure)
    assert "ptq161" in {text.get_text() for text in drawing.axes[0].texts}
    assert drawing.legends == []


def test_the_axes_are_those_of_the_page(results: Results) -> None:
    figure = variants_figure(results, "method", [PPL, "zero_shot/piqa/acc"])
    perplexity, accuracy = draw(figure).axes
    assert (perplexity.get_xscale(), accuracy.get_xscale()) == ("log", "linear")
    assert [label.get_text() for label in perplexity.get_yticklabels()] == list(figure.layout.yaxis.ticktext)
    assert (perplexity.get_xlabel(), perplexity.get_ylabel()) == (PPL, "method")
    assert perplexity.get_ylim() == accuracy.get_ylim() == tuple(figure.layout.yaxis.range)


def test_the_same_figure_gives_the_same_bytes(results: Results) -> None:
    one, other = (render(bits_figure(results, [PPL])) for _ in range(2))
    assert one == other
    assert one["png"].startswith(b"\x89PNG") and b"<svg" in one["svg"]


def test_what_cannot_be_printed_is_refused() -> None:
    with pytest.raises(KeyError, match="pie"):
        draw(go.Figure(go.Pie(values=[1])))
    assert draw(add(panels(1), 0, [go.Scatter(x=[1], y=[1], mode="markers", marker_color="red")], titled("x"), {})).axes
