"""Charts of the report page: what a reader points at, zooms into and chooses from.

A chart is data, as plotly.js takes it: ``{"data": [traces], "layout": {...}}`` (https://plotly.com/javascript/reference).
Colours of text, axes and grid are the page's, light or dark, and set there.
"""

from __future__ import annotations

import itertools
import math
from collections.abc import Callable, Iterable, Mapping, Sequence
from typing import Any, TypeGuard

import matplotlib
from matplotlib.colors import to_hex

from ptq161.report.collect import FULL_PRECISION
from ptq161.report.details import Details, Grid
from ptq161.report.figures import COLORS, MOST_LINES, lines_of, method_colors, positions, spread
from ptq161.report.published import Published
from ptq161.report.results import Result, baselines, drawable, method_name, pareto_front
from ptq161.report.tables import metric_text, number_text, spread_text
from ptq161.tracking.metric_names import is_perplexity

Chart = dict[str, Any]

GREY = "#8a8f98"
READABLE = {"#000000": GREY, "#882255": "#b8487f"}
"""Colours of print -> those that are read on white and on black."""
SYMBOLS = ("circle", "square", "diamond", "triangle-up", "cross", "x", "star", "hexagon")
MOST_NOMINAL = 150
"""Results whose nominal bits are drawn from the start; of more, on request."""


def bits_chart(
    results: Sequence[Result], labels: Mapping[int, str], metric: str, published: Sequence[Published]
) -> Chart:
    """Draw a score against measured bits: nominal bits beside them, the Pareto front, full precision, intervals.

    Args:
        results: quantized and not.
        labels: ``id`` of a result -> what tells it from the others.
        metric: name of the score.
        published: figures of the same models and metrics.
    """
    rows = [r for r in results if r.method != FULL_PRECISION and r.bits is not None]
    rows = [r for r in rows if drawable(metric, r.metrics.get(metric))]
    models = {result.model for result in results}
    return _chart(
        [
            *_nominal(rows, metric),
            *_front(rows, metric),
            *_markers(rows, labels, metric, lambda row: row.bits, size=10 if len(rows) <= MOST_NOMINAL else 6),
            *_published([p for p in published if p.metric == metric and p.model in models]),
        ],
        *("bits per weight, measured", metric, is_perplexity(metric)),
        **_full_precision(results, metric),
    )


def sweep_chart(results: Sequence[Result], labels: Mapping[int, str], x: str, metric: str) -> Chart:
    """Draw a score against a swept key, a line for results that differ in nothing else, intervals as bars.

    More than ``MOST_LINES`` lines become points in their methods' colours.
    """
    rows = [r for r in results if r.value(x) is not None and drawable(metric, r.metrics.get(metric))]
    rows = [row for row in rows if row.method != FULL_PRECISION]
    places, are_numbers = positions([row.value(x) for row in rows])
    lines = lines_of(rows, x)

    def place(row: Result) -> Any:
        return row.value(x) if are_numbers else str(row.value(x))

    if len(lines) > MOST_LINES:
        traces = _markers(rows, labels, metric, place, size=6)
    else:
        traces = []
        for (text, line), color in zip(lines.items(), _endless(), strict=False):
            ordered = sorted(line, key=lambda row: places[str(row.value(x))])
            traces += [
                {
                    **_points(ordered, labels, metric, place),
                    **{"mode": "lines+markers", "name": text or method_name(line[0].method)},
                    **{"line": {"color": color}, "marker": {"color": color, "size": 8}},
                }
            ]
    models = {row.model for row in rows}
    return _chart(
        *(traces, x, metric, is_perplexity(metric)),
        **_full_precision([result for result in results if result.model in models], metric),
    )


def last_epoch_chart(runs: Sequence[Details]) -> Chart:
    """Draw each run's loss in its last epoch against the decoder block."""
    last = [(run.label, list(run.loss.values())[-1]) for run in runs]
    traces = [_line(text, values, color) for (text, values), color in zip(last, _endless(), strict=False)]
    return _chart(traces, "decoder block", "loss, last epoch", _is_positive(values for _, values in last))


