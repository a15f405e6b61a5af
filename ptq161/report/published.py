"""Published figures beside our own: paper, ours, difference."""

from __future__ import annotations

import dataclasses
from collections.abc import Sequence
from pathlib import Path

import pandas as pd

from ptq161.errors import UserError
from ptq161.files.reading import read_rows
from ptq161.report.collect import FULL_PRECISION
from ptq161.report.results import Results
from ptq161.report.texts import NO_TEXT, UNKNOWN

COLUMNS = ("source", "table", "model", "method", "nominal_bits", "measured_bits", "metric", "value")
FURTHER_COLUMNS = ("calibration_text", "training_tokens")
"""Columns that a file may have as well."""
_PAPERS_NAMES = {"ptq161_paper": "ptq161", "ptq161_paper+preprocessing": "ptq161+preprocessing"}
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
        calibration_text: our name of the corpus that the method calibrated or trained on, ``UNKNOWN`` where its source
            does not say it, ``NO_TEXT`` for full precision.
        training_tokens: how many tokens of it, as printed; empty where the source does not say it.
    """

    source: str
    table: str
    model: str
    method: str
    nominal_bits: str
    measured_bits: float | None
    metric: str
    value: float
    calibration_text: str = UNKNOWN
    training_tokens: str = ""

    @property
    def bits(self) -> float:
        """Bits per weight by the fullest count there is."""
        if self.measured_bits is not None:
            return self.measured_bits
        return sum(float(part) for part in self.nominal_bits.lstrip("~").split("+"))


def read_published(file: Path | str) -> list[Published]:
    """Read published figures from a CSV file with the columns ``COLUMNS``, and any of ``FURTHER_COLUMNS``.

    Raises:
        UserError: the file cannot be read, lacks a column, or has a number that is none.
    """
    return [_published(row, where) for where, row in read_rows(file, COLUMNS, "published figures")]


def published_frame(published: Sequence[Published]) -> pd.DataFrame:
    """Lay published figures out, a row each: their attributes, ``bits`` among them."""
    frame = pd.DataFrame(published, columns=[field.name for field in dataclasses.fields(Published)])
    return frame.assign(bits=[figure.bits for figure in published]).astype({"bits": float, "value": float})


def compare(results: Results, published: Sequence[Published]) -> pd.DataFrame:
    """Pair every score with the published figures for the same model, method and metric.

    A figure that a paper prints twice with different values appears twice.

    Returns:
        a row per pair: ``method``, ``model``, our ``calibration_text`` and that of the published figure
        (``published_text``), ``metric``, ``published``, ``ours``, their ``difference`` (ours minus the published one),
        ``source``, ``table`` and ``run_dir``.
    """
    ours = results.rows.merge(results.scores.rename(columns={"value": "ours"}), left_index=True, right_on="result")
    ours["theirs"] = ours.method.replace(_PAPERS_NAMES)
    names = {"value": "published", "method": "theirs", "calibration_text": "published_text"}
    papers = published_frame(published).rename(columns=names)
    # By result, then in the order of the publications.
    places = pd.Series(range(len(results.rows)), results.rows.index)
    ours["place"], papers["entry"] = ours.result.map(places), range(len(papers))
    pairs = ours.merge(papers, on=["model", "theirs", "metric"]).sort_values(["place", "entry"])
    return pairs.assign(difference=pairs.ours - pairs.published).reset_index(drop=True)


def _published(row: dict[str, str], where: str) -> Published:
    cells = {name: row.get(name, "").strip() for name in (*COLUMNS, *FURTHER_COLUMNS)}
    none_read = NO_TEXT if cells["method"] == FULL_PRECISION else UNKNOWN
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
            calibration_text=cells["calibration_text"] or none_read,
            training_tokens=cells["training_tokens"],
        )
        if not figure.bits > 0:
            raise ValueError("bits must be positive")
    except ValueError as error:
        raise UserError(f"{where} is no published figure ({error}).") from error
    return figure
