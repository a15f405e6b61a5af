"""Products of a few rows with a packed weight, from its bytes, and the weight's dense form.

A product writes no weight to memory. The operators are compiled for the CPU (``packed_rows.cpp``) and written in Triton
for CUDA devices (``triton_rows.py``); they compute in float32, or on a CPU with activations of eight bits where
``int8`` is set. They are not differentiable. On a CPU a row of a product depends neither on the number of threads nor
on the rows beside it; the dense form has the bits that torch gives. :mod:`ptq161.packed` says which tensors each of its
formats has, and has the same in torch.
"""

from __future__ import annotations

import functools
import logging
from typing import Any, NamedTuple

import torch
from torch import Tensor

from ptq161.errors import UserError
from ptq161.kernels import native

log = logging.getLogger(__name__)

DTYPES = {"cpu": (torch.float32, torch.bfloat16), "cuda": (torch.float32, torch.bfloat16, torch.float16)}
"""Of rows, and of dense weights, by the kind of device."""
CODE_BITS = (1, 2, 3, 4)
"""Of the codes that the operators take."""
HIGHEST = 2
"""Instruction sets: 0 is portable, 1 AVX2, 2 AVX-512; the processor's highest up to the one that is given is used."""


class Operands(NamedTuple):
    """A packed weight as the operators take it.

    Attributes:
        format: one of ``structured_binary``, ``uniform`` and ``allotted``.
        tensors: the weight's, in the order of the operator's schema; lists and None among them.
        settings: the plain values behind them, up to the factor.
        factor: of the whole weight.
    """

    format: str
    tensors: tuple[Any, ...]
    settings: tuple[Any, ...]
    factor: float


def usable(dtype: torch.dtype, tensor: Tensor, *, int8: bool = False) -> bool:
    """Whether the operators serve a dtype and the device of a tensor, and are compiled, or Triton is installed."""
    device = tensor.device.type
    return dtype in DTYPES.get(device, ()) and not (int8 and device == "cuda") and _loaded(device)


def product(operands: Operands, x: Tensor, bias: Tensor | None, *, int8: bool = False, level: int = HIGHEST) -> Tensor:
    """Return ``x @ W.T + bias``.

    Args:
        operands: the weight ``[out, in]``.
        x: ``[..., in]``, in one of its device's ``DTYPES``.
        bias: ``[out]`` in the dtype of ``x``.
        int8: round the activations of each row to eight bits; on a CPU.
        level: the highest instruction set of a CPU to use.

    Returns:
        ``[..., out]`` in the dtype of ``x``.

    Raises:
        RuntimeError: the tensors are not those of one weight.
    """
    operator = getattr(torch.ops.ptq161, f"{operands.format}_rows")
    settings = (*operands.settings, operands.factor, int8, level)
    y: Tensor = operator(x.contiguous(), *operands.tensors, bias, *settings)
    return y


def dense(operands: Operands, dtype: torch.dtype) -> Tensor:
    """Return the weight: ``[out, in]`` in one of its device's ``DTYPES``.

    Raises:
        RuntimeError: the tensors are not those of one weight.
    """
    operator = getattr(torch.ops.ptq161, f"{operands.format}_dense")
    weight: Tensor = operator(*operands.tensors, *operands.settings, operands.factor, dtype)
    return weight


@torch.compiler.assume_constant_result  # type: ignore[untyped-decorator]  # torch leaves it without annotations
def _loaded(device: str) -> bool:
    """Whether there are operators for a kind of device, which torch's compiler is not to trace."""
    return _load(device)


@functools.cache
def _load(device: str) -> bool:
    """Load the operators for a kind of device, once; False if there are none."""
    if device == "cpu":
        return native.load("packed_rows")
    try:
        from ptq161.kernels import triton_rows
    except ImportError as error:
        log.warning("Triton cannot be imported, so that weights are dequantized on the GPU (%s).", error)
        return False
    for name, (tensors, _) in _SCHEMAS.items():
        weight_of, n = getattr(triton_rows, name), len(tensors.split(","))

        def rows(x: Tensor, *given: Any, weight_of: Any = weight_of, n: int = n) -> Tensor:
            *settings, factor, int8, _ = given[n + 1 :]
            if int8:
                raise UserError("activations of eight bits: there is no operator for them on a GPU.")
            return triton_rows.product(weight_of(*given[:n], *settings), x, given[n], factor)

        def dense(*given: Any, weight_of: Any = weight_of) -> Tensor:
            *operands, factor, dtype = given
            return triton_rows.dense(weight_of(*operands), dtype, factor)

        _LIBRARY.impl(f"{name}_rows", rows, "CUDA")
        _LIBRARY.impl(f"{name}_dense", dense, "CUDA")
    return True


_SCHEMAS = {
    "structured_binary": (
        "Tensor mask, Tensor sign, Tensor scale, Tensor mean, Tensor column_angle, Tensor codes, Tensor salient_scale, "
        "Tensor salient_zero_point",
        "int in_features, int salient_bits",
    ),
    "uniform": (
        "Tensor codes, Tensor scales, Tensor? zero_points, Tensor? input_scales",
        "int in_features, int bits, int group_size",
    ),
    "allotted": (
        "Tensor? labels, Tensor[] codes, Tensor? row, Tensor? column, Tensor? ranged_scale, Tensor? zero_point",
        "int[] tiers, float[] steps, int in_features",
    ),
}
"""The tensors and the settings of each format."""
_LIBRARY = torch.library.Library("ptq161", "FRAGMENT")


def _define(name: str, rows: Any, in_features: Any) -> None:
    """Define the two operators of a format, and the shapes of their results, for tracing."""
    tensors, settings = _SCHEMAS[name]
    _LIBRARY.define(
        f"{name}_rows(Tensor x, {tensors}, Tensor? bias, {settings}, float factor, bool int8, int level) -> Tensor"
    )
    _LIBRARY.define(f"{name}_dense({tensors}, {settings}, float factor, ScalarType dtype) -> Tensor")

    def of_product(x: Tensor, *operands: Any) -> Tensor:
        return x.new_empty((*x.shape[:-1], rows(operands)))

    def of_dense(*operands: Any) -> Tensor:
        return _first(operands).new_empty((rows(operands), in_features(operands)), dtype=operands[-1])

    torch.library.register_fake(f"ptq161::{name}_rows", of_product, lib=_LIBRARY)
    torch.library.register_fake(f"ptq161::{name}_dense", of_dense, lib=_LIBRARY)


def _first(operands: tuple[Any, ...]) -> Tensor:
    flat = [part for given in operands for part in (given if isinstance(given, (list, tuple)) else [given])]
    return next(part for part in flat if isinstance(part, Tensor))


_define("structured_binary", lambda given: given[1].shape[0], lambda given: given[8])
_define("uniform", lambda given: given[0].shape[0], lambda given: given[4])
_define("allotted", lambda given: given[1][0].shape[0], lambda given: given[8])
