"""Figures of unlike variants: a row for each, as their names have no place on an axis of numbers."""

from __future__ import annotations

import itertools
from collections.abc import Sequence

from matplotlib.axes import Axes
from matplotlib.figure import Figure
from matplotlib.lines import Line2D

from ptq161.errors import UserError
from ptq161.report.collect import FULL_PRECISION, MERGED
from ptq161.report.figures import COLORS, new_figure, score_axis, spread
from ptq161.report.results import Result, baselines, differing_keys, drawable, quantized
from ptq161.tracking.metric_names import is_perplexity

ROW_HEIGHT = 0.35
"""Inches."""
SPREAD = 0.3
"""Share of a row over which its colours are spread, so that none hides another."""


def variants_figure(results: Sequence[Result], x: str, metrics: Sequence[str]) -> Figure:
    """Draw scores in a row per value of ``x``, with a panel per metric; full precision is a dashed line.

    Results that share a row have colours by what else they differ in. Of methods, the row is the quantizer's alone:
    with and without preprocessing are colours. A hollow point is a preprocessed model before it is quantized.

    Args:
        results: to draw.
        x: a configured key whose values are names, such as ``method``; results whose method does not read it are left
            out.
        metrics: names of scores.

    Raises:
        UserError: no result has both the key and a metric.
    """
    rows = [result for result in quantized(results) if result.value(x) is not None]
    shown = [metric for metric in metrics if any(metric in result.metrics for result in rows)]
    if not shown:
        raise UserError(f"no run has both {x} and one of {', '.join(metrics)}: there is nothing to draw.")
    names = list(dict.fromkeys(_row(result, x) for result in rows))
    full = [result for result in baselines(results) if result.method == FULL_PRECISION]
    groups = _groups(rows, x)
    shifts = [SPREAD * ((i + 0.5) / len(groups) - 0.5) for i in range(len(groups))]
    figure = new_figure(len(shown), height=1.5 + ROW_HEIGHT * len(names))
    panels = figure.subplots(1, len(shown), squeeze=False, sharey=True)[0]
    for axes, metric in zip(panels, shown, strict=True):
        for color, shift, (text, group) in zip(itertools.cycle(COLORS), shifts, groups.items(), strict=False):
            places = [names.index(_row(result, x)) + shift for result in group]
            _draw(axes, group, places, metric, text, color)
        for result in full:
            if drawable(metric, result.metrics.get(metric)):
                axes.axvline(result.metrics[metric], color="grey", linestyle="--", linewidth=1, label="full precision")
        score_axis(axes, metric, is_perplexity(metric), horizontal=True)
    panels[0].set_yticks(range(len(names)), names)
    panels[0].set_ylim(len(names) - 0.5, -0.5)
    panels[0].set_ylabel(x)
    entries = {text: handle for handle, text in zip(*panels[0].get_legend_handles_labels(), strict=True) if text}
    if any(run.merged for result in rows for run in result.runs):
        entries[f"preprocessed{MERGED}"] = Line2D([], [], marker="o", mfc="none", color="grey", linestyle="")
    if entries:
        columns = 2 if len(shown) == 1 else 4
        figure.legend(
            entries.values(), entries, loc="outside upper right", ncols=columns, frameon=False, fontsize="small"
        )
    return figure


def _draw(axes: Axes, results: Sequence[Result], places: Sequence[float], metric: str, text: str, color: str) -> None:
    points = [
        (result.metrics[metric], place, *spread(result.estimates[metric]))
        for result, place in zip(results, places, strict=True)
        if drawable(metric, result.metrics.get(metric))
    ]
    if points:
        values, at, down, up = zip(*points, strict=True)
        axes.errorbar(values, at, xerr=[down, up], fmt="o", color=color, label=text, capsize=2, markersize=5)
    merged = [
        (run.merged[metric], place)
        for result, place in zip(results, places, strict=True)
        for run in result.runs
        if drawable(metric, run.merged.get(metric))
    ]
    if merged:
        axes.plot(*zip(*merged, strict=True), "o", mfc="none", color=color, markersize=5)


def _row(result: Result, x: str) -> str:
    return _quantizer(result) if x == "method" else str(result.value(x))


def _quantizer(result: Result) -> str:
    return str(result.runs[0].config.get("method.name", result.method))


def _groups(results: Sequence[Result], x: str) -> dict[str, list[Result]]:
    """Group results by what tells those of one row apart: what differs between rows alone belongs to the row."""
    rows: dict[str, list[Result]] = {}
    for result in results:
        rows.setdefault(_row(result, x), []).append(result)
    keys = dict.fromkeys(key for row in rows.values() for key in differing_keys(row) if key != x)
    several_quantizers = any(len({_quantizer(result) for result in row}) > 1 for row in rows.values())
    several_models = any(len({result.model for result in row}) > 1 for row in rows.values())
    groups: dict[str, list[Result]] = {}
    for result in results:
        parts = [_quantizer(result)] * several_quantizers + [result.model] * (several_models and x != "model")
        parts += [f"{key}={result.value(key)}" for key in keys if result.value(key) is not None]
        groups.setdefault(" ".join(parts), []).append(result)
    return groups
