"""Fingerprints: what differs is named, and a folder is never mixed up."""

from __future__ import annotations

from pathlib import Path

import pytest

from ptq161.errors import UserError
from ptq161.files.fingerprints import _differences, claim, key_of

FINGERPRINT = {"model": {"content": "abc", "n_blocks": None}, "seed": 0}


def test_a_folder_of_another_computation_is_refused_with_what_differs(tmp_path: Path) -> None:
    fingerprint = {"method": {"epochs": 4, "lr": 0.1}, "model": "a" * 64, "seed": 0}
    claim(tmp_path / "folder", fingerprint, "stop")
    claim(tmp_path / "folder", fingerprint, "stop")
    other = {"method": {"epochs": 20, "lr": 0.1}, "model": "b" * 64, "device": "cuda"}
    with pytest.raises(UserError) as caught:
        claim(tmp_path / "folder", other, "stop")
    for part in (
        "device is cuda here and None there",
        "method.epochs is 20 here and 4 there",
        "model is bbbbbbbb... here and aaaaaaaa... there",
        "seed is None here and 0 there",
    ):
        assert part in str(caught.value)
    assert "lr" not in str(caught.value)


def test_a_folder_with_foreign_files_is_refused(tmp_path: Path) -> None:
    (tmp_path / "thesis.tex").write_text("mine")
    with pytest.raises(UserError, match=r"holds thesis\.tex but no fingerprint\.json"):
        claim(tmp_path, FINGERPRINT, "stop")
    assert [path.name for path in tmp_path.iterdir()] == ["thesis.tex"]


def test_differences_are_those_of_json() -> None:
    assert _differences({"a": (1, 2), "b": {}}, {"a": [1, 2], "b": {}}) == []
    assert _differences({"a": {}}, {"a": None}) == ["a is {} here and None there"]


def test_keys_depend_on_values_and_not_on_order() -> None:
    assert key_of(FINGERPRINT) == key_of(dict(reversed(list(FINGERPRINT.items()))))
    assert len({key_of({"a": value}) for value in (0, 0.5, "0", None, False, [0], {"b": 0})}) == 7
    with pytest.raises(ValueError, match="JSON"):
        key_of({"a": float("nan")})


def test_parts_of_a_computation_have_keys_of_their_own(tmp_path: Path) -> None:
    whole = claim(tmp_path / "folder", FINGERPRINT, "stop")
    assert whole.key == key_of(FINGERPRINT)
    part = whole.part("quantize_0")
    assert (part.path, part.key) == (tmp_path / "folder" / "quantize_0", f"{whole.key}/quantize_0")
