"""The table that a run ends in."""

from __future__ import annotations

from typing import Any

import pytest

from ptq161.run.summary import _results_table

RESULTS: dict[str, Any] = {
    "metrics": {"ppl/boolq@64": 40.0, "bits_per_weight": 1.7},
    "full_precision": {"ppl/boolq@64": 20.0, "bits_per_weight": 16.0},
    "protocol": {"ppl/boolq@64": {"n_tokens": 128}},
}
MERGED = {"merged": {"ppl/boolq@64": 30.0, "bits_per_weight": 16.0}}


@pytest.mark.parametrize(
    ("more", "columns", "row"),
    [
        ({}, ["full precision", "quantized"], ["20.00", "40.00"]),
        (MERGED, ["full precision", "merged", "quantized"], ["20.00", "30.00", "40.00"]),
    ],
)
def test_a_preprocessed_model_has_a_column(more: dict[str, Any], columns: list[str], row: list[str]) -> None:
    table = _results_table({**RESULTS, **more})
    assert [str(column.header) for column in table.columns] == ["metric", *columns, "± se", "scored on"]
    cells = [list(column.cells) for column in table.columns]
    assert [column[0] for column in cells] == ["ppl/boolq@64", *row, "", "128 tokens"]
