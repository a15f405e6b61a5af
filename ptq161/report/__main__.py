"""Tables, figures and one page of runs, from their records alone.

Usage::

    python -m ptq161.report multirun/2026-01-01/12-00-00 --out experiments/mask_ratio
    python -m ptq161.report RUNS... --out FOLDER --x calib.n_samples --metric ppl/boolq@512
    python -m ptq161.report RUNS... --out FOLDER --published experiments/baselines/published.csv
"""

from __future__ import annotations

import argparse
import sys
from collections.abc import Mapping, Sequence
from pathlib import Path

from matplotlib.figure import Figure

from ptq161.errors import UserError
from ptq161.report import block_figures
from ptq161.report.collect import FULL_PRECISION, collect
from ptq161.report.details import Details, chosen_runs, read_details
from ptq161.report.figures import bits_figure, positions, render, sweep_figure
from ptq161.report.page import page
from ptq161.report.published import Published, compare, read_published
from ptq161.report.results import Result, differing_keys, labels, metric_names, quantized, results_of, swept_numbers
from ptq161.report.sections import sections
from ptq161.report.tables import (
    Table,
    csv_comparison,
    csv_table,
    latex_table,
    markdown_comparison,
    markdown_table,
    result_rows,
    result_table,
)
from ptq161.report.variant_figures import variants_figure
from ptq161.tracking.metric_names import is_perplexity

MOST_HIGHLIGHTS = 4
MOST_SWEEPS = 4


def main(arguments: Sequence[str] | None = None) -> int:
    """Run the program.

    Args:
        arguments: of the command line; None takes the process's own.

    Returns:
        the exit status: 1, with one sentence on stderr, for bad input.
    """
    options = _parser().parse_args(arguments)
    try:
        report(options.runs, options.out, x=options.x, metrics=options.metric, published_file=options.published)
    except UserError as error:
        print(error, file=sys.stderr)
        return 1
    return 0


def report(
    folders: Sequence[str],
    out: str,
    *,
    x: str | None = None,
    metrics: Sequence[str] | None = None,
    published_file: str | None = None,
) -> None:
    """Write the page, the tables and the figures; and what cannot be read, to stderr.

    ``index.html`` (the page), ``table.md``, ``results.csv``, ``results.tex``, ``figure.svg`` and ``figure.png``, and
    further figures in ``figures``; with published figures also ``comparison.csv``, where any of them matches a result.

    Args:
        folders: run and sweep directories.
        out: folder that is made where it does not exist.
        x: key that the figure's axis shows; None takes the one number that the results differ in, and draws measured
            bits against perplexity where there is none or more than one.
        metrics: scores to show; None shows all in the table, and perplexities in the figure where there are any.
        published_file: CSV file of published figures (:mod:`ptq161.report.published`).

    Raises:
        UserError: a folder does not exist or holds no finished run, a key or metric is unknown, a file cannot be read
            or written.
    """
    if missing := [folder for folder in folders if not Path(folder).is_dir()]:
        raise UserError(f"{missing[0]}: there is no such folder; give run or sweep directories.")
    published = read_published(published_file) if published_file else []
    found = collect(folders)
    results = results_of(found.runs, found.problems)
    rows = result_rows(results)
    names = labels(rows)
    details = [read_details(run, text, found.problems) for run, text in chosen_runs(rows, names)]
    for problem in found.problems:
        print(problem, file=sys.stderr)
    if not results:
        raise UserError(f"no finished run is in {', '.join(folders)}.")
    _check(results, x, metrics)
    table = result_table(results, metrics)
    files: dict[str, str | bytes] = {"table.md": markdown_table(table), "results.csv": csv_table(results)}
    files["results.tex"] = latex_table(table)
    comparisons = [c for c in compare(results, published) if not metrics or c.published.metric in metrics]
    if comparisons:
        files["table.md"] = f"{files['table.md']!s}\n{markdown_comparison(comparisons)}"
        files["comparison.csv"] = csv_comparison(comparisons)
    elif published:
        print(f"no run has the model, method and metric of a figure in {published_file}.", file=sys.stderr)
    figures = _figures(rows, names, details, x, _shown(results, metrics), published)
    drawn = {id(figure): render(figure) for figure in {id(f): f for f in figures.values()}.values()}
    for name, figure in figures.items():
        files |= {f"{name}.{kind}": content for kind, content in drawn[id(figure)].items()}
    files["index.html"] = _page(table, names, details, found.problems, x, metrics, published)
    _write(Path(out), files)


