"""The sections of the report page: which charts there are to choose from, and the runs behind them."""

from __future__ import annotations

import dataclasses
import functools
import math
from collections.abc import Callable, Iterable, Mapping, Sequence

from ptq161.report import interactive
from ptq161.report.collect import Run
from ptq161.report.details import Details, Grid
from ptq161.report.figures import lines_of
from ptq161.report.interactive import Chart
from ptq161.report.published import Published
from ptq161.report.results import Result, differing_keys, quantized, swept_numbers

MOST_POINTS = 20_000
"""Points of all sweep charts together: what a browser opens at once."""
LEAST_POINTS = 8
"""Results that differ in several keys at once, as those of a search, before a cloud of them shows anything."""
MOST_VALUES = 12
"""Values of a swept key that are no numbers, such as names of options."""


@dataclasses.dataclass(frozen=True)
class Section:
    """A figure of the page.

    Attributes:
        key: its place in the page's address.
        title: its heading.
        caption: what is seen, and how it is read.
        charts: choice -> what is drawn.
        runs: behind it.
    """

    key: str
    title: str
    caption: str
    charts: Mapping[str, Chart]
    runs: Sequence[Run]


def sections(
    results: Sequence[Result],
    labels: Sequence[str],
    details: Sequence[Details],
    metrics: Sequence[str],
    *,
    x: str | None = None,
    published: Sequence[Published] = (),
) -> list[Section]:
    """Return the sections for which the runs have numbers.

    Args:
        results: quantized and not.
        labels: what tells each result from the others.
        details: of the runs whose blocks are shown.
        metrics: scores, those to show first first.
        x: the swept key to show first.
        published: figures beside ours.
    """
    named = {id(result): label for result, label in zip(results, labels, strict=True)}
    n_runs = sum(run.run_dir is not None for result in quantized(results) for run in result.runs)
    part = f" Shown are {len(details)} of {n_runs} runs: the Pareto front first." if len(details) < n_runs else ""
    found = [
        _bits(results, named, metrics, published),
        _sweeps(results, named, metrics, x),
        _loss(details, part),
        _of_runs(
            details,
            "preprocessing",
            "Preprocessing loss",
            f"Training loss of the preprocessing against its steps.{part}",
            lambda run: bool(run.preprocess_loss),
            lambda runs: {"all runs": interactive.preprocess_chart(runs)},
        ),
        _of_runs(
            details,
            "error",
            "Error per linear",
            "Squared error of each linear's outputs relative to their squared size, on the first calibration batch. "
            f"The scale is logarithmic and the same for all runs.{part}",
            lambda run: bool(run.error),
            functools.partial(_heat_maps, name="relative error", is_log=True, pick=lambda run: run.error),
        ),
        _of_runs(
            details,
            "salient",
            "Salient channels per layer",
            f"Input channels of each linear that are kept at more bits. The scale is the same for all runs.{part}",
            lambda run: bool(run.salient),
            functools.partial(_heat_maps, name="salient channels", is_log=False, pick=lambda run: run.salient),
        ),
        _cost(results, named, details, part),
    ]
    return [section for section in found if section and section.charts]


def _bits(
    results: Sequence[Result], labels: Mapping[int, str], metrics: Sequence[str], published: Sequence[Published]
) -> Section:
    rows = [result for result in quantized(results) if result.bits is not None]
    shown = [metric for metric in metrics if any(metric in row.metrics for row in rows)]
    return Section(
        "bits",
        "Bits against quality",
        "Bits per weight are measured: everything that is stored for the quantized linears. A hollow point, joined to "
        "its result, is at the bits that the method's paper counts. Dotted: the Pareto front; dashed: full precision.",
        {metric: interactive.bits_chart(results, labels, metric, published) for metric in shown},
        [run for row in rows for run in row.runs],
    )


