"""Published figures beside our own: paper, ours, difference."""

from __future__ import annotations

import csv
import dataclasses
from collections.abc import Sequence
from pathlib import Path

from ptq161.errors import UserError
from ptq161.report.results import Result

COLUMNS = ("source", "table", "model", "method", "nominal_bits", "measured_bits", "metric", "value")
PAPERS_NAMES = {"ptq161_paper": "ptq161", "ptq161_paper+preprocessing": "ptq161+preprocessing"}
"""Our methods that go by another name in the papers: their values for the same method."""


@dataclasses.dataclass(frozen=True)
class Published:
    """One published figure.

    Attributes:
        source: the publication.
        table: where it stands in it.
        model: our name of the model.
        method: our name of the method; any other one is a method that we do not have.
        nominal_bits: bits per weight as printed, such as ``1.7+1``, where the second figure is a mask's.
        measured_bits: bits per weight with everything stored counted; None where nobody did.
        metric: our name of the metric, the window's length included.
        value: NaN where the paper prints one.
    """

    source: str
    table: str
    model: str
    method: str
    nominal_bits: str
    measured_bits: float | None
    metric: str
    value: float

    @property
    def bits(self) -> float:
        """Bits per weight by the fullest count there is."""
        if self.measured_bits is not None:
            return self.measured_bits
        return sum(float(part) for part in self.nominal_bits.lstrip("~").split("+"))


@dataclasses.dataclass(frozen=True)
class Comparison:
    """A result's score beside a published one.

    Attributes:
        result: the result.
        published: a figure for the same model, method and metric.
        value: the result's own score.
    """

    result: Result
    published: Published
    value: float

    @property
    def difference(self) -> float:
        """Ours minus the published one."""
        return self.value - self.published.value


def read_published(file: Path | str) -> list[Published]:
    """Read published figures from a CSV file with the columns ``COLUMNS``.

    Raises:
        UserError: the file cannot be read, lacks a column, or has a number that is none.
    """
    try:
        with Path(file).open(newline="", encoding="utf-8") as stream:
            reader = csv.DictReader(stream)
            if missing := [name for name in COLUMNS if name not in (reader.fieldnames or ())]:
                raise UserError(f"{file} has no column {missing[0]!r}: published figures need {', '.join(COLUMNS)}.")
            return [_published(row, f"line {reader.line_num} of {file}") for row in reader]
    except (OSError, UnicodeDecodeError, csv.Error) as error:
        raise UserError(f"the published figures {file} cannot be read ({error}).") from error


def compare(results: Sequence[Result], published: Sequence[Published]) -> list[Comparison]:
    """Pair every score with the published figures for the same model, method and metric.

    A figure that a paper prints twice with different values appears twice.
    """
    return [
        Comparison(result, figure, result.metrics[figure.metric])
        for result in results
        for figure in published
        if figure.model == result.model
        and figure.method == PAPERS_NAMES.get(result.method, result.method)
        and figure.metric in result.metrics
    ]


def _published(row: dict[str, str | None], where: str) -> Published:
    cells = {name: (row[name] or "").strip() for name in COLUMNS}
    try:
        figure = Published(
            source=cells["source"],
            table=cells["table"],
            model=cells["model"],
            method=cells["method"],
            nominal_bits=cells["nominal_bits"],
            measured_bits=float(cells["measured_bits"]) if cells["measured_bits"] else None,
            metric=cells["metric"],
            value=float(cells["value"]),
        )
        if not figure.bits > 0:
            raise ValueError("bits must be positive")
    except ValueError as error:
        raise UserError(f"{where} is no published figure ({error}).") from error
    return figure
