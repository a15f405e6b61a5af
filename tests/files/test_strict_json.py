"""Strict JSON."""

from __future__ import annotations

import json
import math
from pathlib import Path

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from ptq161.files.strict_json import decode_json, encode_json

NUMBERS = st.one_of(st.floats(), st.integers(-(2**53), 2**53), st.none(), st.booleans(), st.text())
TREES = st.recursive(NUMBERS, lambda inner: st.lists(inner) | st.dictionaries(st.text(), inner), max_leaves=12)


@given(st.dictionaries(st.text().filter(lambda key: key != "nonfinite"), TREES))
def test_json_round_trip_is_strict_json(value: dict[str, object]) -> None:
    text = encode_json(value)

    def forbidden(constant: str) -> None:
        raise AssertionError(constant)

    json.loads(text, parse_constant=forbidden)
    assert repr(decode_json(text)) == repr(value)  # repr, since NaN equals nothing


@given(st.dictionaries(st.sampled_from(["a", "nonfinite"]), TREES))
def test_json_of_others_is_an_object_or_a_value_error(value: dict[str, object]) -> None:
    text = json.dumps(value)
    try:
        assert isinstance(decode_json(text), dict)
    except ValueError:
        constants: list[str] = []
        json.loads(text, parse_constant=constants.append)
        assert "nonfinite" in value or constants  # NaN and infinities of json.dumps are no JSON


@pytest.mark.parametrize(
    "text", ["", "[]", "3", "{", '{"a": ' * 100_000, '{"a": ' + "9" * 5000 + "}", '{"nonfinite": "nan"}']
)
def test_what_is_no_object_is_a_value_error(text: str) -> None:
    with pytest.raises(ValueError):
        decode_json(text)


def test_nonfinite_numbers_become_null_beside_their_text() -> None:
    assert json.loads(encode_json({"a": {"b": math.nan}, "c": [1, -math.inf]})) == {
        "a": {"b": None},
        "c": [1, None],
        "nonfinite": {"a": {"b": "nan"}, "c": {"1": "-inf"}},
    }


def test_numbers_of_numpy_and_torch_become_plain_ones() -> None:
    value = {"a": np.float32(0.5), "b": torch.tensor(3), "c": torch.tensor(math.inf), "d": Path("x")}
    assert decode_json(encode_json(value)) == {"a": 0.5, "b": 3, "c": math.inf, "d": "x"}
    with pytest.raises(TypeError):
        encode_json({"a": object()})
