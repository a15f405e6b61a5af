"""Figures of what happens inside runs: loss, error and salient channels by block, time and memory.

Each is a plotly figure, which the page shows and :mod:`ptq161.report.static` prints. The frames that they are drawn
from are those of :func:`ptq161.report.details.read_details`.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np
import pandas as pd
import plotly.graph_objects as go
from plotly.colors import sample_colorscale

from ptq161.report.results import Results, method_name
from ptq161.report.style import GRAY, SYMBOLS, add, cycled, logarithmic, panels, titled

MOST_PANELS = 6
"""Runs that are drawn side by side, and whose first epoch is drawn with the last."""
_DASHES = ("solid", "dot", "dash", "dashdot")


def loss_figure(loss: pd.DataFrame) -> go.Figure:
    """Draw each run's loss in its last epoch against the block; of few runs, the first epoch's as a faint line."""
    epochs, colors = loss.groupby("label").epoch, cycled(loss.label)
    lines = _lines(loss[loss.epoch == epochs.transform("max")], "block", "label", colors)
    if len(colors) <= MOST_PANELS:
        first = loss[(loss.epoch == epochs.transform("min")) & (loss.epoch < epochs.transform("max"))]
        lines += _lines(first, "block", "label", colors, mode="lines", opacity=0.35, showlegend=False)
    return _over_blocks(lines, "loss", is_loss=True)


def epochs_figure(loss: pd.DataFrame) -> go.Figure:
    """Draw one run's loss against the decoder block, a line an epoch."""
    named = loss.assign(epoch="epoch " + loss.epoch.astype(str))
    shades = sample_colorscale("Viridis", np.linspace(0.9, 0, named.epoch.nunique(), endpoint=False))
    return _over_blocks(_lines(named, "block", "epoch", cycled(named.epoch, shades)), "loss", is_loss=True)


def preprocess_figure(loss: pd.DataFrame) -> go.Figure:
    """Draw the loss of the preprocessing against its steps, a line for each run, dashed by its round."""
    colors, lines = cycled(loss.label), list[go.Scatter]()
    for number, steps in loss.groupby("round"):
        name = steps.label + (f", round {number}" if loss["round"].nunique() > 1 else "")
        named = dict(zip(name, steps.label.map(colors), strict=True))
        dash = _DASHES[number % len(_DASHES)]
        lines += _lines(steps.assign(name=name), "step", "name", named, mode="lines", line_dash=dash)
    return add(panels(1), 0, lines, titled("step"), titled("preprocessing loss"))


def finetune_figure(loss: pd.DataFrame) -> go.Figure:
    """Draw the loss of the finetuning against its steps, a line for each run, dotted on what is held out."""
    colors, lines = cycled(loss.label), list[go.Scatter]()
    for held_out, steps in loss.groupby("held_out"):
        name = steps.label + (", held out" if held_out else "")
        named = dict(zip(name, steps.label.map(colors), strict=True))
        style = {"mode": "lines+markers", "line_dash": "dot"} if held_out else {"mode": "lines", "opacity": 0.5}
        lines += _lines(steps.assign(name=name), "step", "name", named, **style)
    return add(panels(1), 0, lines, titled("step"), titled("finetuning loss"))


def block_seconds_figure(seconds: pd.DataFrame) -> go.Figure:
    """Draw the seconds that each run took for each decoder block."""
    return _over_blocks(_lines(seconds, "block", "label", cycled(seconds.label)), "seconds")


def heat_maps(
    values: pd.DataFrame, name: str, bounds: tuple[float, float] | None = None, *, is_log: bool = False
) -> go.Figure:
    """Draw values of linears, a panel a run, with a row for each kind of linear and a column for each decoder block.

    Args:
        values: a row per ``label``, ``kind`` and ``block``.
        name: of the values.
        bounds: least and greatest value of the scale; None takes those of ``values``.
        is_log: colors follow the logarithm.
    """
    runs = list(values.groupby("label", sort=False))
    titles = [str(label) for label, _ in runs] if len(runs) > 1 else None
    are_alike = len({tuple(run.kind.unique()) for _, run in runs}) == 1
    height = 440 if titles is None else 300
    figure = panels(len(runs), height=height, subplot_titles=titles, shared_yaxes=are_alike, horizontal_spacing=0.04)
    horizontal, vertical = titled("decoder block") | {"showgrid": False}, {"autorange": "reversed", "showgrid": False}
    hover = f"block %{{x}}, %{{y}}<br>{name} %{{customdata:.4g}}<extra></extra>"
    for i, (_, run) in enumerate(runs):
        grid = run.pivot(index="kind", columns="block", values="value").reindex(run.kind.unique())
        cells = {"x": grid.columns.to_numpy(), "y": grid.index.to_numpy(), "z": _scaled(grid, is_log=is_log).to_numpy()}
        heat = go.Heatmap(
            customdata=grid.to_numpy(), coloraxis="coloraxis", hovertemplate=hover, xgap=1, ygap=1, **cells
        )
        add(figure, i, [heat], horizontal, vertical)
    low, high = _scaled(pd.Series(bounds or color_bounds(values, is_log=is_log)), is_log=is_log)
    ticks = np.linspace(low, high, 5)
    texts = [f"{10**tick:.2g}" if is_log else f"{tick:.3g}" for tick in ticks]
    bar = {"title": {"text": name, "side": "right"}, "tickvals": ticks, "ticktext": texts}
    figure.layout.coloraxis = {"colorscale": "Viridis", "cmin": low, "cmax": high, "colorbar": bar}
    return figure


