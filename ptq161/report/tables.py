"""Result tables: Markdown to read, CSV to compute with."""

from __future__ import annotations

import csv
import io
import math
from collections.abc import Sequence
from typing import Any

from ptq161.report.collect import (
    FULL_PRECISION,
    Run,
    differing_keys,
    full_precision_runs,
    is_perplexity,
    metric_names,
    quantized_runs,
)
from ptq161.report.published import Comparison
from ptq161.report.table import SIZES


def result_rows(runs: Sequence[Run]) -> list[Run]:
    """Return the rows of a result table: full precision first, then the others in their order."""
    return [*full_precision_runs(runs), *quantized_runs(runs)]


def configuration_keys(runs: Sequence[Run]) -> list[str]:
    """Return the columns that tell runs apart: ``mask_ratio`` and what else they differ in."""
    differing = differing_keys(quantized_runs(runs))
    reads_mask_ratio = any(run.value("mask_ratio") is not None for run in runs)
    return [*(["mask_ratio"] if reads_mask_ratio else []), *(key for key in differing if key != "mask_ratio")]


def markdown_table(runs: Sequence[Run], metrics: Sequence[str] | None = None) -> str:
    """Lay runs out as Markdown, a run a row.

    Args:
        runs: finished runs.
        metrics: names; None takes perplexities and accuracies, ``acc_norm`` left to the CSV file.
    """
    rows, keys = result_rows(runs), configuration_keys(runs)
    names = [name for name in metric_names(rows) if not name.endswith("/acc_norm")] if metrics is None else metrics
    header = ["method", "model", *keys, "bits/weight", "nominal", *map(_heading, names), "seconds", "commit"]
    text = 2 + len(keys)
    lines = [_line(header), _line(["---" if i < text else "---:" for i in range(len(header) - 1)] + ["---"])]
    for run in rows:
        cells = [
            method_name(run.method),
            run.model,
            *(_configured(run, key) for key in keys),
            _number(run.bits),
            _number(run.nominal_bits),
            *(_score(run, name) for name in names),
            "" if run.total_seconds is None else f"{run.total_seconds:.0f}",
            run.commit or "",
        ]
        lines.append(_line(cells))
    return "\n".join(lines) + "\n"


def csv_table(runs: Sequence[Run]) -> str:
    """Lay runs out as CSV: every metric with its standard error, unrounded; full precision first."""
    rows, keys = result_rows(runs), configuration_keys(runs)
    names = metric_names(rows)
    stages = list(dict.fromkeys(stage for run in rows for stage in run.seconds))
    table: list[list[Any]] = [
        [
            *["method", "model", *keys, *SIZES],
            *(column for name in names for column in (name, f"{name} standard_error")),
            *[*(f"seconds {stage}" for stage in stages), "seconds", "commit", "run_dir"],
        ]
    ]
    for run in rows:
        scores = [value for name in names for value in (run.metrics.get(name), run.standard_errors.get(name))]
        table.append(
            [
                *[run.method, run.model, *map(run.value, keys), *map(run.metrics.get, SIZES), *scores],
                *[*map(run.seconds.get, stages), run.total_seconds, run.commit, run.run_dir],
            ]
        )
    return _csv(table)


def markdown_comparison(comparisons: Sequence[Comparison]) -> str:
    """Lay scores out beside the published ones, a score a row."""
    header = ["method", "model", "metric", "paper", "ours", "difference", "published in"]
    lines = [_line(header), _line(["---", "---", "---", "---:", "---:", "---:", "---"])]
    for entry in comparisons:
        name, paper = entry.published.metric, entry.published.value
        relative = f" ({100 * entry.difference / paper:+.1f} %)" if math.isfinite(entry.difference) and paper else ""
        sign = "+" if entry.difference >= 0 else ""
        lines.append(
            _line(
                [
                    *[method_name(entry.run.method), entry.run.model, name],
                    *[_metric(name, paper), _metric(name, entry.value)],
                    f"{sign}{_metric(name, entry.difference)}{relative}",
                    f"{entry.published.source}, {entry.published.table}".rstrip(", "),
                ]
            )
        )
    return "\n".join(lines) + "\n"


def csv_comparison(comparisons: Sequence[Comparison]) -> str:
    """Lay scores out beside the published ones as CSV, unrounded."""
    rows = [
        [
            *[entry.run.method, entry.run.model, entry.published.metric],
            *[entry.published.value, entry.value, entry.difference],
            *[entry.published.source, entry.published.table, entry.run.run_dir],
        ]
        for entry in comparisons
    ]
    header = ["method", "model", "metric", "published", "ours", "difference", "source", "table", "run_dir"]
    return _csv([header, *rows])


def method_name(method: str) -> str:
    """Return what a reader calls a method."""
    return "full precision" if method == FULL_PRECISION else method


def _csv(table: Sequence[Sequence[Any]]) -> str:
    stream = io.StringIO()
    csv.writer(stream, lineterminator="\n").writerows(table)
    return stream.getvalue()


def _line(cells: Sequence[str]) -> str:
    return f"| {' | '.join(cell.replace('|', chr(92) + '|').replace(chr(10), ' ') for cell in cells)} |"


def _heading(metric: str) -> str:
    name = metric.removeprefix("zero_shot/").replace("/", " ") if metric.startswith("zero_shot/") else metric
    return name if is_perplexity(metric) else f"{name} %"


def _configured(run: Run, key: str) -> str:
    value = run.value(key)
    return "" if value is None else str(value)


def _score(run: Run, metric: str) -> str:
    if metric not in run.metrics:
        return ""
    error = run.standard_errors.get(metric)
    value = _metric(metric, run.metrics[metric])
    return value if error is None else f"{value} ± {_metric(metric, error)}"


def _metric(metric: str, value: float) -> str:
    return _number(value) if is_perplexity(metric) else f"{100 * value:.1f}"


def _number(value: float | None) -> str:
    if value is None:
        return ""
    return f"{value:.3g}" if abs(value) >= 1e5 else f"{value:.1f}" if abs(value) >= 100 else f"{value:.2f}"
