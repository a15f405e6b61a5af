"""Figures of sweeps for print: a score against a swept key, and perplexity against measured bits."""

from __future__ import annotations

import io
import itertools
import math
from collections.abc import Sequence
from typing import Any, Literal

import matplotlib
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from matplotlib.ticker import FuncFormatter, NullFormatter

from ptq161.errors import UserError
from ptq161.report.collect import FULL_PRECISION
from ptq161.report.published import Published
from ptq161.report.results import Result, baselines, differing_keys, drawable, labels, pareto_front, quantized
from ptq161.report.seeds import Estimate
from ptq161.tracking.metric_names import is_perplexity

COLORS = ("#0072B2", "#D55E00", "#009E73", "#CC79A7", "#E69F00", "#56B4E9", "#882255", "#000000")
"""Okabe and Ito's, and one of Tol's: told apart by the colour-blind as well."""
LABEL_SIZE = 8
"""Points of a label's letters."""
MOST_LABELS = 40
"""Points that are labelled; more are told by their method's colour alone."""
LONGEST_LABEL = 40
"""Letters that leave room for the axes."""
MOST_LINES = 12
"""Lines that are told apart in one panel."""


def sweep_figure(results: Sequence[Result], x: str, metrics: Sequence[str]) -> Figure:
    """Draw scores against a swept number, a line per metric, full precision dashed, intervals or errors as bars.

    Perplexities, on a logarithmic axis, and accuracies have a panel each. Results that differ in more than ``x`` have
    lines of their own; more than ``MOST_LINES`` of these become points in their methods' colours.

    Args:
        results: to draw.
        x: a configured key whose values are numbers, such as ``mask_ratio``; results whose method does not read it are
            left out.
        metrics: names of scores.

    Raises:
        UserError: no result has both the key and a metric.
    """
    swept = [result for result in quantized(results) if result.value(x) is not None]
    full = baselines(results)
    places, _ = positions([result.value(x) for result in swept])
    panels = [[m for m in metrics if is_perplexity(m) is kind] for kind in (True, False)]
    panels = [panel for panel in panels if any(m in result.metrics for m in panel for result in swept)]
    if not panels:
        raise UserError(f"no run has both {x} and one of {', '.join(metrics)}: there is nothing to draw.")
    lines = lines_of(swept, x)
    if not (are_lines := len(lines) <= MOST_LINES):
        lines = {method: [r for r in swept if r.method == method] for method in dict.fromkeys(r.method for r in swept)}
    figure = new_figure(len(panels))
    for axes, panel in zip(figure.subplots(1, len(panels), squeeze=False)[0], panels, strict=True):
        colors = itertools.cycle(COLORS)
        for metric in panel:
            drawn = set[tuple[str, float]]()
            for text, line in lines.items():
                color = next(colors)
                _draw_line(axes, line, places, x, metric, f"{metric} {text}".strip(), color, are_lines)
                mine = [
                    r for r in full if r.model == line[0].model and (r.model, r.metrics.get(metric, 0)) not in drawn
                ]
                drawn |= {(result.model, result.metrics.get(metric, 0)) for result in mine}
                _draw_full(axes, mine, metric, color if are_lines else "grey")
        if any(metric in result.metrics for result in full for metric in panel):
            axes.plot([], [], color="grey", linestyle="--", label="full precision")
        axes.set_xlabel(x)
        is_log = is_perplexity(panel[0])
        score_axis(axes, "perplexity" if is_log else "accuracy", is_log)
        axes.legend(frameon=False, fontsize="small", loc="best" if are_lines else "upper right")
    return figure


