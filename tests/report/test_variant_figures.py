"""Unlike variants: a row each, colours within a row."""

from __future__ import annotations

import pytest
from matplotlib.axes import Axes

from ptq161.errors import UserError
from ptq161.report.__main__ import main
from ptq161.report.collect import collect
from ptq161.report.figures import render
from ptq161.report.results import Result, results_of
from ptq161.report.variant_figures import variants_figure
from tests.report.conftest import WriteRun

PPL, ACC = "ppl/boolq@512", "zero_shot/piqa/acc"
RESTORED = {"name": "restorative_lora", "steps": 40}


@pytest.fixture
def before_and_after(write_run: WriteRun) -> list[Result]:
    runs = [
        write_run(f"{method} {i}", method, ppl, preprocess=preprocess)
        for method, values in {"rtn": (500.0, 400.0), "ptq161": (90.0, 60.0)}.items()
        for i, (ppl, preprocess) in enumerate(zip(values, ({"name": "none"}, RESTORED), strict=True))
    ]
    return results_of(collect([*runs, write_run("mask", "mask", 200.0)]).runs)


def drawn(axes: Axes) -> dict[str, list[tuple[float, int]]]:
    """Label -> (value, row), without what spreads the colours of a row."""
    return {
        container.get_label(): [(float(value), round(place)) for value, place in container.lines[0].get_xydata()]
        for container in axes.containers
    }


def rows(axes: Axes) -> list[str]:
    return [label.get_text() for label in axes.get_yticklabels()]


def test_methods_before_and_after_share_a_row(before_and_after: list[Result]) -> None:
    (axes,) = variants_figure(before_and_after, "method", [PPL]).axes
    assert rows(axes) == ["rtn", "ptq161", "mask"]
    assert drawn(axes) == {
        "preprocess=none": [(500.0, 0), (90.0, 1), (200.0, 2)],
        "preprocess=restorative_lora": [(400.0, 0), (60.0, 1)],
    }
    assert (axes.get_xscale(), axes.get_xlabel(), axes.get_ylabel()) == ("log", PPL, "method")
    low, high = axes.get_ylim()
    assert low > high  # the first row is on top


def test_a_preprocessed_model_is_a_hollow_point(write_run: WriteRun) -> None:
    document = {"metrics": {PPL: 60.0}, "full_precision": {PPL: 18.0}, "merged": {PPL: 40.0}, "protocol": {}}
    folders = [write_run("before", "rtn", 90.0), write_run("after", "rtn", preprocess=RESTORED, results=document)]
    figure = variants_figure(results_of(collect(folders).runs), "method", [PPL])
    (axes,) = figure.axes
    (hollow,) = [line for line in axes.lines if line.get_markerfacecolor() == "none" and len(line.get_xdata())]
    assert [float(value) for value in hollow.get_xdata()] == [40.0]
    assert drawn(axes) == {"preprocess=none": [(90.0, 0)], "preprocess=restorative_lora": [(60.0, 0)]}
    assert figure.legends[0].get_texts()[-1].get_text() == "preprocessed, not quantized"


def test_methods_in_one_row_have_colours(before_and_after: list[Result]) -> None:
    figure = variants_figure(before_and_after, "preprocess", [PPL])
    assert rows(figure.axes[0]) == ["none", "restorative_lora"]
    assert drawn(figure.axes[0]) == {
        "rtn": [(500.0, 0), (400.0, 1)],
        "ptq161": [(90.0, 0), (60.0, 1)],
        "mask": [(200.0, 0)],
    }
    (legend,) = figure.legends
    assert {text.get_text() for text in legend.get_texts()} == {"full precision", "rtn", "ptq161", "mask"}


def test_what_differs_between_rows_alone_is_no_label(write_run: WriteRun) -> None:
    runs = [write_run("squad"), write_run("c4", calib={"name": "c4", "n_samples": 128})]
    figure = variants_figure(results_of(collect(runs).runs), "calib", [PPL])
    assert rows(figure.axes[0]) == ["squad", "c4"]
    (legend,) = figure.legends
    assert [text.get_text() for text in legend.get_texts()] == ["full precision"]


def test_a_panel_per_metric_with_intervals_and_full_precision(write_run: WriteRun) -> None:
    runs = [write_run(str(seed), seed=seed, ppl=100.0 + 10 * seed) for seed in (0, 1, 2)]
    ppl, acc = variants_figure(results_of(collect(runs).runs), "method", [PPL, ACC]).axes
    assert (ppl.get_xscale(), acc.get_xscale()) == ("log", "linear")
    (segment,) = ppl.containers[0].lines[2][0].get_segments()
    assert segment[:, 0].tolist() == [100.0, 120.0]
    (dashed,) = [line for line in acc.lines if line.get_linestyle() == "--"]
    assert set(dashed.get_xdata()) == {0.66}


def test_the_same_runs_give_the_same_bytes(before_and_after: list[Result]) -> None:
    one, other = (render(variants_figure(before_and_after, "method", [PPL])) for _ in range(2))
    assert one == other


def test_nothing_to_draw(write_run: WriteRun) -> None:
    full = results_of(collect([write_run("none", "none")]).runs)
    with pytest.raises(
        UserError, match=r"^no run has both method and one of ppl/boolq@512: there is nothing to draw\.$"
    ):
        variants_figure(full, "method", [PPL])


def test_the_program_draws_names_in_rows(write_run: WriteRun) -> None:
    folders = [write_run("squad"), write_run("c4", calib={"name": "c4", "n_samples": 128})]
    out = folders[0].parent / "out"
    assert main([*map(str, folders), "--out", str(out), "--x", "calib"]) == 0
    svg = (out / "figure.svg").read_text()
    assert all(f"<!-- {name} -->" in svg for name in ("squad", "c4", "calib", PPL))