def _page(
    table: Table,
    names: Sequence[str],
    details: Sequence[Details],
    problems: Sequence[str],
    x: str | None,
    metrics: Sequence[str] | None,
    published: Sequence[Published],
) -> str:
    scores = list(metrics or [name for name in metric_names(table.results) if not name.endswith("/acc_norm")])
    charts = sections(table.results, names, details, scores, x=x, published=published)
    highlights = [name for name in scores if name.startswith("ppl/")] or scores
    return page(table, names, charts, problems, highlights[:MOST_HIGHLIGHTS])


def _figures(
    results: Sequence[Result],
    names: Sequence[str],
    details: Sequence[Details],
    x: str | None,
    metrics: Sequence[str],
    published: Sequence[Published],
) -> dict[str, Figure]:
    """Draw what is printed: ``figure`` is the one that says most, the others show more of the runs."""
    rows = quantized(results)
    swept = [x] if x else swept_numbers(rows)
    figures: dict[str, Figure] = {}
    for key in swept[:MOST_SWEEPS]:
        _, are_numbers = positions([row.value(key) for row in rows if row.value(key) is not None])
        draw_sweep = sweep_figure if are_numbers else variants_figure
        figures[f"figures/sweep_{key}"] = draw_sweep(results, key, metrics)
    if any(row.bits is not None and metric in row.metrics for row in rows for metric in metrics):
        perplexities = [name for name in metrics if is_perplexity(name)]
        figures["figures/bits"] = bits_figure(results, perplexities or metrics, published)
    is_sweep = x is not None or (len(swept) == 1 and len({row.method for row in rows}) == 1)
    figures["figure"] = figures[f"figures/sweep_{swept[0]}" if is_sweep else "figures/bits"]
    measured = [(row, name) for row, name in zip(results, names, strict=True) if row.seconds and row.runs[0].run_dir]
    if measured:
        figures["figures/cost"] = block_figures.cost_figure(*zip(*measured, strict=True))
    for name, draw, runs in (
        ("loss", block_figures.loss_figure, [run for run in details if run.loss]),
        ("preprocessing", block_figures.preprocess_figure, [run for run in details if run.preprocess_loss]),
        ("error", block_figures.error_figure, [run for run in details if run.error]),
        ("salient", block_figures.salient_figure, [run for run in details if run.salient]),
    ):
        if runs:
            figures[f"figures/{name}"] = draw(runs)
    return figures


def _shown(results: Sequence[Result], metrics: Sequence[str] | None) -> list[str]:
    names = metric_names(results)
    return list(metrics or [name for name in names if name.startswith("ppl/")] or names)


def _check(results: Sequence[Result], x: str | None, metrics: Sequence[str] | None) -> None:
    known = metric_names(results)
    if not known:
        raise UserError("the runs have no scores: choose corpora or tasks with eval.corpora and eval.tasks.")
    for name in metrics or ():
        if name not in known:
            raise UserError(f"--metric {name}: no run has it; known are {', '.join(known)}.")
    if x is not None and not any(result.value(x) is not None for result in results):
        keys = ", ".join(["method", "model", *differing_keys(results)])
        raise UserError(f"--x {x}: no run has this key; the runs differ in {keys}.")
    if x is None and all(result.method == FULL_PRECISION for result in results):
        raise UserError("every run is one of full precision: there is nothing to draw.")


def _write(folder: Path, files: Mapping[str, str | bytes]) -> None:
    try:
        folder.mkdir(parents=True, exist_ok=True)
        for name, content in files.items():
            (folder / name).parent.mkdir(parents=True, exist_ok=True)
            (folder / name).write_bytes(content.encode() if isinstance(content, str) else content)
    except OSError as error:
        raise UserError(f"--out {folder} cannot be written ({error.strerror}): choose a writable folder.") from error
    print(f"Written to {folder}: {', '.join(name for name in files if '/' not in name)}, figures. Open index.html.")


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(prog="python -m ptq161.report", description="Tables, figures and a page of runs.")
    parser.add_argument("runs", nargs="+", metavar="RUNS", help="run directories, or sweep directories of them")
    parser.add_argument(
        "--out", required=True, metavar="FOLDER", help="where index.html, the tables and the figures go"
    )
    parser.add_argument("--x", metavar="KEY", help="the figure's axis, such as mask_ratio or calib.n_samples")
    parser.add_argument("--metric", nargs="+", action="extend", metavar="NAME", help="scores to show")
    parser.add_argument("--published", metavar="CSV", help="published figures: adds paper, ours, difference")
    return parser


if __name__ == "__main__":
    sys.exit(main())