def loss_chart(run: Details) -> Chart:
    """Draw one run's loss against the decoder block, a line an epoch."""
    shades = [to_hex(matplotlib.colormaps["viridis"](0.9 * (1 - i / len(run.loss)))) for i in range(len(run.loss))]
    traces = [_line(f"epoch {e}", values, color) for (e, values), color in zip(run.loss.items(), shades, strict=True)]
    return _chart(traces, "decoder block", "loss", _is_positive(run.loss.values()))


def preprocess_chart(runs: Sequence[Details]) -> Chart:
    """Draw the loss of the preprocessing against its steps, a line for each run and round."""
    traces = [
        _line(f"{run.label}, round {turn}", steps, color, mode="lines")
        for run, color in zip(runs, _endless(), strict=False)
        for turn, steps in run.preprocess_loss.items()
    ]
    return _chart(traces, "step", "preprocessing loss", is_log=False)


def heat_map(grid: Grid, bounds: tuple[float, float], name: str, *, is_log: bool) -> Chart:
    """Draw values of linears, a row for each kind of linear and a column for each decoder block.

    Args:
        grid: kind of linear -> block -> value.
        bounds: least and greatest value of all grids that are compared, positive where ``is_log``.
        name: of the values.
        is_log: colours follow the logarithm.
    """
    blocks = sorted({block for row in grid.values() for block in row})
    values = [[row.get(block) for block in blocks] for row in grid.values()]
    scale = math.log10 if is_log else float
    low, high = (scale(bound) for bound in bounds)
    ticks = [low + (high - low) * i / 4 for i in range(5)]
    trace = {
        **{"type": "heatmap", "x": blocks, "y": list(grid), "customdata": values},
        "z": [[scale(v) if _has_color(v, is_log) else None for v in row] for row in values],
        **{"zmin": low, "zmax": high, "colorscale": "Viridis", "xgap": 1, "ygap": 1},
        "colorbar": {
            "title": {"text": name, "side": "right"},
            "tickvals": ticks,
            "ticktext": [f"{10**tick:.2g}" if is_log else f"{tick:.3g}" for tick in ticks],
        },
        "hovertemplate": f"block %{{x}}, %{{y}}<br>{name} %{{customdata:.4g}}<extra></extra>",
    }
    chart = _chart([trace], "decoder block", "", is_log=False)
    chart["layout"]["xaxis"]["showgrid"] = False
    chart["layout"]["yaxis"] |= {"autorange": "reversed", "showgrid": False}
    return chart


def cost_chart(results: Sequence[Result], labels: Mapping[int, str]) -> Chart:
    """Draw seconds by stage, and the peak memory, as bars, a row a result."""
    names = _distinct([labels[id(result)] for result in results])
    stages = dict.fromkeys(stage for result in results for stage in result.seconds)
    traces: list[dict[str, Any]] = [
        {
            **{"type": "bar", "orientation": "h", "y": names, "name": stage, "marker": {"color": color}},
            "x": [result.seconds.get(stage) for result in results],
            "hovertemplate": f"%{{y}}<br>{stage} %{{x:.1f}} s<extra></extra>",
        }
        for stage, color in zip(stages, _endless(), strict=False)
    ]
    traces.append(
        {
            **{"type": "bar", "orientation": "h", "y": names, "marker": {"color": GREY}, "showlegend": False},
            **{"x": [(result.peak_memory_bytes or 0.0) / 1e9 for result in results], "xaxis": "x2"},
            "hovertemplate": "%{y}<br>peak %{x:.2f} GB<extra></extra>",
        }
    )
    chart = _chart(traces, "seconds", "", is_log=False)
    chart["layout"] |= {"barmode": "stack", "height": 150 + 26 * len(results), "bargap": 0.3}
    chart["layout"]["xaxis"]["domain"] = [0, 0.76]
    chart["layout"]["xaxis2"] = {"title": {"text": "peak GB"}, "domain": [0.8, 1], "anchor": "y"}
    chart["layout"]["yaxis"]["autorange"] = "reversed"
    return chart


