"""Products and dense forms of all formats in Triton's interpreter, to be run as a program of its own.

The interpreter takes the place of the compiler where Triton is imported under ``TRITON_INTERPRET=1``. Prints a line of
JSON with the largest errors: those of products relative to the sum of magnitudes, those of dense forms to the weight.
"""

from __future__ import annotations

import json

import torch

from ptq161.kernels import triton_rows
from ptq161.packed.weight import PackedWeight
from tests.kernels.packed_weights import MAKERS

CASES = [
    ((3, 7), 1, torch.float32),
    ((5, 97), 3, torch.bfloat16),
    ((6, 576), 5, torch.float16),
    ((35, 192), 2, torch.float32),
]
"""Shape of the weight, rows of x and their dtype, for each kind of weight."""
LARGE = ((33, 1536), 20, torch.float32)
"""More rows than one program takes, for each format."""


def main() -> None:
    # Fewer and larger steps: the interpreter takes milliseconds for each, whatever its size.
    triton_rows._TILES = {block: (32, 128) for block in triton_rows._TILES}
    triton_rows._DENSE_TILE = (32, 512)
    torch.manual_seed(0)
    found = {}
    for kind, make in MAKERS.items():
        for shape, rows, dtype in [*CASES, *([LARGE] if kind in ("structured_binary", "allotted", "awq") else [])]:
            found[f"{kind}, {list(shape)}, {rows} rows"] = errors(make(*shape), rows, dtype)
    print(json.dumps(found))


def errors(packed: PackedWeight, rows: int, dtype: torch.dtype) -> tuple[str, float, float]:
    """Return the name of a dtype, and the errors of a product and of the dense form in it."""
    operands = packed.operands()
    assert operands is not None
    weight = getattr(triton_rows, operands.format)(*operands.tensors, *operands.settings)
    exact = packed.dequantize().double()
    dense = triton_rows.dense(weight, dtype, operands.factor)
    assert dense.dtype == dtype and dense.shape == exact.shape
    x, bias = torch.randn(rows, packed.in_features).to(dtype), torch.randn(packed.out_features).to(dtype)
    y = triton_rows.product(weight, x, bias, operands.factor)
    assert y.dtype == dtype
    expected = x.double() @ exact.T + bias.double()
    magnitudes = x.double().abs() @ exact.abs().T + bias.double().abs() + 0.01
    of_product = ((y.double() - expected).abs() / magnitudes).max()
    of_dense = ((dense.double() - exact).abs() / exact.abs().clamp(min=1e-30)).max()
    return str(dtype).removeprefix("torch."), float(of_product), float(of_dense)


if __name__ == "__main__":
    main()
