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
    ("more", "title", "columns", "row"),
    [
        ({}, "Full precision against quantized", ["full precision", "quantized"], ["20.00", "40.00"]),
        (
            MERGED,
            "Full precision and merged against quantized",
            ["full precision", "merged", "quantized"],
            ["20.00", "30.00", "40.00"],
        ),
        # A packed checkpoint, or eval.full_precision=false.
        ({"full_precision": {}}, "Quantized", ["quantized"], ["40.00"]),
        ({"full_precision": {}, **MERGED}, "Merged against quantized", ["merged", "quantized"], ["30.00", "40.00"]),
        (
            {"before_finetune": {"ppl/boolq@64": 50.0, "bits_per_weight": 1.7}},
            "Full precision and quantized against finetuned",
            ["full precision", "quantized", "finetuned"],
            ["20.00", "50.00", "40.00"],
        ),
        # method=none
        ({"full_precision": RESULTS["metrics"]}, "Full precision", ["full precision"], ["40.00"]),
    ],
)
def test_each_scored_model_has_a_column(more: dict[str, Any], title: str, columns: list[str], row: list[str]) -> None:
    table = _results_table({**RESULTS, **more})
    assert table.title == title
    assert [str(column.header) for column in table.columns] == ["metric", *columns, "± se", "scored on"]
    cells = [list(column.cells) for column in table.columns]
    assert [column[0] for column in cells] == ["ppl/boolq@64", *row, "", "128 tokens"]
