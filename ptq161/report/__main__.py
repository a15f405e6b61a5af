"""Tables, figures and one page of runs, from their records alone.

Usage::

    python -m ptq161.report multirun/2026-01-01/12-00-00 --out experiments/mask_ratio
    python -m ptq161.report RUNS... --out FOLDER --x calib.n_samples --metric ppl/boolq@512
    python -m ptq161.report RUNS... --out FOLDER --published experiments/baselines/published.csv
    python -m ptq161.report RUNS... --out FOLDER --earlier experiments/baselines/results.csv
"""

from __future__ import annotations

import argparse
import os
import sys
from collections.abc import Mapping, Sequence
from pathlib import Path

import pandas as pd

from ptq161.errors import UserError
from ptq161.files.streams import never_fail_to_print
from ptq161.report.collect import collect
from ptq161.report.details import chosen_runs, read_details
from ptq161.report.earlier import read_earlier
from ptq161.report.keys import differing_keys, swept_numbers
from ptq161.report.page import page
from ptq161.report.published import compare, read_published
from ptq161.report.results import FULL, Results, metric_names, results_of
from ptq161.report.sections import Section, sections
from ptq161.report.static import render
from ptq161.report.tables import (
    Table,
    csv_comparison,
    csv_table,
    latex_table,
    markdown_comparison,
    markdown_table,
    result_table,
)
from ptq161.tracking.metric_names import ON_TEXTS

_MOST_HIGHLIGHTS = 4


def main(arguments: Sequence[str] | None = None) -> int:
    """Run the program.

    Args:
        arguments: of the command line; None takes the process's own.

    Returns:
        the exit status: 1, with one sentence on stderr, for bad input.
    """
    options = _parser().parse_args(arguments)
    try:
        report(
            options.runs,
            options.out,
            x=options.x,
            metrics=options.metric,
            published_file=options.published,
            earlier=options.earlier or (),
        )
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
    earlier: Sequence[str] = (),
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
        earlier: ``results.csv`` files of earlier reports, whose results are shown as well
            (:mod:`ptq161.report.earlier`).

    Raises:
        UserError: a folder does not exist or holds no finished run, a key or metric is unknown, a file cannot be read
            or written.
    """
    if missing := [folder for folder in folders if not Path(folder).is_dir()]:
        raise UserError(f"{missing[0]}: there is no such folder; give run or sweep directories.")
    published = read_published(published_file) if published_file else []
    found = collect(folders)
    if not found.runs:
        _warn(found.problems)
        raise UserError(f"no finished run is in {', '.join(folders)}.")
    runs = list(found.runs)
    for file in earlier:
        runs += read_earlier(file, runs, found.problems)
    results = results_of(runs, found.problems)
    chosen = chosen_runs(results)
    details = read_details(chosen, found.problems)
    _warn(found.problems)
    _check(results, x, metrics)
    names = metric_names(results)
    perplexities = [name for name in names if name.startswith(ON_TEXTS)]
    scores = list(metrics or [name for name in names if not name.endswith("/acc_norm")])
    shown = sections(results, chosen, details, scores, metrics or perplexities or names, x=x, published=published)
    table = result_table(results, metrics)
    highlights = [name for name in scores if name.startswith(ON_TEXTS)] or scores
    compared = compare(results, [figure for figure in published if not metrics or figure.metric in metrics])
    if published and compared.empty:
        _warn([f"no run has the model, method and metric of a figure in {published_file}."])
    files: dict[str, str | bytes] = {
        "index.html": page(results, table, shown, found.problems, highlights[:_MOST_HIGHLIGHTS])
    }
    _write(Path(out), files | _tables(results, table, compared) | _figures(results, shown, x))


def _tables(results: Results, table: Table, compared: pd.DataFrame) -> dict[str, str | bytes]:
    files: dict[str, str | bytes] = {"results.csv": csv_table(results), "results.tex": latex_table(table, results)}
    if compared.empty:
        return files | {"table.md": markdown_table(table)}
    comparison = {"comparison.csv": csv_comparison(compared)}
    return files | {"table.md": f"{markdown_table(table)}\n{markdown_comparison(compared)}"} | comparison


def _figures(results: Results, shown: Sequence[Section], x: str | None) -> dict[str, str | bytes]:
    drawn = {name: render(figure) for section in shown for name, figure in section.prints.items()}
    files: dict[str, str | bytes] = {}
    for name, kinds in drawn.items():
        files |= {f"figures/{name}.{kind}": data for kind, data in kinds.items()}
    if drawn:
        files |= {f"figure.{kind}": data for kind, data in drawn[_main_figure(results, x, list(drawn))].items()}
    return files


def _main_figure(results: Results, x: str | None, names: Sequence[str]) -> str:
    """Choose the printed figure that says most: a sweep of one number over one method, or bits against quality."""
    rows = results.quantized
    swept = [x] if x else swept_numbers(rows.config)
    is_sweep = x is not None or (len(swept) == 1 and rows.rows.method.nunique() == 1)
    return next((name for name in names if name == (f"sweep_{swept[0]}" if is_sweep else "bits")), names[0])


def _warn(problems: Sequence[str]) -> None:
    for problem in problems:
        print(problem, file=sys.stderr)


def _check(results: Results, x: str | None, metrics: Sequence[str] | None) -> None:
    known = metric_names(results)
    if not known:
        raise UserError("the runs have no scores: choose corpora or tasks with eval.corpora and eval.tasks.")
    for name in metrics or ():
        if name not in known:
            raise UserError(f"--metric {name}: no run has it; known are {', '.join(known)}.")
    if x is not None and not (x in results.config and results.config[x].notna().any()):
        keys = ", ".join(["method", "model", *differing_keys(results.config)])
        raise UserError(f"--x {x}: no run has this key; the runs differ in {keys}.")
    if x is None and (results.rows.kind == FULL).all():
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
    parser.add_argument(
        "runs", nargs="+", type=os.path.expanduser, metavar="RUNS", help="run directories, or sweep directories of them"
    )
    parser.add_argument(
        "--out",
        required=True,
        type=os.path.expanduser,
        metavar="FOLDER",
        help="where index.html, the tables and the figures go",
    )
    parser.add_argument("--x", metavar="KEY", help="the figure's axis, such as mask_ratio or calib.n_samples")
    parser.add_argument("--metric", nargs="+", action="extend", metavar="NAME", help="scores to show")
    parser.add_argument(
        "--published", type=os.path.expanduser, metavar="CSV", help="published figures: adds paper, ours, difference"
    )
    parser.add_argument(
        "--earlier",
        type=os.path.expanduser,
        nargs="+",
        action="extend",
        metavar="CSV",
        help="results.csv of earlier reports: adds their results, whose records may be gone",
    )
    return parser


if __name__ == "__main__":
    never_fail_to_print()
    sys.exit(main())
