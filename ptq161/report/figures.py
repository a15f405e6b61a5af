"""Figures of sweeps: a score against a swept key, and perplexity against measured bits."""

from __future__ import annotations

import io
import itertools
import math
from collections.abc import Sequence
from typing import Any

import matplotlib
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from matplotlib.ticker import FuncFormatter, NullFormatter

from ptq161.errors import UserError
from ptq161.report.collect import (
    FULL_PRECISION,
    Run,
    differing_keys,
    full_precision_runs,
    is_perplexity,
    quantized_runs,
)
from ptq161.report.published import Published
from ptq161.report.tables import method_name

COLORS = ("#0072B2", "#D55E00", "#009E73", "#CC79A7", "#E69F00", "#56B4E9", "#882255", "#000000")
"""Okabe and Ito's, and one of Tol's: told apart by the colour-blind as well."""
LABEL_SIZE = 8
"""Points of a label's letters."""


def sweep_figure(runs: Sequence[Run], x: str, metrics: Sequence[str]) -> Figure:
    """Draw scores against a swept key, a line per metric, full precision dashed, standard errors as bars.

    Perplexities, on a logarithmic axis, and accuracies have a panel each. Runs that differ in more than ``x`` have
    lines of their own.

    Args:
        runs: finished runs.
        x: a configured key, such as ``mask_ratio``; runs whose method does not read it are left out.
        metrics: names of scores.

    Raises:
        UserError: no run has both the key and a metric.
    """
    swept = [run for run in quantized_runs(runs) if run.value(x) is not None]
    full = full_precision_runs(runs)
    positions, are_numbers = _positions([run.value(x) for run in swept])
    panels = [[m for m in metrics if is_perplexity(m) is kind] for kind in (True, False)]
    panels = [panel for panel in panels if any(m in run.metrics for m in panel for run in swept)]
    if not panels:
        raise UserError(f"no run has both {x} and one of {', '.join(metrics)}: there is nothing to draw.")
    figure = _figure(len(panels))
    for axes, panel in zip(figure.subplots(1, len(panels), squeeze=False)[0], panels, strict=True):
        colors = itertools.cycle(COLORS)
        for metric in panel:
            for label, line in _lines(swept, x).items():
                color = next(colors)
                _draw_line(axes, line, positions, x, metric, f"{metric} {label}".strip(), color)
                _draw_full(axes, [run for run in full if run.model == line[0].model], metric, color)
        if any(metric in run.metrics for run in full for metric in panel):
            axes.plot([], [], color="grey", linestyle="--", label="full precision")
        if not are_numbers:
            axes.set_xticks(list(positions.values()), list(positions))
        axes.set_xlabel(x)
        _score_axis(axes, panel[0])
        axes.legend(frameon=False, fontsize="small")
    return figure


def bits_figure(runs: Sequence[Run], metrics: Sequence[str], published: Sequence[Published] = ()) -> Figure:
    """Draw scores against measured bits per weight, a labelled point per run and a panel per metric.

    A faint circle, joined to the point, is at the bits that the method's paper counts. Full precision is a dashed line.

    Args:
        runs: finished runs.
        metrics: names of scores.
        published: figures that are drawn as grey diamonds where model and metric match.

    Raises:
        UserError: no quantized run has one of the metrics.
    """
    quantized = [run for run in quantized_runs(runs) if run.bits is not None]
    shown = [metric for metric in metrics if any(metric in run.metrics for run in quantized)]
    if not shown:
        raise UserError(f"no quantized run has one of {', '.join(metrics) or 'any metrics'}: there is nothing to draw.")
    keys = differing_keys(quantized)
    names = {run.model for run in runs}
    methods = list(dict.fromkeys(run.method for run in quantized))
    figure = _figure(len(shown))
    panels = figure.subplots(1, len(shown), squeeze=False)[0]
    labels: dict[str, list[tuple[float, float, str, str]]] = {metric: [] for metric in shown}
    for axes, metric in zip(panels, shown, strict=True):
        for run in quantized:
            if run.bits is not None and _drawable(metric, value := run.metrics.get(metric, math.nan)):
                color = COLORS[methods.index(run.method) % len(COLORS)]
                _draw_nominal(axes, run, value, color)
                axes.plot([run.bits], [value], "o", color=color)
                labels[metric].append((run.bits, value, _label(run, keys), color))
        points = [p for p in published if p.metric == metric and p.model in names and p.method != FULL_PRECISION]
        for point in points:
            if _drawable(metric, point.value):
                axes.plot([point.bits], [point.value], "D", color="grey", markersize=4)
                labels[metric].append((point.bits, point.value, point.method, "grey"))
        _draw_full(axes, full_precision_runs(runs), metric, "black", "full precision")
        axes.set_xlabel(f"measured bits per weight (faint: nominal{'; grey: published' if points else ''})")
        _score_axis(axes, metric)
        axes.margins(x=0.25, y=0.1)
    figure.draw_without_rendering()  # where a point is on the page is known only after this
    for axes, metric in zip(panels, shown, strict=True):
        _write_labels(axes, labels[metric])
    return figure