def time_memory_chart(results: Sequence[Result], labels: Mapping[int, str]) -> Chart:
    """Draw the peak memory against the seconds of a run, a point a result."""
    rows = [r for r in results if r.total_seconds is not None and r.peak_memory_bytes is not None]
    traces = []
    for i, (method, color) in enumerate(_colors(rows).items()):
        mine = [row for row in rows if row.method == method]
        traces.append(
            {
                **{"type": "scatter", "mode": "markers", "name": method_name(method), "hoverinfo": "text+x+y"},
                "x": [row.total_seconds for row in mine],
                "y": [(row.peak_memory_bytes or 0.0) / 1e9 for row in mine],
                "marker": {"color": color, "symbol": SYMBOLS[i % len(SYMBOLS)], "size": 8},
                "hovertext": [labels[id(row)] for row in mine],
            }
        )
    return _chart(traces, "seconds", "peak memory in GB", is_log=False)


def block_seconds_chart(runs: Sequence[Details]) -> Chart:
    """Draw the seconds that each run took for each decoder block."""
    traces = [_line(run.label, run.seconds, color) for run, color in zip(runs, _endless(), strict=False)]
    return _chart(traces, "decoder block", "seconds", is_log=False)


def _chart(traces: list[dict[str, Any]], x: str, y: str, is_log: bool, **layout: Any) -> Chart:
    axis = {"type": "log", "exponentformat": "none"} if is_log else {}
    return {
        "data": traces,
        "layout": {
            **{"hovermode": "closest", "height": 440, "margin": {"l": 70, "r": 20, "t": 40, "b": 60}},
            "xaxis": {"title": {"text": x}, "zeroline": False},
            "yaxis": {"title": {"text": y}, "zeroline": False, "automargin": True, **axis},
            # The legend scrolls where many lines would leave no room for the chart.
            "legend": {"orientation": "h", "y": 1.02, "yanchor": "bottom", "x": 0, "maxheight": 110},
            **layout,
        },
    }


def _line(name: str, values: Mapping[int, float], color: str, mode: str = "lines+markers") -> dict[str, Any]:
    return {
        **{"type": "scatter", "x": list(values), "y": list(values.values()), "mode": mode, "name": name},
        **{"line": {"color": color, "width": 1.5}, "marker": {"color": color, "size": 4}},
        "hovertemplate": f"{name}<br>%{{x}}: %{{y:.4g}}<extra></extra>",
    }


def _points(
    rows: Sequence[Result], labels: Mapping[int, str], metric: str, place: Callable[[Result], Any]
) -> dict[str, Any]:
    ends = [spread(row.estimates[metric]) for row in rows]
    down, up = [end[0] for end in ends], [end[1] for end in ends]
    bars = {"type": "data", "symmetric": False, "array": up, "arrayminus": down, "thickness": 1, "visible": any(up)}
    return {
        **{"type": "scatter", "x": [place(row) for row in rows], "y": [row.metrics[metric] for row in rows]},
        **{"error_y": bars, "hoverinfo": "text", "hovertext": [_hover(row, labels[id(row)], metric) for row in rows]},
    }


def _markers(
    rows: Sequence[Result], labels: Mapping[int, str], metric: str, place: Callable[[Result], Any], size: int
) -> list[dict[str, Any]]:
    """Return a trace of points for each method."""
    return [
        {
            **_points([row for row in rows if row.method == method], labels, metric, place),
            **{"mode": "markers", "name": method_name(method)},
            "marker": {"color": color, "symbol": SYMBOLS[i % len(SYMBOLS)], "size": size},
        }
        for i, (method, color) in enumerate(_colors(rows).items())
    ]


def _front(rows: Sequence[Result], metric: str) -> list[dict[str, Any]]:
    """Return the Pareto front of each model as steps."""
    traces = []
    for model in dict.fromkeys(row.model for row in rows):
        front = pareto_front([row for row in rows if row.model == model], metric)
        traces.append(
            {
                **{"type": "scatter", "x": [row.bits for row in front], "y": [row.metrics[metric] for row in front]},
                **{"mode": "lines", "line": {"color": GREY, "width": 1.5, "dash": "dot", "shape": "hv"}},
                **{"name": "Pareto front", "legendgroup": "front", "hoverinfo": "skip"},
                "showlegend": model == rows[0].model,
            }
        )
    return traces