def _sweeps(
    results: Sequence[Result], labels: Mapping[int, str], metrics: Sequence[str], x: str | None
) -> Section | None:
    rows = quantized(results)
    numbers = swept_numbers(rows)
    names = [key for key in differing_keys(rows) if key not in numbers and _is_short([r.value(key) for r in rows])]
    keys = dict.fromkeys([*([x] if x else []), *numbers, *names])
    pairs = [(key, metric) for metric in metrics for key in keys if key == x or _is_swept(rows, key, metric)]
    if not pairs:
        return None
    most = max(4, MOST_POINTS // len(rows))
    left = f" {len(pairs) - most} more pairs of key and score are left out." if len(pairs) > most else ""
    return Section(
        "sweeps",
        "Sweeps",
        "A line joins results that differ in nothing but the swept key and the seed. Bars are 95 % bootstrap intervals "
        f"of the mean over seeds, or, for a single seed, the evaluation's standard error.{left}",
        {f"{metric} over {key}": interactive.sweep_chart(results, labels, key, metric) for key, metric in pairs[:most]},
        [run for row in rows if any(row.value(key) is not None for key in keys) for run in row.runs],
    )


def _loss(details: Sequence[Details], part: str) -> Section | None:
    def charts(runs: Sequence[Details]) -> dict[str, Chart]:
        return {
            "last epoch of all runs": interactive.last_epoch_chart(runs),
            **{run.label: interactive.loss_chart(run) for run in runs},
        }

    return _of_runs(
        details,
        "loss",
        "Loss per block and epoch",
        f"Mean loss of the block-wise optimisation; a block stands for the window that begins with it.{part}",
        lambda run: bool(run.loss),
        charts,
    )


def _cost(
    results: Sequence[Result], labels: Mapping[int, str], details: Sequence[Details], part: str
) -> Section | None:
    shown_dirs = {run.run.run_dir for run in details}
    measured = [row for row in results if row.seconds and row.runs[0].run_dir]
    if not measured:
        return None
    rows = [row for row in measured if any(run.run_dir in shown_dirs for run in row.runs)] or measured[:1]
    charts = {"by stage": interactive.cost_chart(rows, labels)}
    if any(row.peak_memory_bytes is not None for row in measured):
        charts["time against memory, all results"] = interactive.time_memory_chart(measured, labels)
    if timed := [run for run in details if run.seconds]:
        charts["seconds per block"] = interactive.block_seconds_chart(timed)
    return Section(
        "cost",
        "Time and memory",
        f"Seconds by stage, and the largest memory of the process. Several seeds: mean seconds, largest memory.{part}",
        charts,
        [run for row in measured for run in row.runs],
    )


def _of_runs(
    details: Sequence[Details],
    key: str,
    title: str,
    caption: str,
    has: Callable[[Details], bool],
    charts: Callable[[Sequence[Details]], Mapping[str, Chart]],
) -> Section | None:
    runs = [run for run in details if has(run)]
    return Section(key, title, caption, charts(runs), [run.run for run in runs]) if runs else None


def _heat_maps(
    runs: Sequence[Details], *, name: str, is_log: bool, pick: Callable[[Details], Grid]
) -> dict[str, Chart]:
    found = (v for run in runs for row in pick(run).values() for v in row.values())
    values = [v for v in found if math.isfinite(v) and (v > 0 or not is_log)]
    bounds = (min(values, default=1.0), max(values, default=1.0)) if is_log else (0.0, max(values, default=1.0))
    return {run.label: interactive.heat_map(pick(run), bounds, name, is_log=is_log) for run in runs}


def _is_swept(results: Sequence[Result], key: str, metric: str) -> bool:
    """Say whether a line can be drawn, or a cloud of numbers that were varied together."""
    rows = [result for result in results if result.value(key) is not None and metric in result.metrics]
    lines = lines_of(rows, key).values()
    if any(len({str(result.value(key)) for result in line}) > 1 for line in lines):
        return True
    return len(rows) >= LEAST_POINTS and key in swept_numbers(rows)


def _is_short(values: Iterable[object]) -> bool:
    found = {repr(value) for value in values if value is not None}
    return 1 < len(found) <= MOST_VALUES
