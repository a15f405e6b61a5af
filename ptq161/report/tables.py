"""Result tables: Markdown and HTML to read, LaTeX to print, CSV to compute with."""

from __future__ import annotations

import csv
import dataclasses
import io
import math
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from ptq161.report.collect import FULL_PRECISION
from ptq161.report.published import Comparison
from ptq161.report.results import Result, baselines, differing_keys, is_quantized, method_name, metric_names, quantized
from ptq161.report.seeds import Estimate
from ptq161.tracking.metric_names import SIZES, is_perplexity

LATEX = {**{c: f"\\{c}" for c in "&%$#_{}"}, "\\": r"\textbackslash{}", "~": r"\textasciitilde{}"}
LATEX |= {"±": r"$\pm$", "^": r"\textasciicircum{}", "<": r"\textless{}", ">": r"\textgreater{}", "|": r"\textbar{}"}


@dataclasses.dataclass(frozen=True)
class Column:
    """A column of a result table.

    Attributes:
        heading: what stands above it.
        is_number: numbers are set to the right.
        better: 1 where larger values are better, -1 where smaller ones are, 0 where neither is.
        is_result: False for what a printed table leaves out, such as the commit.
    """

    heading: str
    is_number: bool = True
    better: int = 0
    is_result: bool = True


@dataclasses.dataclass(frozen=True)
class Cell:
    """A cell of a result table.

    Attributes:
        text: as it is read; empty where there is nothing. Of a path it is the last part.
        spread: standard error or interval beside it, as it is read.
        value: what the column is sorted by; None sorts last.
        is_best: whether no quantized result of the same model has a better value in the column.
    """

    text: str
    spread: str = ""
    value: float | str | None = None
    is_best: bool = False


@dataclasses.dataclass(frozen=True)
class Table:
    """A result table: full precision first.

    Attributes:
        columns: of the table.
        rows: a tuple of cells for each of ``results``.
        results: what the rows show.
    """

    columns: list[Column]
    rows: list[tuple[Cell, ...]]
    results: list[Result]


def result_rows(results: Sequence[Result]) -> list[Result]:
    """Return the rows of a result table: full precision first, then the others in their order."""
    return [*baselines(results), *quantized(results)]


def configuration_keys(results: Sequence[Result]) -> list[str]:
    """Return the columns that tell results apart: ``mask_ratio`` and what else they differ in."""
    differing = differing_keys(quantized(results))
    reads_mask_ratio = any(result.value("mask_ratio") is not None for result in results)
    return [*(["mask_ratio"] if reads_mask_ratio else []), *(key for key in differing if key != "mask_ratio")]


def result_table(results: Sequence[Result], metrics: Sequence[str] | None = None) -> Table:
    """Lay results out, a result a row.

    Args:
        results: to show.
        metrics: names; None takes perplexities and accuracies, ``acc_norm`` left to the CSV file.
    """
    rows, keys = result_rows(results), configuration_keys(results)
    names = [name for name in metric_names(rows) if not name.endswith("/acc_norm")] if metrics is None else metrics
    has_seeds = any(len(row.runs) > 1 for row in rows)
    columns = [Column("method", False), Column("model", False), *(Column(key, False) for key in keys)]
    columns += [Column("seeds")] * has_seeds + [Column("bits/weight", better=-1), Column("nominal")]
    columns += [Column(_heading(name), better=-1 if is_perplexity(name) else 1) for name in names]
    columns += [Column("seconds", better=-1, is_result=False), Column("GB", better=-1, is_result=False)]
    columns += [Column("commit", False, is_result=False)]
    cells = [
        (
            *[_text(method_name(row.method)), _text(row.model), *(_configured(row, key) for key in keys)],
            *[_number(len(row.seeds) or None, "{:.0f}")] * has_seeds,
            *[_size(row, "bits_per_weight"), _size(row, "nominal_bits_per_weight")],
            *(_score(row.estimates.get(name), name) for name in names),
            *[_number(row.total_seconds, "{:.0f}"), _number(_gigabytes(row), "{:.2f}")],
            _text(row.commit or ""),
        )
        for row in rows
    ]
    return Table(columns, _marked(columns, cells, rows), rows)


def markdown_table(table: Table) -> str:
    """Write a result table as Markdown."""
    lines = [_line([column.heading for column in table.columns])]
    lines += [_line(["---:" if column.is_number else "---" for column in table.columns])]
    lines += [_line([f"{cell.text} {cell.spread}".strip() for cell in row]) for row in table.rows]
    return "\n".join(lines) + "\n"


def latex_table(table: Table) -> str:
    """Write a result table as a LaTeX ``tabular`` for the booktabs package, the best values bold."""
    shown = [i for i, column in enumerate(table.columns) if column.is_result]
    lines = [r"% needs \usepackage{booktabs}"]
    lines += [
        rf"\begin{{tabular}}{{{''.join('r' if table.columns[i].is_number else 'l' for i in shown)}}}",
        r"\toprule",
    ]
    lines += [_latex_line([_latex(table.columns[i].heading) for i in shown]), r"\midrule"]
    body = [_latex_line([_latex_cell(row[i]) for i in shown]) for row in table.rows]
    n_baselines = sum(not is_quantized(result) for result in table.results)
    if 0 < n_baselines < len(body):
        body.insert(n_baselines, r"\midrule")
    lines += body
    return "\n".join([*lines, r"\bottomrule", r"\end{tabular}"]) + "\n"


