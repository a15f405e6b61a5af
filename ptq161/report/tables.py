"""Result tables: Markdown and HTML to read, LaTeX to print, CSV to compute with."""

from __future__ import annotations

import functools
import math
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import pandas as pd

from ptq161.report.collect import TRAININGS
from ptq161.report.keys import differing_keys
from ptq161.report.results import FULL, QUANTIZED, Results, method_name, metric_names
from ptq161.report.texts import NO_TEXT, UNKNOWN, comparisons, remark
from ptq161.tracking.metric_names import ROUNDED, SIZES, better, is_perplexity

_NOT_IN_PRINT = ["seconds", "GB", "commit"]
"""Columns that say nothing of the result itself."""
_LATEX_NAMES = {
    "\\": "textbackslash",
    "~": "textasciitilde",
    "^": "textasciicircum",
    "<": "textless",
    ">": "textgreater",
    "|": "textbar",
    "±": "textpm",
}
_LATEX: dict[int, str] = str.maketrans(
    {letter: f"\\{letter}" for letter in "&%$#_{}"} | {letter: f"\\{name}{{}}" for letter, name in _LATEX_NAMES.items()}
)


class Table(NamedTuple):
    """A result table: a row per result, and the same columns in all four.

    Attributes:
        text: each cell as it is read; empty where there is nothing. Of a path it is the last part.
        spread: standard error or interval beside it, as it is read.
        value: what a column is sorted by; None or NaN sorts last. Columns of numbers have a numeric type.
        better: 1 in a column where larger values are better, -1 where smaller ones are, 0 where neither is.
        note: what has to be said beside it; may be empty.
    """

    text: pd.DataFrame
    spread: pd.DataFrame
    value: pd.DataFrame
    better: pd.Series
    note: str

    @property
    def is_number(self) -> list[bool]:
        """For each column, whether it holds numbers, which are set to the right."""
        return [pd.api.types.is_numeric_dtype(kind) for kind in self.value.dtypes]


def configuration_keys(results: Results) -> list[str]:
    """Return the columns that tell results apart: ``mask_ratio`` and what else they differ in."""
    differing = differing_keys(results.quantized.config)
    first = ["mask_ratio"] if results.config["mask_ratio"].notna().any() else []
    return [*first, *(key for key in differing if key != "mask_ratio")]


def has_seeds(results: Results) -> bool:
    """Say whether a result has several seeds."""
    return bool((results.rows.runs.map(len) > 1).any())


def result_table(results: Results, metrics: Sequence[str] | None = None) -> Table:
    """Lay results out.

    Args:
        results: to show.
        metrics: names; None takes perplexities and accuracies, ``acc_norm`` left to the CSV file.
    """
    rows, text, value, order = results.rows, {}, {}, {}
    spread: dict[str, list[str]] = {}

    def add(heading: str, values: pd.Series, form: Callable[[Any], str] = str, direction: int = 0) -> None:
        value[heading], order[heading] = values, direction
        texts = [form(value) if is_there else "" for value, is_there in zip(values, values.notna(), strict=True)]
        text[heading] = pd.Series(texts, rows.index, dtype=str)

    add("method", rows.method.map(method_name))
    add("model", rows.model)
    for key in configuration_keys(results):
        add(key, _configured(results, key), lambda value: Path(value).name if isinstance(value, str) else str(value))
    add("calibration text", rows.calibration_text)
    if has_seeds(results):
        add("seeds", rows.seeds.str.split().str.len().replace(0, np.nan).astype(float), "{:.0f}".format)
    add("bits/weight", rows.bits, number_text, -1)
    add("nominal", rows.nominal_bits, number_text)
    for name in [n for n in metric_names(results) if not n.endswith("/acc_norm")] if metrics is None else metrics:
        score, heading = results.score(name), _heading(name)
        add(heading, score.value, functools.partial(metric_text, name), better(name))
        text[heading] = text[heading].mask(_is_nan(score), "nan")
        spread[heading] = [spread_text(name, row.low, row.high, row.standard_error) for row in score.itertuples()]
    add("seconds", rows.seconds, "{:.0f}".format, -1)
    add("GB", rows.peak_memory_bytes / 1e9, "{:.2f}".format, -1)
    add("commit", rows.commit)
    spreads = pd.DataFrame(spread, rows.index).reindex(columns=list(text), fill_value="")
    note = remark(results.quantized.rows)
    return Table(pd.DataFrame(text), spreads, pd.DataFrame(value), pd.Series(order), note)


def best_cells(table: Table, results: Results) -> pd.DataFrame:
    """Say where the best value of a column is among the quantized results that are compared, where there are several.

    A result that needs no text is in several comparisons, and marked where it is the best in one.
    """
    ordered = table.value.loc[:, table.better != 0].astype(float) * table.better[table.better != 0]
    finite = ordered.where(np.isfinite(ordered))
    best = pd.DataFrame(False, finite.index, finite.columns)
    for *_, rows in comparisons(results.quantized.rows):
        rivals = finite.loc[rows.index]
        best.loc[rows.index] |= (rivals == rivals.max()) & (rivals.count() > 1)
    return best.reindex(columns=table.text.columns, fill_value=False)


def markdown_table(table: Table) -> str:
    """Write a result table as Markdown, its note below it."""
    written = _markdown((table.text + " " + table.spread).map(str.strip), table.is_number)
    return f"{written}\n{table.note}\n" if table.note else written