def render(figure: Figure, kind: str) -> bytes:
    """Return a figure as ``svg`` or ``png``; the same figure gives the same bytes."""
    stream = io.BytesIO()
    # Without these, an SVG holds the date and random names.
    with matplotlib.rc_context({"svg.hashsalt": "ptq161"}):
        figure.savefig(stream, format=kind, dpi=150, metadata={"Date": None} if kind == "svg" else {})
    return stream.getvalue()


def _figure(n_panels: int) -> Figure:
    return Figure(figsize=(1 + 5.2 * n_panels, 4.2), layout="constrained")


def _positions(values: Sequence[Any]) -> tuple[dict[str, float], bool]:
    """Return where on the axis each value is, by its text, and whether they are numbers, which have places already."""
    if all(isinstance(value, int | float) and not isinstance(value, bool) for value in values):
        return {str(value): float(value) for value in values}, True
    return {text: float(i) for i, text in enumerate(dict.fromkeys(map(str, values)))}, False


def _lines(runs: Sequence[Run], x: str) -> dict[str, list[Run]]:
    """Group runs that differ in nothing but ``x``, each group with a label that tells it from the others."""
    keys = [key for key in differing_keys(runs) if key != x]
    lines: dict[str, list[Run]] = {}
    several_methods = len({run.method for run in runs}) > 1 and x != "method"
    several_models = len({run.model for run in runs}) > 1 and x != "model"
    for run in runs:
        label = [run.method] * several_methods + [run.model] * several_models
        label += [f"{key}={run.value(key)}" for key in keys if run.value(key) is not None]
        lines.setdefault(" ".join(label), []).append(run)
    return lines


def _draw_line(
    axes: Axes, runs: Sequence[Run], positions: dict[str, float], x: str, metric: str, label: str, color: str
) -> None:
    points = sorted(
        (positions[str(run.value(x))], run.metrics[metric], run.standard_errors.get(metric))
        for run in runs
        if _drawable(metric, run.metrics.get(metric, math.nan))
    )
    if not points:
        return
    places, values, errors = zip(*points, strict=True)
    axes.errorbar(
        places,
        values,
        yerr=[error or 0.0 for error in errors],
        fmt="o-",
        color=color,
        label=label,
        capsize=2,
        markersize=4,
    )


def _draw_full(axes: Axes, full: Sequence[Run], metric: str, color: str, label: str | None = None) -> None:
    for run in full:
        if _drawable(metric, value := run.metrics.get(metric, math.nan)):
            axes.axhline(value, color=color, linestyle="--", linewidth=1, alpha=0.7)
            if label:
                place = (0.99, value)
                axes.annotate(label, place, (0, 3), ("axes fraction", "data"), "offset points", ha="right", fontsize=8)


def _draw_nominal(axes: Axes, run: Run, value: float, color: str) -> None:
    if run.bits is not None and run.nominal_bits is not None:
        axes.plot([run.nominal_bits, run.bits], [value, value], "-", color=color, alpha=0.3, linewidth=1)
        axes.plot([run.nominal_bits], [value], "o", color=color, alpha=0.35, markerfacecolor="none")


def _drawable(metric: str, value: float) -> bool:
    return math.isfinite(value) and (value > 0 or not is_perplexity(metric))


def _score_axis(axes: Axes, metric: str) -> None:
    axes.spines[["top", "right"]].set_visible(False)
    axes.grid(axis="y", alpha=0.25)
    if not is_perplexity(metric):
        axes.set_ylabel("accuracy" if axes.get_legend_handles_labels()[0] else metric)
        return
    axes.set_ylabel("perplexity" if axes.get_legend_handles_labels()[0] else metric)
    axes.set_yscale("log")
    low, high = axes.get_ylim()
    plain = FuncFormatter(lambda value, _: f"{value:g}")
    axes.yaxis.set_major_formatter(plain)
    # Within a decade the major ticks alone may be none.
    axes.yaxis.set_minor_formatter(plain if high < 20 * low else NullFormatter())


def _label(run: Run, keys: Sequence[str]) -> str:
    values = [f"{key}={run.value(key)}" for key in keys if run.value(key) is not None]
    return " ".join([method_name(run.method), *values])


def _write_labels(axes: Axes, labels: Sequence[tuple[float, float, str, str]]) -> None:
    """Write labels (x, y, text, colour) beside their points, each as near as those before it leave room."""
    height, placed = 1.3 * LABEL_SIZE, list[tuple[float, float, float]]()
    for x, y, text, color in sorted(labels, key=lambda entry: entry[1]):
        # transData is in pixels at the figure's resolution, labels in points.
        left, level = axes.transData.transform((x, y)) * 72 / axes.figure.dpi
        right = left + 0.6 * LABEL_SIZE * len(text)
        blocked = [at for begin, end, at in placed if begin < right and left < end]
        shifts = sorted((sign * step * height / 4 for step in range(200) for sign in (1, -1)), key=abs)
        shift = next((s for s in shifts if all(abs(level + s - at) >= height for at in blocked)), 0.0)
        placed.append((left, right, level + shift))
        offset = (6, shift - 0.4 * LABEL_SIZE)
        axes.annotate(text, (x, y), offset, textcoords="offset points", fontsize=LABEL_SIZE, color=color)
