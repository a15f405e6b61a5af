"""The table that a run prints at its end: a column for each model that it scored."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from rich.table import Table

from ptq161.console import stdout_console
from ptq161.tracking.metric_names import SIZES


def print_results(results: Mapping[str, Any], run_dir: str) -> None:
    """Print a run's results, the path of its record, and the command of its report."""
    console = stdout_console()
    console.print(_results_table(results))
    seconds = ", ".join(f"{stage} {value:.0f} s" for stage, value in results["seconds"].items())
    console.print(f"Time: {seconds}. Peak memory: {results['peak_memory_bytes'] / 1e9:.2f} GB.")
    console.print(f"Record: {run_dir}", soft_wrap=True)
    console.print(f"Report: python -m ptq161.report {run_dir} --out FOLDER", soft_wrap=True)


def _results_table(results: Mapping[str, Any]) -> Table:
    """Return a table of a run's results, a metric a row.

    Args:
        results: the content of ``results.json``.
    """
    metrics, protocol = results["metrics"], results["protocol"]
    models = _models(results)
    *others, last = models
    table = Table(title=" against ".join(filter(None, [" and ".join(others), last])).capitalize())
    for column in ("metric", *models, "± se", "scored on"):
        table.add_column(column, justify="left" if column in ("metric", "scored on") else "right", no_wrap=True)
    scores, sizes = [n for n in metrics if n not in SIZES], [n for n in SIZES if n in metrics]
    for name in scores + sizes:
        settings = protocol.get(name, {})
        error = settings.get("standard_error")
        cells = [_format(name, values.get(name)) for values in models.values()]
        table.add_row(name, *cells, "" if error is None else f"{error:.3g}", _scored_on(settings))
    return table


def _models(results: Mapping[str, Any]) -> dict[str, Mapping[str, float]]:
    """Return the models that a run scored: name -> values. A run has one alone, or compares two to four."""
    metrics, full = results["metrics"], results["full_precision"]
    if metrics == full:  # method=none
        return {"full precision": full}
    before = results.get("before_finetune")
    scored = {"full precision": full, "merged": results.get("merged"), "quantized": before or metrics}
    if before:
        scored["finetuned"] = metrics
    return {name: values for name, values in scored.items() if values}


def _format(name: str, value: float | None) -> str:
    if value is None:
        return "-"
    if name.endswith("_bytes"):
        return f"{value / 1e6:.2f} MB"
    if name.startswith("zero_shot/") and "perplexity" not in name:
        return f"{100 * value:.1f} %"
    return f"{value:.4g}" if value >= 1e4 else f"{value:.2f}"


def _scored_on(settings: Mapping[str, Any]) -> str:
    for unit in ("tokens", "documents"):
        if f"n_{unit}" in settings:
            return f"{settings[f'n_{unit}']} {unit}"
    return ""
