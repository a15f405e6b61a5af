"""Products of a few rows with a packed weight, from its bytes, and the weight's dense form.

A product writes no weight to memory. The operators are compiled for the CPU (C++ files of this folder), and those for
codes of 1 to 4 bits are written in Triton for CUDA devices, too (``triton_rows.py``); they compute in float32. On a CPU
the operators for codes also take activations of eight bits, where ``int8`` is set. They are not differentiable. On a
CPU a row of a product depends neither on the number of threads nor on the rows beside it; the dense form has the bits
that torch gives. :mod:`ptq161.packed` says which tensors each of its formats has, and has the same in torch.
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
"""Of the codes that the operators of ``CODES`` take."""
CODES = "packed_rows"
"""The source of operators for codes: theirs alone take activations of eight bits and instruction sets."""
HIGHEST = 2
"""Instruction sets: 0 is portable, 1 AVX2, 2 AVX-512; the processor's highest up to the one that is given is used."""


class Operands(NamedTuple):
    """A packed weight as the operators take it.

    Attributes:
        format: by which the operators are named.
        tensors: the weight's, in the order of the operator's schema; lists and None among them.
        settings: the plain values behind them, up to the factor; in other sources than ``CODES`` they begin with rows
            and columns.
        factor: of the whole weight.
        source: of the operators.
    """

    format: str
    tensors: tuple[Any, ...]
    settings: tuple[Any, ...]
    factor: float
    source: str = CODES


def usable(dtype: torch.dtype, tensor: Tensor, source: str = CODES, *, int8: bool = False) -> bool:
    """Whether the operators of a source serve a dtype and the device of a tensor, and are compiled, or have Triton."""
    device = tensor.device.type
    if device == "cuda" and (int8 or source != CODES):
        return False
    return dtype in DTYPES.get(device, ()) and _loaded(source, device)


def product(operands: Operands, x: Tensor, bias: Tensor | None, *, int8: bool = False, level: int = HIGHEST) -> Tensor:
    """Return ``x @ W.T + bias``.

    Args:
        operands: the weight ``[out, in]``.
        x: ``[..., in]``, in one of its device's ``DTYPES``.
        bias: ``[out]`` in the dtype of ``x``.
        int8: round the activations of each row to eight bits; only for ``CODES`` on a CPU.
        level: the highest instruction set of a CPU to use, for ``CODES``; operators of other sources have the one for
            which they are compiled.

    Returns:
        ``[..., out]`` in the dtype of ``x``.

    Raises:
        RuntimeError: the tensors are not those of one weight.
    """
    operator = getattr(torch.ops.ptq161, f"{operands.format}_rows")
    settings = (*operands.settings, operands.factor, *((int8, level) if operands.source == CODES else ()))
    y: Tensor = operator(x.contiguous(), *operands.tensors, bias, *settings)
    return y


def dense(operands: Operands, dtype: torch.dtype, rows: tuple[int, int] | None = None) -> Tensor:
    """Return the weight: ``[out, in]`` in one of its device's ``DTYPES``.

    Args:
        operands: the weight.
        dtype: of the result.
        rows: the first of some rows of it, and the one behind them; not for ``CODES``.

    Raises:
        RuntimeError: the tensors are not those of one weight.
    """
    operator = getattr(torch.ops.ptq161, f"{operands.format}_dense")
    part = () if operands.source == CODES else rows or (0, operands.settings[0])
    weight: Tensor = operator(*operands.tensors, *operands.settings, operands.factor, dtype, *part)
    return weight


@torch.compiler.assume_constant_result  # type: ignore[untyped-decorator]  # torch leaves it without annotations
def _loaded(source: str, device: str) -> bool:
    """Whether a source has operators for a kind of device, which torch's compiler is not to trace."""
    return _load(source, device)


@functools.cache
def _load(source: str, device: str) -> bool:
    """Load the operators of a source for a kind of device, once; False if there are none."""
    if device == "cuda":
        return _load_triton()
    if not native.load(source):
        return False
    for name in _OF_SOURCE.get(source, ()):
        _register(name, _row_count, _column_count, whole=False)
    return True


def _load_triton() -> bool:
    """Register Triton's kernels as the operators for codes on CUDA devices."""
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


_OF_SOURCE = {
    "codebook_rows": ("vector",),
    "binary_rows": ("billm", "pb_llm", "row_column_binary"),
    "level_rows": ("levels",),
}
"""Names of the operators of each other source, which defines their schemas."""
SOURCES = (CODES, *_OF_SOURCE)
"""Of operators: names of C++ files."""
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
"""The tensors and the settings of each format of ``CODES``."""
_LIBRARY = torch.library.Library("ptq161", "FRAGMENT")


def _define(name: str, rows: Any, in_features: Any) -> None:
    """Define the two operators of a format of ``CODES``."""
    tensors, settings = _SCHEMAS[name]
    _LIBRARY.define(
        f"{name}_rows(Tensor x, {tensors}, Tensor? bias, {settings}, float factor, bool int8, int level) -> Tensor"
    )
    _LIBRARY.define(f"{name}_dense({tensors}, {settings}, float factor, ScalarType dtype) -> Tensor")
    _register(name, rows, in_features, whole=True)


def _register(name: str, rows: Any, in_features: Any, *, whole: bool) -> None:
    """Tell torch the shapes of the results of two operators, for tracing, from what they are given."""

    def of_product(x: Tensor, *operands: Any) -> Tensor:
        return x.new_empty((*x.shape[:-1], rows(operands)))

    def of_dense(*operands: Any) -> Tensor:
        given = operands if whole else operands[:-2]
        n_rows = rows(given) if whole else operands[-1] - operands[-2]
        return _first(operands).new_empty((n_rows, in_features(given)), dtype=given[-1])

    torch.library.register_fake(f"ptq161::{name}_rows", of_product, lib=_LIBRARY)
    torch.library.register_fake(f"ptq161::{name}_dense", of_dense, lib=_LIBRARY)


def _row_count(operands: tuple[Any, ...]) -> int:
    return _numbers(operands)[0]


def _column_count(operands: tuple[Any, ...]) -> int:
    return _numbers(operands)[1]


def _numbers(operands: tuple[Any, ...]) -> list[int]:
    return [given for given in operands if type(given) is int]


def _first(operands: tuple[Any, ...]) -> Tensor:
    flat = [part for given in operands for part in (given if isinstance(given, (list, tuple)) else [given])]
    return next(part for part in flat if isinstance(part, Tensor))


_define("structured_binary", lambda given: given[1].shape[0], lambda given: given[8])
_define("uniform", lambda given: given[0].shape[0], lambda given: given[4])
_define("allotted", lambda given: given[1][0].shape[0], lambda given: given[8])