def latex_table(table: Table, results: Results) -> str:
    """Write a result table as a LaTeX ``tabular`` for the booktabs package, the best values bold; its note below it."""
    best = best_cells(table, results)
    cells = table.text.map(_latex).where(~best, "\\textbf{" + table.text.map(_latex) + "}") + " "
    cells = (cells + table.spread.map(_latex)).map(str.strip).rename(columns=_latex)
    first = int((results.rows.kind != QUANTIZED).sum())
    if 0 < first < len(cells):
        cells.iloc[first, 0] = "\\midrule\n" + cells.iloc[first, 0]
    form = pd.Series(["r" if number else "l" for number in table.is_number], cells.columns).drop(_NOT_IN_PRINT)
    printed = cells[form.index].to_latex(index=False, escape=False, column_format="".join(form))
    note = f"\n\\par\\footnotesize {_latex(table.note)}\n" if table.note else ""
    return f"% needs \\usepackage{{booktabs}}\n{printed}{note}"


def csv_table(results: Results) -> str:
    """Lay results out as CSV: every metric with its standard error or interval, unrounded; full precision first."""
    rows = results.rows
    spreads = ["standard_error", *(["low", "high"] if has_seeds(results) else [])]
    table = {"method": rows.method, "model": rows.model}
    table |= {key: results.config[key] for key in configuration_keys(results)}
    table |= {"calibration_text": rows.calibration_text, "seeds": rows.seeds}
    sizes = [size for size in SIZES if size not in ROUNDED or size in set(results.scores.metric)]
    table |= {size: results.score(size).value for size in sizes}
    for name in metric_names(results):
        score = results.score(name)
        table[name] = score.value.astype(object).mask(_is_nan(score), "nan")
        table |= {f"{name} {spread}": score[spread] for spread in spreads}
    table |= {f"seconds {stage}": results.seconds[stage] for stage in results.seconds}
    table |= {name: rows[name] for name in ("seconds", "peak_memory_bytes", "commit", "run_dir")}
    # Bytes are whole numbers, which a column with gaps does not show; a mean of several seeds' may have a fraction.
    whole = {name: values.convert_dtypes() for name, values in table.items() if name.endswith("_bytes")}
    return str(pd.DataFrame(table | whole).to_csv(index=False))


def markdown_comparison(compared: pd.DataFrame) -> str:
    """Lay scores out beside the published ones, a score a row, with a table for each calibration text of the latter.

    Args:
        compared: of :func:`ptq161.report.published.compare`.
    """
    tables = compared.groupby("published_text", sort=False)
    return "\n".join(f"Published figures, {_calibration(str(text))}:\n\n{_comparison(rows)}" for text, rows in tables)


def _calibration(text: str) -> str:
    if text == NO_TEXT:
        return "which need no calibration"
    return "whose calibration text is not known" if text == UNKNOWN else f"calibrated on {text}"


def _comparison(compared: pd.DataFrame) -> str:
    cells = [
        (
            method_name(row.method),
            row.model,
            row.calibration_text,
            row.metric,
            metric_text(row.metric, row.published),
            metric_text(row.metric, row.ours),
            _difference(row.metric, row.difference, row.published),
            f"{row.source}, {row.table}".rstrip(", "),
        )
        for row in compared.itertuples()
    ]
    columns = ["method", "model", "our calibration text", "metric", "paper", "ours", "difference", "published in"]
    return _markdown(pd.DataFrame(cells, columns=columns), [4 <= i < 7 for i in range(len(columns))])


def csv_comparison(compared: pd.DataFrame) -> str:
    """Lay scores out beside the published ones as CSV, unrounded; ``compared`` as in :func:`markdown_comparison`."""
    ours = ["method", "model", "calibration_text", "metric"]
    columns = [*ours, "published_text", "published", "ours", "difference", "source", "table", "run_dir"]
    return str(compared[columns].to_csv(index=False))


def metric_text(metric: str, value: float) -> str:
    """Return a score as it is read: perplexities to two digits after the point at most, accuracies in per cent."""
    return number_text(value) if is_perplexity(metric) else f"{100 * value:.1f}"


def number_text(value: float) -> str:
    """Return a number with as many digits as one reads."""
    return f"{value:.3g}" if abs(value) >= 1e5 else f"{value:.1f}" if abs(value) >= 100 else f"{value:.2f}"


def spread_text(metric: str, low: float, high: float, standard_error: float) -> str:
    """Return a score's interval over seeds, or its standard error, as it is read; empty where all are NaN."""
    if not math.isnan(low):
        return f"[{metric_text(metric, low)}, {metric_text(metric, high)}]"
    return "" if math.isnan(standard_error) else f"± {metric_text(metric, standard_error)}"


def _configured(results: Results, key: str) -> pd.Series:
    is_unread = (results.rows.kind == FULL) & (key.partition(".")[0] in ("calib", *TRAININGS))
    return results.config[key].mask(is_unread, None)  # configured, but nothing was calibrated


def _heading(metric: str) -> str:
    name = metric.removeprefix("zero_shot/").replace("/", " ") if metric.startswith("zero_shot/") else metric
    return name if is_perplexity(metric) else f"{name} %"


def _is_nan(score: pd.DataFrame) -> pd.Series:
    """Say where a score is NaN, and not missing."""
    return score.value.isna() & score.metric.notna()


def _difference(metric: str, difference: float, paper: float) -> str:
    relative = f" ({100 * difference / paper:+.1f} %)" if math.isfinite(difference) and paper else ""
    return f"{'+' if difference >= 0 else ''}{metric_text(metric, difference)}{relative}"


def _markdown(cells: pd.DataFrame, is_number: Sequence[bool]) -> str:
    cells = cells.replace({r"\|": r"\\|", "\n": " "}, regex=True)
    align = ["right" if number else "left" for number in is_number]
    return f"{cells.to_markdown(index=False, colalign=align, disable_numparse=True)}\n"


def _latex(text: str) -> str:
    return " ".join(text.translate(_LATEX).split())
