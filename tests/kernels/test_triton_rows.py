"""The Triton kernels in Triton's interpreter, and how the operators are chosen; on a GPU: ``tests/gpu``."""

from __future__ import annotations

import importlib.util
import json
import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch

from ptq161.kernels import packed_rows
from tests import skips
from tests.kernels.packed_weights import structured_binary

REPOSITORY = Path(__file__).parents[2]


def test_products_and_dense_forms_are_those_of_torch() -> None:
    if importlib.util.find_spec("triton") is None:
        pytest.skip(skips.TRITON_MISSING)
    environment = os.environ | {"TRITON_INTERPRET": "1"}
    environment["PYTHONPATH"] = os.pathsep.join([str(REPOSITORY), *filter(None, [os.environ.get("PYTHONPATH")])])
    command = [sys.executable, "-m", "tests.kernels.interpreted_rows"]
    done = subprocess.run(command, capture_output=True, text=True, env=environment, cwd=REPOSITORY, check=False)
    assert done.returncode == 0, done.stderr[-3000:]
    found = json.loads(done.stdout)
    # The interpreter rounds to bfloat16 toward zero; on a GPU the dense form has the bits of torch's.
    limits = {"float32": (2e-6, 0.0), "bfloat16": (2**-7, 2**-7), "float16": (2**-10, 2**-11)}
    wrong = {
        name: (of_product, of_dense)
        for name, (dtype, of_product, of_dense) in found.items()
        if not (of_product < limits[dtype][0] and of_dense <= limits[dtype][1])
    }
    assert len(found) > 50 and not wrong


def test_without_triton_there_are_no_operators(
    caplog: pytest.LogCaptureFixture, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setitem(sys.modules, "ptq161.kernels.triton_rows", None)
    assert packed_rows._load.__wrapped__(packed_rows.CODES, "cuda") is False
    assert "weights are dequantized on the GPU" in caplog.text


@pytest.mark.parametrize(("device", "dtype"), [("meta", torch.float32), ("cpu", torch.float16)])
def test_other_devices_and_dtypes_are_left_to_torch(device: str, dtype: torch.dtype) -> None:
    packed, x = structured_binary(8, 97), torch.zeros(1, 97, dtype=dtype, device=device)
    assert not packed_rows.usable(dtype, x)
    assert packed.rows_product(x, None) is None
