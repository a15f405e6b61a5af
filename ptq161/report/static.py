"""A plotly figure as files for print, drawn with matplotlib: plotly's own export needs a browser.

Drawn is what the report's figures are made of: scatter traces (lines, steps, markers, error bars), stacked horizontal
bars and heat maps, in panels with linear, logarithmic or named axes, with titles, a legend and a bar of colors. A
trace's ``text`` is written beside its points, which then need no entry in the legend.
"""

from __future__ import annotations

import io
from collections.abc import Mapping, Sequence
from typing import Any, NamedTuple

import matplotlib
import numpy as np
import plotly.graph_objects as go
from matplotlib.axes import Axes
from matplotlib.colors import Normalize
from matplotlib.figure import Figure
from matplotlib.ticker import AutoLocator, FuncFormatter, LogLocator, MaxNLocator, NullFormatter, NullLocator
from plotly.colors import unlabel_rgb

_STYLE: dict[Any, Any] = {
    "svg.hashsalt": "ptq161",  # without it, an SVG has random names
    "figure.dpi": 150,
    "savefig.dpi": "figure",
    "axes.titlesize": 9.5,
    "axes.spines.top": False,
    "axes.spines.right": False,
    "axes.edgecolor": "#8a8f98",
    "axes.grid": True,
    "axes.axisbelow": True,
    "grid.color": "#e3e6ea",
    "xtick.color": "#8a8f98",
    "ytick.color": "#8a8f98",
    "xtick.labelcolor": "#30363d",
    "ytick.labelcolor": "#30363d",
    "legend.frameon": False,
    "legend.fontsize": 9,
}
_LABEL_SIZE = 8.5
"""Points of a label's letters."""
_PIXELS = 105
"""Of the page to an inch of print."""
_MARKERS = {
    "circle": "o",
    "square": "s",
    "diamond": "D",
    "triangle-up": "^",
    "cross": "P",
    "x": "X",
    "star": "*",
    "hexagon": "h",
}
_DASHES = {"dash": "--", "dot": ":", "dashdot": "-."}

_Names = tuple[str, str]
"""Of a panel's axes, as traces have them: ``("x2", "y2")``."""


class _Label(NamedTuple):
    """A text beside a point: on its right, unless ``position`` says otherwise as plotly does (``top left``)."""

    axes: Axes
    x: float
    y: float
    text: str
    color: str
    position: str


def render(figure: go.Figure) -> dict[str, bytes]:
    """Return a plotly figure as ``svg`` and ``png``; the same figure gives the same bytes."""
    with matplotlib.rc_context(_STYLE):
        drawing = draw(figure)
        # The layout takes as long as the drawing: once is enough for both.
        drawing.draw_without_rendering()
        drawing.set_layout_engine(None)
        files = {}
        for kind, metadata in (("svg", {"Date": None}), ("png", {})):
            stream = io.BytesIO()
            drawing.savefig(stream, format=kind, metadata=metadata)
            files[kind] = stream.getvalue()
    return files


def draw(figure: go.Figure) -> Figure:
    """Draw a plotly figure with matplotlib: an ``Axes`` for each of its panels, in the order of its traces.

    Raises:
        KeyError: a trace is of a type that is not drawn here.
    """
    drawers = [(trace, _TRACES[trace.type]) for trace in figure.data if trace.visible in (None, True)]
    drawing, panels = _panels(figure, [_names(trace) for trace, _ in drawers] or [("x", "y")])
    labels: list[_Label] = []
    for trace, draw_trace in drawers:
        labels += draw_trace(panels[_names(trace)], trace, figure) or []
    for names, axes in panels.items():
        for name in names:
            _dress(axes, name, _axis(figure, name))
    _write_titles(figure, panels)
    _add_legend(drawing)
    if figure.layout.coloraxis.cmin is not None:
        _add_color_bar(drawing, figure.layout.coloraxis)
    if labels:
        drawing.draw_without_rendering()  # where points are in print is known only after this
    for axes in panels.values():
        _write_labels(axes, [label for label in labels if label.axes is axes])
    return drawing


def _names(trace: Any) -> _Names:
    return trace.xaxis or "x", trace.yaxis or "y"


def _axis(figure: go.Figure, name: str) -> Any:
    """Return the settings of the axis that traces call ``x2``: those of ``layout.xaxis2``."""
    return figure.layout[f"{name[0]}axis{name[1:]}"]


