"""What is drawn where."""

from __future__ import annotations

import itertools

import pytest
from matplotlib.figure import Figure

from ptq161.errors import UserError
from ptq161.report.collect import collect
from ptq161.report.figures import MOST_LABELS, bits_figure, render, sweep_figure
from ptq161.report.published import Published
from ptq161.report.results import Result, results_of
from tests.report.conftest import WriteRun

PPL, ACC = "ppl/boolq@512", "zero_shot/piqa/acc"


@pytest.fixture
def sweep(write_run: WriteRun) -> list[Result]:
    """The ratios out of order, as a user may type them."""
    ratios = {0.2: 60.0, 0.0: 900.0, 0.3: 40.0}
    return results_of(collect([write_run(str(r), mask_ratio=r, ppl=ppl) for r, ppl in ratios.items()]).runs)


def texts(figure: Figure) -> set[str]:
    return {text.get_text() for axes in figure.axes for text in axes.texts}


def test_a_sweep_is_a_line_per_metric_over_full_precision(sweep: list[Result]) -> None:
    figure = sweep_figure(sweep, "mask_ratio", [ACC, PPL])
    ppl, acc = figure.axes
    assert (ppl.get_yscale(), acc.get_yscale(), ppl.get_xlabel()) == ("log", "linear", "mask_ratio")
    (line,) = [container.lines[0] for container in ppl.containers]
    assert line.get_xydata().tolist() == [[0.0, 900.0], [0.2, 60.0], [0.3, 40.0]]
    (dashed,) = [line for line in ppl.lines if line.get_linestyle() == "--" and len(line.get_ydata())]
    assert set(dashed.get_ydata()) == {18.0}
    assert ppl.get_legend_handles_labels()[1] == ["full precision", PPL]
    low, high = ppl.get_ylim()
    assert low < 18 and high > 900


def test_runs_that_differ_in_more_have_lines_of_their_own(write_run: WriteRun) -> None:
    folders = [write_run(f"{r} {b}", mask_ratio=r, block_size=b) for r in (0.1, 0.2) for b in (1, 2)]
    runs = results_of(collect([*folders, write_run("rtn", "rtn")]).runs)
    (axes,) = sweep_figure(runs, "mask_ratio", [PPL]).axes
    assert axes.get_legend_handles_labels()[1] == ["full precision", f"{PPL} block_size=1", f"{PPL} block_size=2"]


def test_seeds_are_one_line_with_bars(write_run: WriteRun) -> None:
    folders = [write_run(f"{r} {s}", mask_ratio=r, seed=s, ppl=100 + 10 * s) for r in (0.1, 0.2) for s in (0, 1, 2)]
    (axes,) = sweep_figure(results_of(collect(folders).runs), "mask_ratio", [PPL]).axes
    assert axes.get_legend_handles_labels()[1] == ["full precision", PPL]
    (container,) = axes.containers
    assert container.lines[0].get_ydata().tolist() == [110.0, 110.0]
    assert [segment[:, 1].tolist() for segment in container.lines[2][0].get_segments()] == [[100.0, 120.0]] * 2


def test_a_perplexity_that_is_not_finite_is_not_drawn(write_run: WriteRun) -> None:
    runs = results_of(collect([write_run("a", ppl=float("inf"), mask_ratio=0.1), write_run("b")]).runs)
    (axes,) = sweep_figure(runs, "mask_ratio", [PPL]).axes
    assert axes.containers[0].lines[0].get_xydata().tolist() == [[0.2, 100.0]]
    assert render(bits_figure(runs, [PPL]))["png"].startswith(b"\x89PNG")


def test_bits_against_perplexity(write_run: WriteRun) -> None:
    methods = {"rtn": (565.0, 2.05), "billm": (70.0, 2.9), "ptq161": (50.0, 1.72)}
    runs = results_of(collect([write_run(name, name, *values) for name, values in methods.items()]).runs)
    point = Published("A paper", "", "tiny", "nanoquant", "1.00", 1.02, PPL, 30.0)
    foreign = Published("A paper", "", "other", "billm", "1.1", None, PPL, 30.0)
    figure = bits_figure(runs, [PPL], [point, foreign])
    (axes,) = figure.axes
    assert axes.get_yscale() == "log"
    assert axes.get_xlabel().endswith("grey: published)")
    assert texts(figure) == {*methods, "nanoquant", "full precision"}
    drawn = [tuple(line.get_xydata()[0]) for line in axes.lines if line.get_marker() in ("o", "D")]
    for ppl, bits in methods.values():
        assert (bits, ppl) in drawn and (1.6, ppl) in drawn  # the nominal bits beside the measured ones
    assert (1.02, 30.0) in drawn


def test_labels_of_equal_points_are_apart(write_run: WriteRun) -> None:
    runs = results_of(collect([write_run(name, name, 100.0, 2.0) for name in ("rtn", "gptq", "awq")]).runs)
    figure = bits_figure(runs, [PPL])
    heights = sorted(text.xyann[1] for text in figure.axes[0].texts if text.get_text() in ("rtn", "gptq", "awq"))
    assert all(above - below >= 9 for below, above in itertools.pairwise(heights))


def test_more_points_than_one_reads_have_a_legend_instead_of_labels(sweep: list[Result]) -> None:
    figure = bits_figure(sweep * MOST_LABELS, [PPL])
    assert texts(figure) == {"full precision"}
    assert [text.get_text() for text in figure.axes[0].get_legend().get_texts()] == ["ptq161"]


def test_runs_of_one_method_are_told_apart(sweep: list[Result]) -> None:
    assert "ptq161 mask_ratio=0.3" in texts(bits_figure(sweep, [PPL]))


def test_the_same_runs_give_the_same_file(sweep: list[Result]) -> None:
    assert render(sweep_figure(sweep, "mask_ratio", [PPL])) == render(sweep_figure(sweep, "mask_ratio", [PPL]))


def test_nothing_to_draw(write_run: WriteRun) -> None:
    runs = results_of(collect([write_run("rtn", "rtn")]).runs)
    with pytest.raises(UserError, match="no run has both mask_ratio and one of ppl/boolq@512"):
        sweep_figure(runs, "mask_ratio", [PPL])
    with pytest.raises(UserError, match="no quantized run has one of ppl/other"):
        bits_figure(runs, ["ppl/other"])
