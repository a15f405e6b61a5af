"""The look that all figures share: colors, panels, legend. Colors of text, axes and grid are those of page or print."""

from __future__ import annotations

import math
from collections.abc import Iterable, Sequence
from typing import Any

import plotly.graph_objects as go
from plotly.subplots import make_subplots

from ptq161.tracking.metric_names import is_perplexity

COLORS = ("#0072B2", "#D55E00", "#009E73", "#CC79A7", "#E69F00", "#56B4E9", "#B8487F", "#999933")
"""Okabe and Ito's, and two of Tol's: told apart by the color-blind as well, and read on white and on black."""
GRAY = "#8a8f98"
SYMBOLS = ("circle", "square", "diamond", "triangle-up", "cross", "x", "star", "hexagon")
_HEIGHT = 440
"""Pixels of a row of panels."""
_MOST_COLUMNS = 3
_MOST_STEPPED = 3000
"""Range of a logarithmic axis up to which there is room for steps between the powers of ten."""
_TEMPLATE = go.layout.Template(
    layout={
        "hovermode": "closest",
        "margin": {"l": 70, "r": 20, "t": 40, "b": 60},
        "xaxis": {"zeroline": False, "automargin": True, "title": {"standoff": 8}},
        "yaxis": {"zeroline": False, "automargin": True, "title": {"standoff": 8}},
        # The legend scrolls where many lines would leave no room for the chart.
        "legend": {"orientation": "h", "y": 1.02, "yanchor": "bottom", "x": 0, "maxheight": 110},
    },
    data={"scatter": [{"error_x": {"thickness": 1, "width": 3}, "error_y": {"thickness": 1, "width": 3}}]},
)


def cycled(names: Iterable[str], values: Sequence[str] = COLORS) -> dict[str, str]:
    """Return a color, or a symbol, for each distinct name in the order in which they occur."""
    return {name: values[i % len(values)] for i, name in enumerate(dict.fromkeys(names))}


def panels(n: int, *, height: int = _HEIGHT, **settings: Any) -> go.Figure:
    """Return an empty figure for ``n`` panels, three in a row.

    Args:
        n: at least 1.
        height: of a row, in pixels.
        settings: of :func:`plotly.subplots.make_subplots`.
    """
    n_rows = math.ceil(n / _MOST_COLUMNS)
    empty = go.Figure(layout={"template": _TEMPLATE, "height": height * n_rows})
    if n == 1:  # a grid of one panel says nothing, and takes ten times as long
        return empty
    return make_subplots(n_rows, min(n, _MOST_COLUMNS), vertical_spacing=0.3 / n_rows, figure=empty, **settings)


def add(figure: go.Figure, i: int, traces: Sequence[Any], x: dict[str, Any], y: dict[str, Any]) -> go.Figure:
    """Add traces to panel ``i``, and a legend entry for each name of a trace that the figure does not have yet.

    Args:
        figure: of :func:`panels`; is changed.
        i: number of the panel.
        traces: to add, but for those without points.
        x: settings of the panel's horizontal axis.
        y: settings of its vertical axis.
    """
    has_grid = "xaxis2" in figure.layout
    row, column = (i // _MOST_COLUMNS + 1, i % _MOST_COLUMNS + 1) if has_grid else (None, None)
    traces = [trace for trace in traces if len(trace.x)]
    seen = {"", None} | {trace.name for trace in figure.data}
    for trace in traces:
        if trace.showlegend is not False and trace.type != "heatmap":
            trace.legendgroup, trace.showlegend = trace.name, trace.name not in seen
            seen.add(trace.name)
    figure.add_traces(traces, row, column)
    return figure.update_xaxes(x, row=row, col=column).update_yaxes(y, row=row, col=column)


def titled(title: str) -> dict[str, Any]:
    """Return the settings of an axis with a title."""
    return {"title": {"text": title}}


def logarithmic(title: str, values: Any) -> dict[str, Any]:
    """Return the settings of a logarithmic axis with plain numbers, for values that are all positive."""
    step = "D2" if max(values) < _MOST_STEPPED * min(values) else 1
    return titled(title) | {"type": "log", "dtick": step, "minorloglabels": "complete", "exponentformat": "none"}


def metric_axis(metric: str, values: Any) -> dict[str, Any]:
    """Return the settings of an axis for values of a metric; perplexities are on a logarithmic one."""
    return logarithmic(metric, values) if is_perplexity(metric) and len(values) else titled(metric)
