"""Results of an earlier report, from its ``results.csv``: what is compared with when the records are elsewhere."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path

import pandas as pd

from ptq161.errors import UserError
from ptq161.files.reading import read_rows
from ptq161.report.collect import FULL_PRECISION, Run, configured_key
from ptq161.report.texts import NO_TEXT, UNKNOWN

COLUMNS = ("method", "model", "seeds", "commit", "run_dir")
"""Columns that every ``results.csv`` has, and that say nothing that was measured."""
_OTHERS = ("calibration_text", "seconds", "peak_memory_bytes")
_STAGE, _ERROR, _INTERVAL = "seconds ", " standard_error", (" low", " high")


def read_earlier(file: Path | str, runs: Sequence[Run], problems: list[str]) -> list[Run]:
    """Return the results of an earlier report as runs without a record, but for those of which a record is at hand.

    Of the configuration they have the keys in which the report's results differed.

    Args:
        file: a ``results.csv``.
        runs: whose records were read.
        problems: takes a sentence where rows are left out: a mean over seeds does not say what it is the mean of.

    Raises:
        UserError: the file cannot be read, lacks a column, or has a number that is none.
    """
    known, found, means = [_facts(run) for run in runs], [], 0
    for where, row in read_rows(file, COLUMNS, "earlier results"):
        if len(row["seeds"].split()) > 1:
            means += 1
        elif _facts(run := _run(row, where)) not in known:
            found.append(run)
    if means:
        problems.append(f"{means} of the results in {file} are left out: they are means over several seeds.")
    return found


def _facts(run: Run) -> tuple[str, str, list[tuple[str, str]]]:
    """Return what two reports agree in where they show the same run."""
    return run.method, run.model, sorted((name, repr(float(value))) for name, value in run.metrics.items())


def _run(row: Mapping[str, str], where: str) -> Run:
    columns, cells = list(row), {name: text for name, text in row.items() if text}
    ends = [columns.index(name) for name in ("calibration_text", "seeds") if name in columns]
    keys = [name for name in columns[: min(ends)] if name not in COLUMNS]
    measured = [
        name
        for name in cells
        if not (name in (*keys, *COLUMNS, *_OTHERS) or name.startswith(_STAGE) or name.endswith((_ERROR, *_INTERVAL)))
    ]

    def numbers(names: Sequence[str], affix: str = "") -> dict[str, float]:
        return {name.replace(affix, ""): _number(cells[name], name, where) for name in names}

    method, model = cells.get("method", ""), cells.get("model", "")
    if not (method and model and measured):
        raise UserError(f"{where} is no result: it has no {'score' if method and model else 'method or model'}.")
    named = {"method.name": method.partition("+")[0], "model.name": model}
    memory = numbers([name for name in cells if name == "peak_memory_bytes"])
    return Run(
        run_dir=None,
        method=method,
        model=model,
        config=named | {configured_key(key): _value(cells[key]) if key in cells else None for key in keys},
        metrics=numbers(measured),
        standard_errors=numbers([name for name in cells if name.endswith(_ERROR)], _ERROR),
        seconds=numbers([name for name in cells if name.startswith(_STAGE)], _STAGE),
        peak_memory_bytes=memory.get("peak_memory_bytes"),
        commit=cells.get("commit"),
        seed=int(_number(cells["seeds"], "seeds", where)) if "seeds" in cells else None,
        calibration_text=cells.get("calibration_text") or (NO_TEXT if method == FULL_PRECISION else UNKNOWN),
        identity=f"earlier {sorted(cells.items())}",
        recorded_as=cells.get("run_dir"),
        missing=pd.NA,
    )


def _value(text: str) -> str | int | float:
    for kind in (int, float):
        try:
            return kind(text)
        except ValueError:
            continue
    return text


def _number(text: str, name: str, where: str) -> float:
    value = _value(text)
    if isinstance(value, str):
        raise UserError(f"{where}: {name} is {text!r}, which is no number.")
    return value
