"""Results of an earlier report, from its ``results.csv``: what is compared with when the records are elsewhere."""

from __future__ import annotations

import csv
import math
from collections.abc import Mapping, Sequence
from pathlib import Path

import pandas as pd

from ptq161.errors import UserError
from ptq161.report.collect import FULL_PRECISION, Run
from ptq161.report.seeds import GROUPS
from ptq161.report.texts import NO_TEXT, UNKNOWN

COLUMNS = ("method", "model", "seeds", "commit", "run_dir")
"""Columns that every ``results.csv`` has, and that say nothing that was measured."""
_OTHERS = ("calibration_text", "seconds", "peak_memory_bytes")
_STAGE, _ERROR, _INTERVAL = "seconds ", " standard_error", (" low", " high")
_OF_METHOD = ("mask_ratio", "block_size")
"""Keys that a run has as its method's own."""


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
    try:
        with Path(file).open(newline="", encoding="utf-8") as stream:
            reader = csv.DictReader(stream)
            if missing := [name for name in COLUMNS if name not in (reader.fieldnames or ())]:
                raise UserError(f"{file} has no column {missing[0]!r}: it is no results.csv of a report.")
            for row in reader:
                cells = {name: value for name, value in row.items() if name and value}
                if len(cells.get("seeds", "").split()) > 1:
                    means += 1
                    continue
                run = _run(cells, list(reader.fieldnames or ()), f"line {reader.line_num} of {file}")
                if _facts(run) not in known:
                    found.append(run)
    except (OSError, UnicodeDecodeError, csv.Error) as error:
        raise UserError(f"the earlier results {file} cannot be read ({error}).") from error
    if means:
        problems.append(f"{means} of the results in {file} are left out: they are means over several seeds.")
    return found


def _facts(run: Run) -> tuple[str, str, list[tuple[str, str]]]:
    """Return what two reports agree in where they show the same run."""
    return run.method, run.model, sorted((name, repr(float(value))) for name, value in run.metrics.items())


def _run(cells: Mapping[str, str], columns: list[str], where: str) -> Run:
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
        config=named | {_configured(key): _value(cells[key]) if key in cells else None for key in keys},
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


def _configured(key: str) -> str:
    """Return the configured key of which a table's column has the value."""
    if key in GROUPS:
        return f"{key}.name"
    return f"method.{key}" if key in _OF_METHOD else key


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
    return math.nan if text == "nan" else value