def bits_figure(results: Sequence[Result], metrics: Sequence[str], published: Sequence[Published] = ()) -> Figure:
    """Draw scores against measured bits per weight, a labelled point per result and a panel per metric.

    A faint circle, joined to the point, is at the bits that the method's paper counts. Full precision is a dashed line,
    the Pareto front a dotted one.

    Args:
        results: to draw.
        metrics: names of scores.
        published: figures that are drawn as grey diamonds where model and metric match.

    Raises:
        UserError: no quantized result has one of the metrics.
    """
    rows = [result for result in quantized(results) if result.bits is not None]
    shown = [metric for metric in metrics if any(metric in result.metrics for result in rows)]
    if not shown:
        raise UserError(f"no quantized run has one of {', '.join(metrics) or 'any metrics'}: there is nothing to draw.")
    figure = new_figure(len(shown))
    panels = figure.subplots(1, len(shown), squeeze=False)[0]
    texts = {
        metric: _draw_bits(axes, results, rows, metric, published) for axes, metric in zip(panels, shown, strict=True)
    }
    figure.draw_without_rendering()  # where a point is on the page is known only after this
    for axes, metric in zip(panels, shown, strict=True):
        _write_labels(axes, texts[metric])
    return figure


def render(figure: Figure) -> dict[str, bytes]:
    """Return a figure as ``svg`` and ``png``; the same figure gives the same bytes."""
    figure.draw_without_rendering()
    # The layout takes as long as the drawing: once is enough for both.
    figure.set_layout_engine("none")
    files = {}
    for kind in ("svg", "png"):
        stream = io.BytesIO()
        # Without these, an SVG holds the date and random names.
        with matplotlib.rc_context({"svg.hashsalt": "ptq161"}):
            figure.savefig(stream, format=kind, dpi=150, metadata={"Date": None} if kind == "svg" else {})
        files[kind] = stream.getvalue()
    return files


def new_figure(n_panels: int, height: float = 4.2) -> Figure:
    """Return an empty figure for panels side by side; ``height`` is in inches."""
    return Figure(figsize=(1 + 5.2 * n_panels, height), layout="constrained")


def positions(values: Sequence[Any]) -> tuple[dict[str, float], bool]:
    """Return where on the axis each value is, by its text, and whether they are numbers, which have places already."""
    if all(isinstance(value, int | float) and not isinstance(value, bool) for value in values):
        return {str(value): float(value) for value in values}, True
    return {text: float(i) for i, text in enumerate(dict.fromkeys(map(str, values)))}, False


def lines_of(results: Sequence[Result], x: str) -> dict[str, list[Result]]:
    """Group results that differ in nothing but ``x``, each group with a label that tells it from the others.

    Results that have no partner to be joined to are left out, where others have.
    """
    lines = _grouped(results, x)
    joined = [line for line in lines.values() if len({str(result.value(x)) for result in line}) > 1]
    if not joined or len(joined) == len(lines):
        return lines
    return _grouped([result for line in joined for result in line], x)


def spread(found: Estimate) -> tuple[float, float]:
    """Return how far a value reaches down and up: to the ends of its interval, or by its standard error."""
    if found.low is not None and found.high is not None:
        return max(found.value - found.low, 0.0), max(found.high - found.value, 0.0)
    return found.standard_error or 0.0, found.standard_error or 0.0


def method_colors(results: Sequence[Result]) -> dict[str, str]:
    """Return a colour for each method, in the order in which they occur."""
    methods = dict.fromkeys(result.method for result in results)
    return dict(zip(methods, itertools.cycle(COLORS), strict=False))


def _grouped(results: Sequence[Result], x: str) -> dict[str, list[Result]]:
    keys = [key for key in differing_keys(results) if key != x]
    several_methods = len({result.method for result in results}) > 1 and x != "method"
    several_models = len({result.model for result in results}) > 1 and x != "model"
    lines: dict[str, list[Result]] = {}
    for result in results:
        parts = [result.method] * several_methods + [result.model] * several_models
        parts += [f"{key}={result.value(key)}" for key in keys if result.value(key) is not None]
        lines.setdefault(" ".join(parts), []).append(result)
    return lines


def _draw_line(
    axes: Axes,
    results: Sequence[Result],
    places: dict[str, float],
    x: str,
    metric: str,
    text: str,
    color: str,
    is_line: bool,
) -> None:
    points = sorted(
        (places[str(result.value(x))], result.metrics[metric], *spread(result.estimates[metric]))
        for result in results
        if drawable(metric, result.metrics.get(metric))
    )
    if not points:
        return
    at, values, down, up = zip(*points, strict=True)
    form = "o-" if is_line else "o"
    axes.errorbar(at, values, yerr=[down, up], fmt=form, color=color, label=text, capsize=2, markersize=4)


