"""Atomic files and strict JSON."""

from __future__ import annotations

import errno
import json
import math
import os
from pathlib import Path

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from ptq161.errors import UserError
from ptq161.tracking.files import decode_json, encode_json, write_atomically

NUMBERS = st.one_of(st.floats(), st.integers(-(2**53), 2**53), st.none(), st.booleans(), st.text())
TREES = st.recursive(NUMBERS, lambda inner: st.lists(inner) | st.dictionaries(st.text(), inner), max_leaves=12)


@given(st.dictionaries(st.text().filter(lambda key: key != "nonfinite"), TREES))
def test_json_round_trip_is_strict_json(value: dict[str, object]) -> None:
    text = encode_json(value)

    def forbidden(constant: str) -> None:
        raise AssertionError(constant)

    json.loads(text, parse_constant=forbidden)
    assert repr(decode_json(text)) == repr(value)  # repr, since NaN equals nothing


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


def test_write_replaces_and_leaves_nothing_else(tmp_path: Path) -> None:
    path = tmp_path / "a.json"
    write_atomically(path, "old")
    write_atomically(path, b"new")
    assert path.read_bytes() == b"new"
    assert os.listdir(tmp_path) == ["a.json"]
    umask = os.umask(0)
    os.umask(umask)
    assert path.stat().st_mode & 0o777 == 0o666 & ~umask


@pytest.mark.parametrize("step", ["fsync", "replace"])
def test_full_disk_keeps_the_old_file_and_says_so(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, step: str) -> None:
    path = tmp_path / "a.json"
    write_atomically(path, "old")

    def full(*_: object) -> None:
        raise OSError(errno.ENOSPC, "No space left on device")

    monkeypatch.setattr(os, step, full)
    with pytest.raises(UserError, match="disk is full"):
        write_atomically(path, "new")
    assert path.read_text() == "old"
    assert os.listdir(tmp_path) == ["a.json"]


def test_unwritable_folder_is_a_user_error(tmp_path: Path) -> None:
    (tmp_path / "file").write_text("")
    with pytest.raises(UserError, match=r"cannot be written .*hydra\.run\.dir"):
        write_atomically(tmp_path / "file" / "a.json", "new")
