"""The figures of a report, by section: those that the page has to choose from, those in print, the runs behind them."""

from __future__ import annotations

import functools
from collections.abc import Callable, Mapping, Sequence
from typing import NamedTuple

import pandas as pd
import plotly.graph_objects as go

from ptq161.report import run_figures, score_figures
from ptq161.report.collect import Run
from ptq161.report.keys import are_numbers, differing_keys, line_names, swept_numbers
from ptq161.report.published import Published
from ptq161.report.results import Results
from ptq161.report.texts import remark
from ptq161.tracking.metric_names import is_perplexity

_MOST_POINTS = 20_000
"""Points of all sweep charts together: what a browser opens at once."""
_LEAST_POINTS = 8
"""Results that differ in several keys at once, as those of a search, before a cloud of them shows anything."""
_MOST_VALUES = 12
"""Values of a swept key that are no numbers, such as names of options."""
_MOST_SWEEPS = 4
"""Swept keys that are printed."""
_MOST_BARS = 30
"""Results whose time is printed."""


class Section(NamedTuple):
    """Figures that belong together.

    Attributes:
        key: its place in the page's address.
        title: its heading.
        caption: what is seen, and how it is read.
        charts: choice -> what the page shows.
        prints: name of a file -> what is printed, which shows several choices side by side.
        runs: behind them.
    """

    key: str
    title: str
    caption: str
    charts: Mapping[str, go.Figure]
    prints: Mapping[str, go.Figure]
    runs: Sequence[Run]


def sections(
    results: Results,
    runs: Mapping[str, Run],
    details: Mapping[str, pd.DataFrame],
    metrics: Sequence[str],
    printed: Sequence[str],
    *,
    x: str | None = None,
    published: Sequence[Published] = (),
) -> list[Section]:
    """Return the sections for which the runs have numbers.

    Args:
        results: quantized and not.
        runs: those whose blocks are shown, by what tells them apart (:func:`ptq161.report.details.chosen_runs`).
        details: of these runs (:func:`ptq161.report.details.read_details`).
        metrics: scores of the page, those to show first first.
        printed: those in print.
        x: the swept key to show first.
        published: figures beside ours.

    Raises:
        UserError: no result has both ``x`` and a score.
    """
    n_runs = len(_runs(results.quantized.rows))
    part = f" Shown are {len(runs)} of {n_runs} runs: the Pareto front first." if len(runs) < n_runs else ""
    found = [
        _bits(results, metrics, printed, published),
        _sweeps(results, metrics, printed, x),
        *_of_blocks(details, runs, part),
        _cost(results, runs, details["seconds"], part),
    ]
    return [section for section in found if section.charts or section.prints]


def _bits(results: Results, metrics: Sequence[str], printed: Sequence[str], published: Sequence[Published]) -> Section:
    rows = results.quantized.select(results.quantized.rows.bits.notna())
    known = set(rows.scores.metric)
    printed = [metric for metric in printed if metric in known]
    best = [metric for metric in printed if is_perplexity(metric)] or printed
    return Section(
        "bits",
        "Bits against quality",
        "Bits per weight are measured: everything that is stored for the quantized linears. A hollow point, joined to "
        "its result, is at the bits that the method's paper counts. Dotted: the Pareto front; dashed: full precision. "
        f"{remark(results.quantized.rows)}".strip(),
        {metric: score_figures.bits_figure(results, [metric], published) for metric in metrics if metric in known},
        {"bits": score_figures.bits_figure(results, best, published)} if best else {},
        _runs(rows.rows),
    )