def _panels(figure: go.Figure, pairs: Sequence[_Names]) -> tuple[Figure, dict[_Names, Axes]]:
    """Return an empty drawing with an ``Axes`` for each pair of axes, placed as their domains are."""
    domains = {names: [_axis(figure, name).domain or (0, 1) for name in names] for names in pairs}
    across = sorted({tuple(x) for x, _ in domains.values()})
    down = sorted({tuple(y) for _, y in domains.values()}, reverse=True)
    size = (6.2 if len(across) == 1 else 1 + 4.4 * len(across), (figure.layout.height or 440) / _PIXELS)
    drawing = Figure(figsize=size, layout="constrained")
    grid = drawing.add_gridspec(len(down), len(across), width_ratios=[end - begin for begin, end in across])
    panels: dict[_Names, Axes] = {}
    for names, (x, y) in domains.items():
        same = _axis(figure, names[1]).matches
        rows = next((axes for (_, name), axes in panels.items() if name == same), None)
        panels[names] = drawing.add_subplot(grid[down.index(tuple(y)), across.index(tuple(x))], sharey=rows)
        panels[names].set_xscale("log" if _axis(figure, names[0]).type == "log" else "linear")
        panels[names].set_yscale("log" if _axis(figure, names[1]).type == "log" else "linear")
    return drawing, panels


def _dress(axes: Axes, name: str, settings: Any) -> None:
    """Give an axis its title, ticks and range."""
    axis = axes.xaxis if name[0] == "x" else axes.yaxis
    axis.set_label_text(settings.title.text or "")
    axis.grid(settings.showgrid is not False)
    if settings.tickvals is not None:
        axis.set_ticks(list(settings.tickvals), list(settings.ticktext))
    if settings.showticklabels is False:
        axis.set_tick_params(labelleft=False, labelbottom=False)
    if settings.range is not None:
        (axes.set_xlim if name[0] == "x" else axes.set_ylim)(*settings.range)
    elif settings.autorange == "reversed":
        axis.set_inverted(True)
    if settings.type == "log":
        # As on the page: 2 and 5 between the powers of ten.
        has_steps = settings.dtick == "D2"
        axis.set_major_locator(LogLocator(subs=(1.0, 2.0, 5.0) if has_steps else (1.0,)))
        axis.set_minor_locator(NullLocator() if has_steps else LogLocator(subs="all"))
        axis.set_minor_formatter(NullFormatter())
    elif isinstance(axis.get_major_locator(), AutoLocator):
        axis.set_major_locator(MaxNLocator(6, steps=[1, 2, 5, 10]))
    if settings.type == "log" or isinstance(axis.get_major_locator(), MaxNLocator):
        axis.set_major_formatter(FuncFormatter(lambda value, _: f"{value:,.6g}"))


def _draw_scatter(axes: Axes, trace: Any, figure: go.Figure) -> list[_Label]:
    x, y = (np.asarray(values, dtype=float) for values in (trace.x, trace.y))
    color, mode, symbol = _color(trace.line.color or trace.marker.color), trace.mode, trace.marker.symbol or "circle"
    texts = [] if trace.text is None else list(trace.text)
    axes.errorbar(
        x,
        y,
        xerr=_error(trace.error_x),
        yerr=_error(trace.error_y),
        color=color,
        linestyle=_DASHES.get(trace.line.dash, "-") if "lines" in mode else "none",
        linewidth=trace.line.width or 1.5,
        drawstyle="steps-post" if trace.line.shape == "hv" else "default",
        marker=_MARKERS[symbol.removesuffix("-open")] if "markers" in mode else "none",
        markersize=0.5 * (trace.marker.size or 8),
        markerfacecolor="none" if symbol.endswith("-open") else color,
        alpha=trace.opacity,
        elinewidth=1.2,
        capsize=2.5,
        label=_legend_name(trace, not any(texts)),
        zorder=2.5 if "markers" in mode else 1.5,
    )
    position = trace.textposition or ""
    return [_Label(axes, x[i], y[i], text, color, position) for i, text in enumerate(texts) if text]


def _legend_name(trace: Any, is_wanted: bool = True) -> str:
    return trace.name if is_wanted and trace.name and trace.showlegend is not False else "_none"


def _color(color: str) -> str:
    """Write a color as matplotlib takes it; plotly samples scales as ``rgb(31, 158, 137)``."""
    return "#" + "".join(f"{int(part):02x}" for part in unlabel_rgb(color)) if color.startswith("rgb(") else color


def _error(error: Any) -> Any:
    """Return how far bars reach, ``[2, n]``, down first; None where none does."""
    ends = np.asarray([error.arrayminus, error.array], dtype=float)
    return np.nan_to_num(ends) if np.isfinite(ends).any() else None