def csv_table(results: Sequence[Result]) -> str:
    """Lay results out as CSV: every metric with its standard error or interval, unrounded; full precision first."""
    rows, keys = result_rows(results), configuration_keys(results)
    names = metric_names(rows)
    stages = list(dict.fromkeys(stage for row in rows for stage in row.seconds))
    spreads = ["standard_error", *(["low", "high"] if any(len(row.runs) > 1 for row in rows) else [])]
    header = ["method", "model", *keys, "seeds", *SIZES]
    header += [column for name in names for column in (name, *(f"{name} {spread}" for spread in spreads))]
    header += [*(f"seconds {stage}" for stage in stages), "seconds", "peak_memory_bytes", "commit", "run_dir"]
    table: list[list[Any]] = [header]
    for row in rows:
        line = [
            row.method,
            row.model,
            *map(row.value, keys),
            " ".join(map(str, row.seeds)),
            *map(row.metrics.get, SIZES),
        ]
        for name in names:
            found = row.estimates.get(name)
            line += (
                [None] * (1 + len(spreads)) if found is None else [found.value, *(getattr(found, s) for s in spreads)]
            )
        line += [*map(row.seconds.get, stages), row.total_seconds, row.peak_memory_bytes, row.commit]
        table.append([*line, " ".join(str(run.run_dir) for run in row.runs if run.run_dir)])
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
                    *[method_name(entry.result.method), entry.result.model, name],
                    *[metric_text(name, paper), metric_text(name, entry.value)],
                    f"{sign}{metric_text(name, entry.difference)}{relative}",
                    f"{entry.published.source}, {entry.published.table}".rstrip(", "),
                ]
            )
        )
    return "\n".join(lines) + "\n"


def csv_comparison(comparisons: Sequence[Comparison]) -> str:
    """Lay scores out beside the published ones as CSV, unrounded."""
    rows = [
        [
            *[entry.result.method, entry.result.model, entry.published.metric],
            *[entry.published.value, entry.value, entry.difference, entry.published.source, entry.published.table],
            " ".join(str(run.run_dir) for run in entry.result.runs),
        ]
        for entry in comparisons
    ]
    header = ["method", "model", "metric", "published", "ours", "difference", "source", "table", "run_dir"]
    return _csv([header, *rows])


def metric_text(metric: str, value: float) -> str:
    """Return a score as it is read: perplexities to two digits after the point at most, accuracies in per cent."""
    return number_text(value) if is_perplexity(metric) else f"{100 * value:.1f}"


def number_text(value: float) -> str:
    """Return a number with as many digits as one reads."""
    return f"{value:.3g}" if abs(value) >= 1e5 else f"{value:.1f}" if abs(value) >= 100 else f"{value:.2f}"


def spread_text(metric: str, found: Estimate) -> str:
    """Return a score's interval over seeds, or its standard error, as it is read; empty where it has neither."""
    if found.low is not None and found.high is not None:
        return f"[{metric_text(metric, found.low)}, {metric_text(metric, found.high)}]"
    return "" if found.standard_error is None else f"± {metric_text(metric, found.standard_error)}"


def _marked(
    columns: Sequence[Column], rows: Sequence[tuple[Cell, ...]], results: Sequence[Result]
) -> list[tuple[Cell, ...]]:
    """Mark the best value of each column among the quantized results of each model, where there are several."""
    marked = [list(row) for row in rows]
    for model in {result.model for result in results}:
        mine = [i for i, r in enumerate(results) if r.model == model and is_quantized(r)]
        for j, column in enumerate(columns):
            values = {i: v for i in mine if isinstance(v := rows[i][j].value, float) and math.isfinite(v)}
            if column.better and len(values) > 1:
                best = max(column.better * value for value in values.values())
                for i, value in values.items():
                    marked[i][j] = dataclasses.replace(rows[i][j], is_best=column.better * value == best)
    return [tuple(row) for row in marked]


def _text(text: str) -> Cell:
    return Cell(text, value=text)


def _number(value: float | None, form: str) -> Cell:
    return Cell("") if value is None else Cell(form.format(value), value=float(value))


def _configured(result: Result, key: str) -> Cell:
    value = result.value(key)
    if result.method == FULL_PRECISION and key.partition(".")[0] in ("calib", "preprocess"):
        return Cell("")  # configured, but nothing was calibrated
    if isinstance(value, int | float) and not isinstance(value, bool):
        return Cell(str(value), value=float(value))
    if isinstance(value, str):
        return Cell(Path(value).name, value=value)
    return Cell("") if value is None else _text(str(value))


def _size(result: Result, name: str) -> Cell:
    value = result.metrics.get(name)
    return Cell("") if value is None else Cell(number_text(value), value=float(value))


def _score(found: Estimate | None, metric: str) -> Cell:
    if found is None:
        return Cell("")
    value = None if math.isnan(found.value) else float(found.value)
    return Cell(metric_text(metric, found.value), spread_text(metric, found), value)


def _gigabytes(result: Result) -> float | None:
    return None if result.peak_memory_bytes is None else result.peak_memory_bytes / 1e9


def _csv(table: Sequence[Sequence[Any]]) -> str:
    stream = io.StringIO()
    csv.writer(stream, lineterminator="\n").writerows(table)
    return stream.getvalue()


def _line(cells: Sequence[str]) -> str:
    return f"| {' | '.join(cell.replace('|', chr(92) + '|').replace(chr(10), ' ') for cell in cells)} |"


def _latex_line(cells: Sequence[str]) -> str:
    return f"{' & '.join(cells)} \\\\"


def _latex_cell(cell: Cell) -> str:
    text = _latex(cell.text)
    if cell.is_best:
        text = rf"\textbf{{{text}}}"
    return f"{text} {_latex(cell.spread)}".strip()


def _latex(text: str) -> str:
    return "".join(LATEX.get(character, character) for character in text.replace("\n", " "))


def _heading(metric: str) -> str:
    name = metric.removeprefix("zero_shot/").replace("/", " ") if metric.startswith("zero_shot/") else metric
    return name if is_perplexity(metric) else f"{name} %"
