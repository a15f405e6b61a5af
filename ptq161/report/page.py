"""The report page: one HTML file that works from disk without a network."""

from __future__ import annotations

import json
from collections.abc import Iterable, Mapping, Sequence
from importlib.resources import files
from typing import Any

import jinja2
from plotly.offline import get_plotlyjs
from plotly.utils import PlotlyJSONEncoder

from ptq161.report.collect import FULL_PRECISION, Run
from ptq161.report.interactive import Chart
from ptq161.report.results import Result, drawable, label, quantized
from ptq161.report.sections import Section
from ptq161.report.tables import Table, metric_text, number_text, spread_text
from ptq161.tracking.metric_names import is_perplexity


def page(
    table: Table, labels: Sequence[str], found: Sequence[Section], problems: Sequence[str], metrics: Sequence[str]
) -> str:
    """Return the page.

    Args:
        table: the result table, whose rows are all results.
        labels: what tells each row from the others.
        found: the figures.
        problems: one sentence for each thing that could not be read.
        metrics: scores that are summed up at the top.
    """
    results = table.results
    runs = [run for result in results for run in result.runs if run.run_dir]
    numbers = {id(run): i for i, run in enumerate(runs)}
    shared = _shared(runs)
    # The summary names a single model already.
    several_models = len({result.model for result in results}) > 1
    shown = [i for i, column in enumerate(table.columns) if several_models or column.heading != "model"]
    environment = jinja2.Environment(autoescape=True, trim_blocks=True, lstrip_blocks=True)
    folder = files("ptq161.report")
    return environment.from_string(folder.joinpath("page.html").read_text(encoding="utf-8")).render(
        style=folder.joinpath("page.css").read_text(encoding="utf-8"),
        script=folder.joinpath("page.js").read_text(encoding="utf-8"),
        plotly=get_plotlyjs(),
        summary=_summary(results, runs),
        highlights=[line for metric in metrics for line in _highlights(results, metric)],
        columns=[table.columns[i] for i in shown],
        rows=_rows(table, labels, shown),
        has_seeds=any(len(result.runs) > 1 for result in results),
        sections=[
            {
                "section": section,
                "charts": _charts(section.charts.values()),
                "runs": [numbers[id(run)] for run in section.runs if id(run) in numbers],
            }
            for section in found
        ],
        problems=problems,
        shared=shared,
        runs=[_described(run, shared) for run in runs],
    )


def _rows(table: Table, labels: Sequence[str], shown: Sequence[int]) -> list[dict[str, Any]]:
    n_baselines = len(table.results) - len(quantized(table.results))
    return [
        {"cells": [row[j] for j in shown], "label": text, "is_baseline": i < n_baselines, "runs": result.runs}
        for i, (row, text, result) in enumerate(zip(table.rows, labels, table.results, strict=True))
    ]


def _summary(results: Sequence[Result], runs: Sequence[Run]) -> str:
    def count(number: int, noun: str) -> str:
        return f"{number:,} {noun}{'' if number == 1 else 's'}"

    parts = [f"{count(len(quantized(results)), 'result')} from {count(len(runs), 'run')}"]
    for noun, names in (
        ("model", dict.fromkeys(result.model for result in results)),
        ("method", dict.fromkeys(result.method for result in quantized(results))),
        ("commit", dict.fromkeys(run.commit for run in runs if run.commit)),
    ):
        if names:
            parts.append(", ".join(names) if len(names) <= 3 else count(len(names), noun))
    days = sorted(run.started[:10] for run in runs if run.started)
    if days:
        parts.append(days[0] if days[0] == days[-1] else f"{days[0]} to {days[-1]}")
    return " · ".join(parts)


def _highlights(results: Sequence[Result], metric: str) -> list[dict[str, str]]:
    """Return each model's best quantized result by a metric, with what it costs and what full precision scores."""
    found = []
    for model in dict.fromkeys(result.model for result in results):
        rows = [r for r in quantized(results) if r.model == model and drawable(metric, r.metrics.get(metric))]
        full = [r for r in results if r.model == model and r.method == FULL_PRECISION and metric in r.metrics]
        if not rows:
            continue
        best = min(rows, key=lambda row: row.metrics[metric] if is_perplexity(metric) else -row.metrics[metric])
        unit = "" if is_perplexity(metric) else " %"
        bits = f" at {number_text(best.bits)} bits" if best.bits is not None else ""
        reference = f", full precision {metric_text(metric, full[0].metrics[metric])}{unit}" if full else ""
        found.append(
            {
                "metric": f"{'lowest' if unit == '' else 'highest'} {metric}, {model}",
                "value": f"{metric_text(metric, best.metrics[metric])}{unit}",
                "spread": spread_text(metric, best.estimates[metric]),
                "where": f"{label(best, ())}{bits}{reference}",
            }
        )
    return found


def _charts(charts: Iterable[Chart]) -> str:
    """Return charts as JSON that may stand in a script element; numbers that JSON does not know become null."""
    return json.dumps(list(charts), cls=PlotlyJSONEncoder).replace("<", "\\u003c")


def _shared(runs: Sequence[Run]) -> dict[str, Any]:
    """Return the configuration that all runs have in common."""
    if not runs:
        return {}
    first, others = runs[0].config, runs[1:]
    return {key: value for key, value in first.items() if all(run.config.get(key, ...) == value for run in others)}


def _described(run: Run, shared: Mapping[str, Any]) -> dict[str, Any]:
    return {
        "folder": str(run.run_dir),
        "seed": run.seed,
        "commit": run.commit or "",
        "reused_from": run.reused_from,
        "started": (run.started or "")[:16].replace("T", " "),
        "config": {
            key: value if isinstance(value, int | str) else json.dumps(value)
            for key, value in run.config.items()
            if key not in shared and key not in ("seed", "method._target_") and not key.startswith("tracker.")
        },
    }