def color_bounds(values: pd.DataFrame, *, is_log: bool = False) -> tuple[float, float]:
    """Return the least and the greatest value of a scale of colors; one that is not logarithmic begins at 0."""
    finite = values.value[_scaled(values.value, is_log=is_log).notna()]
    if finite.empty:
        return 0.1, 1.0
    return (float(finite.min()) if is_log else 0.0), float(finite.max())


def cost_figure(results: Results) -> go.Figure:
    """Draw seconds by stage, and the peak memory, as bars, a row a result."""
    labels = results.rows.label
    seconds = results.seconds.dropna(axis="columns", how="all")
    height, widths = 150 + 26 * len(labels), [0.76, 0.24]
    figure = panels(2, height=height, shared_yaxes=True, column_widths=widths, horizontal_spacing=0.03)
    figure.update_layout(barmode="stack", bargap=0.3)
    hover = "%{y}<br>%{x:.2f}<extra>%{fullData.name}</extra>"
    stages = [
        go.Bar(x=seconds[stage], y=labels, orientation="h", name=stage, marker_color=color, hovertemplate=hover)
        for stage, color in cycled(seconds).items()
    ]
    memory = go.Bar(x=results.rows.peak_memory_bytes / 1e9, y=labels, orientation="h", marker_color=GRAY)
    memory.update(name="peak memory", hovertemplate=hover, showlegend=False)
    vertical = {"autorange": "reversed", "type": "category", "showgrid": False}
    add(figure, 0, stages, titled("seconds"), vertical)
    return add(figure, 1, [memory], titled("peak GB"), vertical)


def time_memory_figure(results: Results) -> go.Figure:
    """Draw the peak memory against the seconds of a run, a point a result."""
    rows = results.rows.dropna(subset=["seconds", "peak_memory_bytes"])
    rows = rows.assign(method=rows.method.map(method_name), gigabytes=rows.peak_memory_bytes / 1e9)
    colors, symbols = cycled(rows.method), cycled(rows.method, SYMBOLS)
    points = []
    for method, mine in rows.groupby("method", sort=False):
        marker = {"color": colors[method], "symbol": symbols[method], "size": 8}
        hover = {"hoverinfo": "text+x+y", "hovertext": mine.label}
        points.append(go.Scatter(x=mine.seconds, y=mine.gigabytes, mode="markers", name=method, marker=marker, **hover))
    return add(panels(1), 0, points, titled("seconds"), titled("peak memory in GB"))


def _lines(values: pd.DataFrame, x: str, by: str, colors: Mapping[str, str], **settings: Any) -> list[go.Scatter]:
    """Return a line for each name in the column ``by``."""
    style = {"mode": "lines+markers", "line_width": 1.5, "marker_size": 4} | settings
    hover = f"%{{fullData.name}}<br>{x} %{{x}}: %{{y:.4g}}<extra></extra>"
    return [
        go.Scatter(x=line[x], y=line.value, name=name, line_color=colors[name], hovertemplate=hover, **style)
        for name, line in values.groupby(by, sort=False)
    ]


def _over_blocks(lines: Sequence[go.Scatter], name: str, *, is_loss: bool = False) -> go.Figure:
    """Return lines over decoder blocks; the axis of losses is logarithmic where they allow it."""
    values = np.concatenate([line.y for line in lines])
    is_log = is_loss and bool((np.isfinite(values) & (values > 0)).all())
    vertical = logarithmic(name, values) if is_log else titled(name)
    return add(panels(1), 0, lines, titled("decoder block"), vertical)


def _scaled(values: Any, *, is_log: bool) -> Any:
    """Return values, or their logarithms, where they have a color; NaN elsewhere."""
    values = values.where(np.isfinite(values) & ((values > 0) | (not is_log)))
    return np.log10(values) if is_log else values
