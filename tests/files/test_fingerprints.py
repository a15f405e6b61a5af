"""Fingerprints: what differs is told, a folder is never mixed up, and parts say what they stand for."""

from __future__ import annotations

import importlib.util
import sys
from pathlib import Path

import pytest
import torch

from ptq161.errors import UserError
from ptq161.files.fingerprints import claim, describe, device_name, differences, key_of, versions
from ptq161.methods.ptq161 import PTQ161
from ptq161.methods.rtn import RTN

ABOUT = {"model": {"content": "abc", "n_blocks": None}, "seed": 0}


def test_a_folder_of_another_computation_is_refused_with_what_differs(tmp_path: Path) -> None:
    about = {"method": {"epochs": 4, "lr": 0.1}, "model": "a" * 64, "seed": 0}
    claim(tmp_path / "folder", about, "stop")
    claim(tmp_path / "folder", about, "stop")
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
        claim(tmp_path, ABOUT, "stop")
    assert [path.name for path in tmp_path.iterdir()] == ["thesis.tex"]


def test_differences_are_those_of_json() -> None:
    assert differences({"a": (1, 2), "b": {}}, {"a": [1, 2], "b": {}}) == []
    assert differences({"a": {}}, {"a": None}) == ["a is {} here and None there"]


def test_keys_depend_on_values_and_not_on_order() -> None:
    assert key_of(ABOUT) == key_of(dict(reversed(list(ABOUT.items()))))
    assert len({key_of({"a": value}) for value in (0, 0.5, "0", None, False, [0], {"b": 0})}) == 7
    with pytest.raises(ValueError, match="JSON"):
        key_of({"a": float("nan")})


def test_a_method_is_its_class_and_its_fields() -> None:
    assert describe(RTN(bits=2))["bits"] == 2
    assert describe(RTN()) != describe(RTN(bits=2))
    assert describe(PTQ161())["class"] == "ptq161.methods.ptq161.method.PTQ161"
    assert "source" not in describe(PTQ161())


def test_a_method_from_elsewhere_brings_its_source(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    found = []
    for body in ("pass", "x: int = 1"):
        file = tmp_path / "mine.py"
        file.write_text(f"import dataclasses\n@dataclasses.dataclass\nclass Mine:\n    {body}\n")
        spec = importlib.util.spec_from_file_location("mine", file)
        assert spec is not None and spec.loader is not None
        module = importlib.util.module_from_spec(spec)
        monkeypatch.setitem(sys.modules, "mine", module)
        spec.loader.exec_module(module)
        found.append(describe(module.Mine()))
    assert found[0]["source"] != found[1]["source"]


def test_versions_and_device() -> None:
    assert versions("torch") == {"torch": torch.__version__}
    assert device_name(torch.device("cpu")).startswith("cpu: ")
