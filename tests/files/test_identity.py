"""Identities: parts say what they stand for, and what cannot change a result is no part of it."""

from __future__ import annotations

import importlib.util
import sys
from pathlib import Path
from typing import Any

import pytest
import torch

from ptq161.files import identity
from ptq161.files.identity import _device_name, _versions, describe
from ptq161.methods.ptq161 import PTQ161
from ptq161.methods.rtn import RTN
from ptq161.preprocess.restoration import Restoration

CPU = torch.device("cpu")


def quantization(**changes: Any) -> dict[str, Any]:
    facts: dict[str, Any] = {
        "weights": "w",
        "config": "c",
        "calibration": "t",
        "method": RTN(),
        "salient_masks": None,
        "seed": 0,
        "device": CPU,
    }
    return identity.quantization(**(facts | changes))


def test_a_quantization_depends_on_each_of_its_arguments_and_on_the_threads() -> None:
    changes: list[dict[str, Any]] = [
        {},
        {"weights": "x"},
        {"config": "x"},
        {"calibration": "x"},
        {"method": RTN(bits=2)},
        {"salient_masks": "x"},
        {"seed": 1},
    ]
    found = [str(quantization(**change)) for change in changes]
    assert len(set(found)) == len(changes)
    threads = torch.get_num_threads()
    try:
        torch.set_num_threads(threads + 1)
        assert str(quantization()) != found[0]
    finally:
        torch.set_num_threads(threads)
    assert str(quantization()) == found[0]


def test_a_restoration_does_not_depend_on_where_it_is_kept() -> None:
    def of(**settings: Any) -> dict[str, Any]:
        return identity.restoration(quantization(), training="t", settings=Restoration(**settings))

    assert of() == of(checkpoint_every=7, save_merged=True, score_merged=False)
    assert of(rank=4) != of()
    # The mask of a single round is that of the final quantization alone.
    assert of(mask="fresh") == of()
    assert of(mask="fresh", rounds=2) != of(rounds=2)


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
    assert _versions("torch") == {"torch": torch.__version__}
    assert _device_name(torch.device("cpu")).startswith("cpu: ")