def _sweeps(results: Results, metrics: Sequence[str], printed: Sequence[str], x: str | None) -> Section:
    rows = results.quantized
    numbers = swept_numbers(rows.config)
    names = [key for key in differing_keys(rows.config) if key not in numbers and _is_short(rows.config[key])]
    asked = [x] if x else []
    keys = list(dict.fromkeys([*asked, *numbers, *names]))
    pairs = [(key, metric) for metric in metrics for key in keys if _is_swept(rows, key, metric, is_asked=key == x)]
    most = max(4, _MOST_POINTS // max(1, len(rows.rows)))
    left = f" {len(pairs) - most} more pairs of key and score are left out." if len(pairs) > most else ""
    in_print = asked or list(dict.fromkeys(key for key, metric in pairs if metric in printed))
    return Section(
        "sweeps",
        "Sweeps",
        "A line joins results that differ in nothing but the swept key and the seed; names have a row each, where a "
        "hollow point is a preprocessed model before it is quantized. Bars are 95 % bootstrap intervals of the mean "
        f"over seeds, or, for a single seed, the evaluation's standard error.{left} {remark(rows.rows)}".strip(),
        {f"{metric} over {key}": _sweep(results, key, [metric]) for key, metric in pairs[:most]},
        {f"sweep_{key}": _sweep(results, key, printed) for key in in_print[:_MOST_SWEEPS]},
        _runs(rows.rows[rows.config[keys].notna().any(axis=1)]),
    )


def _sweep(results: Results, key: str, metrics: Sequence[str]) -> go.Figure:
    is_number = are_numbers(results.quantized.config[key])
    return (score_figures.sweep_figure if is_number else score_figures.variants_figure)(results, key, metrics)


def _of_blocks(details: Mapping[str, pd.DataFrame], runs: Mapping[str, Run], part: str) -> list[Section]:
    error, salient, bits = details["output_error"], details["salient_channels"], details["code_bits"]
    trained, held_out = details["finetune_loss"], details["finetune_held_out_loss"]
    error_maps = functools.partial(
        run_figures.heat_maps,
        name="relative error",
        bounds=run_figures.color_bounds(error, is_log=True),
        is_log=True,
    )
    salient_maps = functools.partial(
        run_figures.heat_maps, name="salient channels", bounds=run_figures.color_bounds(salient)
    )
    bits_maps = functools.partial(run_figures.heat_maps, name="bits per code", bounds=run_figures.color_bounds(bits))
    return [
        _of_runs(
            "loss",
            "Loss per block and epoch",
            "Mean loss of the block-wise optimization; a block stands for the window that begins with it. Faint: the "
            f"first epoch, where there are few runs.{part}",
            runs,
            details["loss"],
            run_figures.loss_figure,
            run_figures.epochs_figure,
            all_runs="last epoch of all runs",
        ),
        _of_runs(
            "preprocessing",
            "Preprocessing loss",
            f"Training loss of the preprocessing against its steps.{part}",
            runs,
            details["preprocess_loss"],
            run_figures.preprocess_figure,
            all_runs="all runs",
        ),
        _of_runs(
            "finetuning",
            "Finetuning loss",
            "Divergence from the full-precision model against the steps of the finetuning; dotted on the sequences "
            f"that are held out.{part}",
            runs,
            pd.concat([trained.assign(held_out=False), held_out.assign(held_out=True)]),
            run_figures.finetune_figure,
            all_runs="all runs",
        ),
        _of_runs(
            "error",
            "Error per linear",
            "Squared error of each linear's outputs relative to their squared size, on the first calibration batch. "
            f"The scale is logarithmic and the same for all runs.{part}",
            runs,
            error,
            error_maps,
            error_maps,
        ),
        _of_runs(
            "salient",
            "Salient channels per layer",
            f"Input channels of each linear that are kept at more bits. The scale is the same for all runs.{part}",
            runs,
            salient,
            salient_maps,
            salient_maps,
        ),
        _of_runs(
            "plan",
            "Bits per layer",
            "Mean bits of a code, as the method has allotted them to the input channels of each linear. The scale is "
            f"the same for all runs.{part}",
            runs,
            bits,
            bits_maps,
            bits_maps,
        ),
    ]


def _of_runs(
    key: str,
    title: str,
    caption: str,
    runs: Mapping[str, Run],
    values: pd.DataFrame,
    draw: Callable[[pd.DataFrame], go.Figure],
    draw_run: Callable[[pd.DataFrame], go.Figure] | None = None,
    all_runs: str = "",
) -> Section:
    """Return a section of what some runs say: all together where that choice has a name, each alone where it can be."""
    labels = values.label.unique()
    if not len(labels):
        return Section(key, title, caption, {}, {}, [])
    charts = {all_runs: draw(values)} if all_runs else {}
    if draw_run:
        charts |= {str(label): draw_run(run) for label, run in values.groupby("label", sort=False)}
    first = values[values.label.isin(labels[: run_figures.MOST_PANELS])]
    return Section(key, title, caption, charts, {key: draw(first)}, [runs[label] for label in labels])


def _cost(results: Results, runs: Mapping[str, Run], seconds: pd.DataFrame, part: str) -> Section:
    measured = results.select((results.rows.run_dir != "") & results.rows.seconds.notna())
    shown, place = set(map(id, runs.values())), pd.Series(range(len(measured.rows)), measured.rows.index)
    is_shown = measured.rows.runs.map(lambda seeds: any(id(run) in shown for run in seeds)).astype(bool)
    charts, prints = {}, {}
    if len(place):
        charts["by stage"] = run_figures.cost_figure(measured.select(is_shown if is_shown.any() else place < 1))
        prints["cost"] = run_figures.cost_figure(measured.select(place < _MOST_BARS))
    if measured.rows.peak_memory_bytes.notna().any():
        charts["time against memory, all results"] = run_figures.time_memory_figure(measured)
    if not seconds.empty:
        charts["seconds per block"] = run_figures.block_seconds_figure(seconds)
    return Section(
        "cost",
        "Time and memory",
        f"Seconds by stage, and the largest memory of the process. Several seeds: mean seconds, largest memory.{part}",
        charts,
        prints,
        _runs(measured.rows),
    )


def _runs(rows: pd.DataFrame) -> list[Run]:
    return [run for runs in rows.runs for run in runs if run.run_dir]


def _is_swept(results: Results, key: str, metric: str, *, is_asked: bool) -> bool:
    """Say whether a line can be drawn, or a cloud of numbers that were varied together; of an asked key, anything."""
    rows = results.select(results.config[key].notna() & results.score(metric).value.notna())
    if rows.rows.empty or is_asked:
        return is_asked and not rows.rows.empty
    values = rows.config[key].map(str)
    if (values.groupby(line_names(rows.config, key)).nunique() > 1).any():
        return True
    return len(rows.rows) >= _LEAST_POINTS and key in swept_numbers(rows.config)


def _is_short(values: pd.Series) -> bool:
    return bool(1 < values.dropna().map(repr).nunique() <= _MOST_VALUES)