def _draw_bars(axes: Axes, trace: Any, figure: go.Figure) -> None:
    """Draw horizontal bars, each at the end of those of the same panel that were drawn before."""
    rows = list(dict.fromkeys(name for other in figure.data for name in other.y))
    lengths = dict(zip(trace.y, np.nan_to_num(np.asarray(trace.x, dtype=float)), strict=True))
    before = [sum(bars.datavalues[i] for bars in axes.containers) for i in range(len(rows))]  # type: ignore[attr-defined]
    width, name = [lengths.get(row, 0.0) for row in rows], _legend_name(trace)
    axes.barh(range(len(rows)), width, 0.7, before, color=trace.marker.color, label=name)
    axes.set_yticks(range(len(rows)), [_cut(row, 60) for row in rows])
    axes.set_ylim(-0.6, len(rows) - 0.4)


def _draw_heat(axes: Axes, trace: Any, figure: go.Figure) -> None:
    scale = figure.layout[trace.coloraxis]
    extent = (trace.x[0] - 0.5, trace.x[-1] + 0.5, len(trace.y) - 0.5, -0.5)
    norm = Normalize(scale.cmin, scale.cmax)
    axes.imshow(np.asarray(trace.z, dtype=float), aspect="auto", norm=norm, cmap="viridis", extent=extent)
    axes.set_yticks(range(len(trace.y)), list(trace.y), fontsize=7.5)
    axes.spines[:].set_visible(False)


_TRACES: dict[str, Any] = {"scatter": _draw_scatter, "bar": _draw_bars, "heatmap": _draw_heat}


def _write_titles(figure: go.Figure, panels: Mapping[_Names, Axes]) -> None:
    """Give each panel the annotation that lies above it."""
    for note in figure.layout.annotations:
        for names, axes in panels.items():
            (left, right), (_, top) = (_axis(figure, name).domain for name in names)
            if left <= note.x <= right and abs(note.y - top) < 0.01:
                axes.set_title(_cut(note.text, 48))


def _add_legend(drawing: Figure) -> None:
    found = [pair for axes in drawing.axes for pair in zip(*axes.get_legend_handles_labels(), strict=True)]
    entries = {_cut(str(label), 72): handle for handle, label in found}
    if entries:
        # A letter is about half as wide as it is high; the line before it takes as much as six.
        letters = max(map(len, entries)) + 6
        columns = max(1, int(drawing.get_figwidth() * 72 / (0.58 * _STYLE["legend.fontsize"] * letters)))
        drawing.legend(entries.values(), entries, loc="outside upper left", ncols=min(columns, len(entries)))


def _add_color_bar(drawing: Figure, scale: Any) -> None:
    colors = matplotlib.cm.ScalarMappable(Normalize(scale.cmin, scale.cmax), "viridis")
    bar = drawing.colorbar(colors, ax=drawing.axes, label=scale.colorbar.title.text, aspect=30, pad=0.01)
    bar.set_ticks(list(scale.colorbar.tickvals), labels=list(scale.colorbar.ticktext))


def _write_labels(axes: Axes, labels: Sequence[_Label]) -> None:
    """Write labels beside their points, each as near as the panel, markers and the labels before it leave room."""
    height, to_points = 1.25 * _LABEL_SIZE, 72 / axes.figure.dpi
    lowest, highest = axes.bbox.y0 * to_points + height / 2, axes.bbox.y1 * to_points
    marked = [line.get_xydata() for line in axes.lines if line.get_marker() in _MARKERS.values()]
    points = axes.transData.transform(np.concatenate([np.empty((0, 2)), *marked])) * to_points
    taken = [(x - 5, x + 5, y) for x, y in points]  # left end, right end and height of what is drawn already
    for label in sorted(labels, key=lambda label: label.y):
        x, y = axes.transData.transform((label.x, label.y)) * to_points
        width, level = _width(label), y + (height / 2 if "top" in label.position else 0)
        left = x - 4 - width if "left" in label.position else x + 7
        blocked = [at for begin, end, at in taken if begin < left + width and left < end]
        levels = sorted([level, *np.arange(lowest, highest, height / 4)], key=lambda free: abs(free - level))
        free = next((free for free in levels if all(abs(free - at) >= height for at in blocked)), level)
        taken.append((left, left + width, free))
        offset = (left - x, free - y - 0.35 * _LABEL_SIZE)
        style: dict[str, Any] = {"fontsize": _LABEL_SIZE, "color": label.color, "zorder": 3}
        if abs(free - level) > height:  # a line leads back to the point
            style["arrowprops"] = {"arrowstyle": "-", "color": label.color, "linewidth": 0.5, "relpos": (0, 0.5)}
        axes.annotate(label.text, (label.x, label.y), offset, textcoords="offset points", **style)


def _width(label: _Label) -> float:
    """Return about how wide a label is, in points."""
    return 0.58 * _LABEL_SIZE * len(label.text)


def _cut(text: str, most: int) -> str:
    """Shorten a text that would leave no room for what it names."""
    return text if len(text) <= most else f"{text[: most - 1]}…"