def _draw_bits(
    axes: Axes, results: Sequence[Result], rows: Sequence[Result], metric: str, published: Sequence[Published]
) -> list[tuple[float, float, str, str]]:
    """Draw one panel; return labels (x, y, text, colour) that are still to be written beside the points."""
    names = {id(result): text for result, text in zip(rows, labels(rows), strict=True)}
    colors, texts = method_colors(rows), list[tuple[float, float, str, str]]()
    drawn = [result for result in rows if drawable(metric, result.metrics.get(metric))]
    for method, color in colors.items():
        mine = [
            (r.bits or 0.0, r.metrics[metric], *spread(r.estimates[metric]), r) for r in drawn if r.method == method
        ]
        for bits, value, _, _, result in mine:
            if len(drawn) <= MOST_LABELS:
                _draw_nominal(axes, result, value, color)
            texts.append((bits, value, names[id(result)], color))
        if mine:
            at, values, down, up, _ = zip(*mine, strict=True)
            axes.plot(at, values, "o", color=color, label=method)
            if any(len(result.runs) > 1 for *_, result in mine):
                axes.errorbar(at, values, yerr=[down, up], fmt="none", ecolor=color, capsize=2)
    if len(texts) > MOST_LABELS or any(len(text) > LONGEST_LABEL for _, _, text, _ in texts):
        # The best place for a legend takes long to find among many points.
        place: Literal["best", "upper right"] = "best" if len(texts) <= MOST_LABELS else "upper right"
        texts.clear()
        axes.legend(frameon=False, fontsize="small", loc=place)
    for model in dict.fromkeys(result.model for result in drawn):
        front = pareto_front([result for result in drawn if result.model == model], metric)
        axes.plot([r.bits or 0.0 for r in front], [r.metrics[metric] for r in front], ":", color="grey", zorder=0)
    models = {result.model for result in results}
    points = [p for p in published if p.metric == metric and p.model in models and p.method != FULL_PRECISION]
    for point in points:
        if drawable(metric, point.value):
            axes.plot([point.bits], [point.value], "D", color="grey", markersize=4)
            texts.append((point.bits, point.value, point.method, "grey"))
    _draw_full(axes, baselines(results), metric, "black", "full precision")
    axes.set_xlabel(f"measured bits per weight (faint: nominal{'; grey: published' if points else ''})")
    score_axis(axes, metric, is_perplexity(metric))
    axes.margins(x=0.25, y=0.1)
    return texts


def _draw_full(axes: Axes, full: Sequence[Result], metric: str, color: str, text: str | None = None) -> None:
    for result in full:
        if result.method == FULL_PRECISION and drawable(metric, value := result.metrics.get(metric, math.nan)):
            axes.axhline(value, color=color, linestyle="--", linewidth=1, alpha=0.7)
            if text:
                place = (0.99, value)
                axes.annotate(text, place, (0, 3), ("axes fraction", "data"), "offset points", ha="right", fontsize=8)


def _draw_nominal(axes: Axes, result: Result, value: float, color: str) -> None:
    if result.bits is not None and result.nominal_bits is not None:
        axes.plot([result.nominal_bits, result.bits], [value, value], "-", color=color, alpha=0.3, linewidth=1)
        axes.plot([result.nominal_bits], [value], "o", color=color, alpha=0.35, markerfacecolor="none")


def score_axis(axes: Axes, name: str, is_log: bool, *, horizontal: bool = False) -> None:
    """Dress the axis of a score, the vertical one by default; one that is logarithmic has plain numbers."""
    axis = axes.xaxis if horizontal else axes.yaxis
    axes.spines[["top", "right"]].set_visible(False)
    axis.grid(alpha=0.25)
    axis.set_label_text(name)
    if not is_log:
        return
    (axes.set_xscale if horizontal else axes.set_yscale)("log")
    low, high = axes.get_xlim() if horizontal else axes.get_ylim()
    plain = FuncFormatter(lambda value, _: f"{value:g}")
    axis.set_major_formatter(plain)
    # Within a decade the major ticks alone may be none; side by side there is room for fewer of the others.
    axis.set_minor_formatter(plain if high < (3 if horizontal else 20) * low else NullFormatter())


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
