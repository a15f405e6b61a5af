"""Tables and figures of runs, from their records alone.

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
from ptq161.report.collect import FULL_PRECISION, Run, collect, differing_keys, is_perplexity, metric_names
from ptq161.report.collect import quantized_runs as quantized
from ptq161.report.figures import bits_figure, render, sweep_figure
from ptq161.report.published import Published, compare, read_published
from ptq161.report.tables import csv_comparison, csv_table, markdown_comparison, markdown_table


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
    """Write ``table.md``, ``results.csv``, ``figure.svg`` and ``figure.png``; and what cannot be read, to stderr.

    With published figures also ``comparison.csv``, where any of them matches a run.

    Args:
        folders: run and sweep directories.
        out: folder that is made where it does not exist.
        x: key that the figure's axis shows; None takes the one number that the runs differ in, and draws measured bits
            against perplexity where there is none or more than one.
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
    for problem in found.problems:
        print(problem, file=sys.stderr)
    if not found.runs:
        raise UserError(f"no finished run is in {', '.join(folders)}.")
    _check_metrics(found.runs, metrics)
    comparisons = [c for c in compare(found.runs, published) if not metrics or c.published.metric in metrics]
    table = markdown_table(found.runs, metrics)
    files: dict[str, str | bytes] = {"table.md": table, "results.csv": csv_table(found.runs)}
    if comparisons:
        files["table.md"] = f"{table}\n{markdown_comparison(comparisons)}"
        files["comparison.csv"] = csv_comparison(comparisons)
    elif published:
        print(f"no run has the model, method and metric of a figure in {published_file}.", file=sys.stderr)
    figure = _figure(found.runs, x, metrics, published)
    files |= {f"figure.{kind}": render(figure, kind) for kind in ("svg", "png")}
    _write(Path(out), files)


def _figure(
    runs: Sequence[Run], x: str | None, metrics: Sequence[str] | None, published: Sequence[Published]
) -> Figure:
    names = metrics or metric_names(runs)
    shown = list(metrics or [name for name in names if name.startswith("ppl/")] or names)
    if x is not None:
        if not any(run.value(x) is not None for run in runs):
            known = ", ".join(["method", "model", *differing_keys(runs)])
            raise UserError(f"--x {x}: no run has this key; the runs differ in {known}.")
        return sweep_figure(runs, x, shown)
    swept = _swept_number(runs)
    if swept is not None:
        return sweep_figure(runs, swept, shown)
    if all(run.method == FULL_PRECISION for run in runs):
        raise UserError("every run is one of full precision: there is nothing to draw.")
    return bits_figure(runs, [name for name in shown if metrics or is_perplexity(name)] or shown, published)


def _swept_number(runs: Sequence[Run]) -> str | None:
    """Return the key of the one number that the runs differ in, where they share a method."""
    rows = quantized(runs)
    if len({run.method for run in rows}) > 1:
        return None
    numbers = [
        key
        for key in differing_keys(rows)
        if all(isinstance(run.value(key), int | float) and not isinstance(run.value(key), bool) for run in rows)
    ]
    return numbers[0] if len(numbers) == 1 else None


def _check_metrics(runs: Sequence[Run], metrics: Sequence[str] | None) -> None:
    known = metric_names(runs)
    if not known:
        raise UserError("the runs have no scores: choose corpora or tasks with eval.corpora and eval.tasks.")
    for name in metrics or ():
        if name not in known:
            raise UserError(f"--metric {name}: no run has it; known are {', '.join(known)}.")


def _write(folder: Path, files: Mapping[str, str | bytes]) -> None:
    try:
        folder.mkdir(parents=True, exist_ok=True)
        for name, content in files.items():
            (folder / name).write_bytes(content.encode() if isinstance(content, str) else content)
    except OSError as error:
        raise UserError(f"--out {folder} cannot be written ({error.strerror}): choose a writable folder.") from error
    print(f"Written to {folder}: {', '.join(files)}.")


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(prog="python -m ptq161.report", description="Tables and figures of runs.")
    parser.add_argument("runs", nargs="+", metavar="RUNS", help="run directories, or sweep directories of them")
    parser.add_argument("--out", required=True, metavar="FOLDER", help="where table.md, results.csv and figure.* go")
    parser.add_argument("--x", metavar="KEY", help="the figure's axis, such as mask_ratio or calib.n_samples")
    parser.add_argument("--metric", nargs="+", action="extend", metavar="NAME", help="scores to show")
    parser.add_argument("--published", metavar="CSV", help="published figures: adds paper, ours, difference")
    return parser


if __name__ == "__main__":
    sys.exit(main())
