"""Figures of what happens inside runs, for print: loss, error and salient channels by block, time and memory."""

from __future__ import annotations

import math
from collections.abc import Iterable, Mapping, Sequence

import matplotlib
from matplotlib.colors import LogNorm, Normalize
from matplotlib.figure import Figure

from ptq161.report.details import Details, Grid
from ptq161.report.figures import COLORS, new_figure, score_axis
from ptq161.report.results import Result

MOST_PANELS = 6
"""Runs that are drawn side by side."""
MOST_BARS = 30


def loss_figure(runs: Sequence[Details]) -> Figure:
    """Draw each run's loss in its last epoch against the decoder block; a faint line is the first epoch's."""
    figure = new_figure(1)
    axes = figure.subplots()
    for i, run in enumerate(runs[:MOST_PANELS]):
        color, epochs = COLORS[i % len(COLORS)], list(run.loss.values())
        axes.plot(list(epochs[-1]), list(epochs[-1].values()), ".-", color=color, label=run.label)
        if len(epochs) > 1:
            axes.plot(list(epochs[0]), list(epochs[0].values()), "-", color=color, alpha=0.3, linewidth=1)
    axes.set_xlabel("decoder block (faint: first epoch)")
    score_axis(axes, "loss", _is_positive(values for run in runs for values in run.loss.values()))
    axes.legend(frameon=False, fontsize="small", loc="upper left")
    return figure


def preprocess_figure(runs: Sequence[Details]) -> Figure:
    """Draw the loss of the preprocessing against its steps, a line for each run and round."""
    figure = new_figure(1)
    axes = figure.subplots()
    for i, run in enumerate(runs[:MOST_PANELS]):
        for j, (turn, steps) in enumerate(run.preprocess_loss.items()):
            text = run.label + (f" round {turn}" if len(run.preprocess_loss) > 1 else "")
            axes.plot(list(steps), list(steps.values()), color=COLORS[i % len(COLORS)], alpha=0.6**j, label=text)
    axes.set_xlabel("step")
    score_axis(axes, "preprocessing loss", is_log=False)
    axes.legend(frameon=False, fontsize="small")
    return figure


def error_figure(runs: Sequence[Details]) -> Figure:
    """Draw the relative output error of each linear as a heat map, one a run, on a common logarithmic scale."""
    values = [value for value in _finite([run.error for run in runs]) if value > 0]
    norm = LogNorm(min(values, default=1e-3), max(values, default=1.0))
    return _heat_maps(runs, [run.error for run in runs], norm, "relative squared output error")


def salient_figure(runs: Sequence[Details]) -> Figure:
    """Draw the number of salient channels of each linear as a heat map, one a run, on a common scale."""
    values = _finite([run.salient for run in runs])
    return _heat_maps(runs, [run.salient for run in runs], Normalize(0, max(values, default=1.0)), "salient channels")


def cost_figure(results: Sequence[Result], labels: Sequence[str]) -> Figure:
    """Draw seconds by stage, and the peak memory, as bars, a row a result."""
    rows, names = results[:MOST_BARS], labels[:MOST_BARS]
    stages = list(dict.fromkeys(stage for row in rows for stage in row.seconds))
    figure = new_figure(2, height=1.4 + 0.3 * len(rows))
    time, memory = figure.subplots(1, 2, sharey=True)
    places, left = range(len(rows)), [0.0] * len(rows)
    for i, stage in enumerate(stages):
        seconds = [row.seconds.get(stage, 0.0) for row in rows]
        time.barh(places, seconds, left=left, color=COLORS[i % len(COLORS)], label=stage)
        left = [before + more for before, more in zip(left, seconds, strict=True)]
    memory.barh(places, [(row.peak_memory_bytes or 0.0) / 1e9 for row in rows], color="grey")
    time.set_yticks(places, names, fontsize=8)
    time.invert_yaxis()
    time.set_xlabel("seconds")
    time.legend(frameon=False, fontsize="small")
    memory.set_xlabel("peak memory in GB")
    for axes in (time, memory):
        axes.spines[["top", "right"]].set_visible(False)
    return figure


def _heat_maps(runs: Sequence[Details], grids: Sequence[Grid], norm: Normalize, name: str) -> Figure:
    shown = list(zip(runs, grids, strict=True))[:MOST_PANELS]
    columns = min(len(shown), 3)
    lines = math.ceil(len(shown) / columns)
    figure = new_figure(columns, height=0.8 + 2.4 * lines)
    panels = list(figure.subplots(lines, columns, squeeze=False, sharey=_have_same_rows(grids)).flat)
    for axes, (run, grid) in zip(panels, shown, strict=False):
        blocks = sorted({block for row in grid.values() for block in row})
        image = [[row.get(block, math.nan) for block in blocks] for row in grid.values()]
        axes.imshow(image, aspect="auto", norm=norm, cmap="viridis", extent=_extent(blocks, grid))
        axes.set_yticks(range(len(grid)), list(grid), fontsize=7)
        axes.set_title(run.label, fontsize=9)
        axes.set_xlabel("decoder block")
    for axes in panels[len(shown) :]:
        axes.remove()
    colors = matplotlib.cm.ScalarMappable(norm, "viridis")
    figure.colorbar(colors, ax=panels[: len(shown)], label=name, shrink=0.8)
    return figure


def _have_same_rows(grids: Sequence[Grid]) -> bool:
    return len({tuple(grid) for grid in grids}) == 1


def _finite(grids: Sequence[Grid]) -> list[float]:
    """Return the values of the grids that are drawn."""
    return [v for grid in grids[:MOST_PANELS] for row in grid.values() for v in row.values() if math.isfinite(v)]


def _extent(blocks: Sequence[int], grid: Grid) -> tuple[float, float, float, float]:
    return blocks[0] - 0.5, blocks[-1] + 0.5, len(grid) - 0.5, -0.5


def _is_positive(groups: Iterable[Mapping[int, float]]) -> bool:
    return all(value > 0 for values in groups for value in values.values())
