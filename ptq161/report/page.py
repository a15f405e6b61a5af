"""The report page: one HTML file that works from disk without a network."""

from __future__ import annotations

import json
from collections.abc import Iterable, Mapping, Sequence
from importlib.resources import files
from typing import Any

import jinja2
import plotly.graph_objects as go
from plotly.offline import get_plotlyjs

from ptq161.report.collect import Run
from ptq161.report.results import FULL, QUANTIZED, Results
from ptq161.report.sections import Section
from ptq161.report.tables import Table, best_cells, has_seeds, metric_text, number_text, spread_text
from ptq161.report.texts import comparisons
from ptq161.tracking.metric_names import better, is_perplexity


def page(
    results: Results,
    table: Table,
    found: Sequence[Section],
    problems: Sequence[str],
    metrics: Sequence[str],
) -> str:
    """Return the page.

    Args:
        results: of the report.
        table: the result table, with a row for each of them.
        found: the figures.
        problems: one sentence for each thing that could not be read.
        metrics: scores that are summed up at the top.
    """
    runs = [run for seeds in results.rows.runs for run in seeds if run.run_dir]
    numbers = {id(run): i for i, run in enumerate(runs)}
    shared = _shared(runs)
    # The summary names a single model already.
    shown = [heading for heading in table.text if heading != "model" or results.rows.model.nunique() > 1]
    is_number = dict(zip(table.text, table.is_number, strict=True))
    environment = jinja2.Environment(autoescape=True, trim_blocks=True, lstrip_blocks=True)
    folder = files("ptq161.report")
    return environment.from_string(folder.joinpath("page.html").read_text(encoding="utf-8")).render(
        style=folder.joinpath("page.css").read_text(encoding="utf-8"),
        script=folder.joinpath("page.js").read_text(encoding="utf-8"),
        plotly=get_plotlyjs(),
        summary=_summary(results, runs),
        highlights=[line for metric in metrics for line in _highlights(results, metric, names_text=bool(table.note))],
        columns=[
            {"heading": heading, "is_number": is_number[heading], "better": table.better[heading]} for heading in shown
        ],
        rows=_rows(results, table, shown),
        has_seeds=has_seeds(results),
        note=table.note,
        sections=[
            {
                "section": section,
                "charts": _charts(section.charts.values()),
                "runs": [numbers[id(run)] for run in section.runs],
            }
            for section in found
            if section.charts
        ],
        problems=problems,
        shared=shared,
        runs=[_described(run, shared) for run in runs],
    )


def _rows(results: Results, table: Table, columns: Sequence[str]) -> list[dict[str, Any]]:
    """Return what the page says of each result: its cells and what tells it from the others."""
    value = table.value.astype(object).where(table.value.notna(), None)
    parts = (table.text, table.spread, value, best_cells(table, results))
    cells = zip(*(part[columns].itertuples(index=False, name=None) for part in parts), strict=True)
    return [
        {
            "cells": zip(*row, strict=True),
            "label": result.label,
            "is_quantized": result.kind == QUANTIZED,
            "runs": result.runs,
        }
        for row, result in zip(cells, results.rows.itertuples(), strict=True)
    ]


def _summary(results: Results, runs: Sequence[Run]) -> str:
    def count(number: int, noun: str) -> str:
        return f"{number:,} {noun}{'' if number == 1 else 's'}"

    rows = results.quantized.rows
    parts = [f"{count(len(rows), 'result')} from {count(len(runs), 'run')}"]
    for noun, names in (
        ("model", results.rows.model.unique()),
        ("method", rows.method.unique()),
        ("commit", dict.fromkeys(run.commit for run in runs if run.commit)),
    ):
        if len(names):
            parts.append(", ".join(names) if len(names) <= 3 else count(len(names), noun))
    days = sorted(run.started[:10] for run in runs if run.started)
    if days:
        parts.append(days[0] if days[0] == days[-1] else f"{days[0]} to {days[-1]}")
    return " · ".join(parts)


def _highlights(results: Results, metric: str, *, names_text: bool) -> list[dict[str, str]]:
    """Return the best quantized result of each comparison, with what it costs and what full precision scores."""
    found = []
    word, unit = ("lowest", "") if is_perplexity(metric) else ("highest", " %")
    scored = results.of(metric)
    for model, text, quantized in comparisons(scored[scored.kind == QUANTIZED]):
        full = scored[(scored.kind == FULL) & (scored.model == model)]
        best = quantized.loc[(better(metric) * quantized.value).idxmax()]
        bits = "" if best.isna().bits else f" at {number_text(best.bits)} bits"
        reference = "" if full.empty else f", full precision {metric_text(metric, full.value.iloc[0])}{unit}"
        found.append(
            {
                "metric": f"{word} {metric}, {model}{f', calibration text {text}' if names_text else ''}",
                "value": f"{metric_text(metric, best.value)}{unit}",
                "spread": spread_text(metric, best.low, best.high, best.standard_error),
                "where": f"{best.method}{bits}{reference}",
            }
        )
    return found


def _charts(charts: Iterable[go.Figure]) -> str:
    """Return figures as JSON that may stand in a script element."""
    return f"[{','.join(chart.to_json(engine='json') for chart in charts)}]".replace("<", "\\u003c")


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