def _nominal(rows: Sequence[Result], metric: str) -> list[dict[str, Any]]:
    """Return the nominal bits as hollow points, and what joins them to the measured ones."""
    found = [(row.nominal_bits, row.bits, row.metrics[metric]) for row in rows if row.nominal_bits is not None]
    if not found:
        return []
    visible = True if len(rows) <= MOST_NOMINAL else "legendonly"
    common = {"type": "scatter", "legendgroup": "nominal", "visible": visible}
    return [
        {
            **{**common, "mode": "lines", "line": {"color": GREY, "width": 1}, "opacity": 0.6, "hoverinfo": "skip"},
            "x": [x for nominal, bits, _ in found for x in (nominal, bits, None)],
            "y": [y for _, _, value in found for y in (value, value, None)],
            "showlegend": False,
        },
        {
            **{**common, "mode": "markers", "marker": {"color": GREY, "symbol": "circle-open", "size": 7}},
            **{"x": [nominal for nominal, _, _ in found], "y": [value for _, _, value in found]},
            **{"name": "nominal bits", "hovertemplate": "nominal %{x:.2f} bits<extra></extra>"},
        },
    ]


def _published(points: Sequence[Published]) -> list[dict[str, Any]]:
    points = [p for p in points if p.method != FULL_PRECISION and drawable(p.metric, p.value)]
    trace = {
        **{"type": "scatter", "x": [p.bits for p in points], "y": [p.value for p in points], "mode": "markers"},
        **{"name": "published", "marker": {"color": GREY, "symbol": "diamond", "size": 7}, "hoverinfo": "text"},
        "hovertext": [f"{p.method}, {p.model}: {number_text(p.value)}<br>{p.source}, {p.table}" for p in points],
    }
    return [trace] if points else []


def _full_precision(results: Sequence[Result], metric: str) -> dict[str, Any]:
    """Return the part of a layout that shows full precision as dashed lines."""
    full = [r for r in baselines(results) if r.method == FULL_PRECISION and drawable(metric, r.metrics.get(metric))]
    levels = {(result.model, result.metrics[metric]): result for result in full}
    several = len({result.model for result in full}) > 1
    shapes, annotations = [], []
    for model, value in levels:
        place = {"type": "line", "x0": 0, "x1": 1, "xref": "paper", "y0": value, "y1": value}
        shapes.append({**place, "line": {"color": GREY, "width": 1.5, "dash": "dash"}})
        text = f"full precision{f', {model}' if several else ''} {metric_text(metric, value)}"
        # An annotation's place on a logarithmic axis is its logarithm, other than a line's.
        y = math.log10(value) if is_perplexity(metric) else value
        place = {"x": 1, "xref": "paper", "y": y, "xanchor": "right", "yanchor": "bottom"}
        annotations.append({**place, "text": text, "showarrow": False})
    return {"shapes": shapes, "annotations": annotations}


def _hover(result: Result, text: str, metric: str) -> str:
    found = result.estimates[metric]
    lines = [f"<b>{text}</b>", f"{metric} {metric_text(metric, found.value)} {spread_text(metric, found)}".strip()]
    if result.bits is not None:
        nominal = "" if result.nominal_bits is None else f", {number_text(result.nominal_bits)} nominal"
        lines.append(f"{number_text(result.bits)} bits measured{nominal}")
    if len(result.runs) > 1:
        lines.append(f"seeds {', '.join(map(str, result.seeds))}")
    if result.runs[0].run_dir:
        lines.append("/".join(result.runs[0].run_dir.parts[-3:]))
    return "<br>".join(lines)


def _colors(results: Sequence[Result]) -> dict[str, str]:
    return dict(zip(method_colors(results), _endless(), strict=False))


def _endless() -> Iterable[str]:
    return itertools.cycle(READABLE.get(color, color) for color in COLORS)


def _has_color(value: float | None, is_log: bool) -> TypeGuard[float]:
    return value is not None and math.isfinite(value) and (value > 0 or not is_log)


def _distinct(names: Sequence[str]) -> list[str]:
    """Make names distinct, since bars with the same name would be stacked."""
    seen: dict[str, int] = {}
    found = []
    for name in names:
        seen[name] = seen.get(name, 0) + 1
        found.append(name if seen[name] == 1 else f"{name} ({seen[name]})")
    return found


def _is_positive(groups: Iterable[Mapping[int, float]]) -> bool:
    return all(value > 0 for values in groups for value in values.values())
