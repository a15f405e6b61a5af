"""Products of a few rows with a packed weight on the CPU, from its bytes, and the weight's dense form.

A product writes no weight to memory. The operators take float32 and bfloat16 and compute in float32; those for codes of
1 to 4 bits (``packed_rows.cpp``) also with activations of eight bits, where ``int8`` is set. They are not
differentiable. A row of a product depends neither on the number of threads nor on the rows beside it; the dense form
has the bits that torch gives. :mod:`ptq161.packed` says which tensors each of its formats has, and has the same in
torch.
"""

from __future__ import annotations

import functools
from typing import Any, NamedTuple

import torch
from torch import Tensor

from ptq161.kernels import native

DTYPES = (torch.float32, torch.bfloat16)
"""Of rows, and of dense weights."""
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


def usable(dtype: torch.dtype, tensor: Tensor, source: str = CODES) -> bool:
    """Whether the operators of a source serve a dtype and the device of a tensor, and are compiled."""
    return dtype in DTYPES and tensor.device.type == "cpu" and _loaded(source)


def product(operands: Operands, x: Tensor, bias: Tensor | None, *, int8: bool = False, level: int = HIGHEST) -> Tensor:
    """Return ``x @ W.T + bias``.

    Args:
        operands: the weight ``[out, in]``.
        x: ``[..., in]``, in one of ``DTYPES``.
        bias: ``[out]`` in the dtype of ``x``.
        int8: round the activations of each row to eight bits; only for ``CODES``.
        level: the highest instruction set to use, for ``CODES``; operators of other sources have the one for which they
            are compiled.

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
    """Return the weight: ``[out, in]`` in one of ``DTYPES``.

    Args:
        operands: the weight.
        dtype: of the result.
        rows: the first of some rows of it, and the one behind them; not for ``CODES``.

    Raises:
        RuntimeError: the tensors are not those of one weight.
    """
    operator = getattr(torch.ops.ptq161, f"{operands.format}_dense")
    part = () if operands.source == CODES else rows or (0, operands.settings[0])
    settings = (*operands.settings, operands.factor, dtype == torch.bfloat16, *part)
    weight: Tensor = operator(*operands.tensors, *settings)
    return weight


@torch.compiler.assume_constant_result  # type: ignore[untyped-decorator]  # torch leaves it without annotations
def _loaded(source: str) -> bool:
    """Whether there are operators, which torch's compiler is not to trace."""
    return _load(source)


@functools.cache
def _load(source: str) -> bool:
    """Load the operators, once, and tell torch the shapes of their results, for tracing; False if there are none."""
    if not native.load(source):
        return False
    for name, rows, in_features in _SHAPES[source]:
        _register(name, rows, in_features, whole=source == CODES)
    return True


_OF_SETTINGS = (lambda given: _numbers(given)[0], lambda given: _numbers(given)[1])
_SHAPES: dict[str, list[tuple[str, Any, Any]]] = {
    CODES: [
        ("structured_binary", lambda given: given[1].shape[0], lambda given: given[8]),
        ("uniform", lambda given: given[0].shape[0], lambda given: given[4]),
        ("allotted", lambda given: given[1][0].shape[0], lambda given: given[8]),
    ],
    "codebook_rows": [("vector", *_OF_SETTINGS)],
    "binary_rows": [(name, *_OF_SETTINGS) for name in ("billm", "pb_llm", "row_column_binary")],
    "level_rows": [("levels", *_OF_SETTINGS)],
}
"""Names of the operators of each source, and rows and columns of a weight from what an operator is given."""
SOURCES = tuple(_SHAPES)
"""Of operators: names of C++ files."""


def _register(name: str, rows: Any, in_features: Any, *, whole: bool) -> None:
    def of_product(x: Tensor, *operands: Any) -> Tensor:
        return x.new_empty((*x.shape[:-1], rows(operands)))

    def of_dense(*operands: Any) -> Tensor:
        given = operands if whole else operands[:-2]
        n_rows = rows(given) if whole else operands[-1] - operands[-2]
        dtype = torch.bfloat16 if given[-1] else torch.float32
        return _first(operands).new_empty((n_rows, in_features(given)), dtype=dtype)

    torch.library.register_fake(f"ptq161::{name}_rows", of_product)
    torch.library.register_fake(f"ptq161::{name}_dense", of_dense)


def _numbers(operands: tuple[Any, ...]) -> list[int]:
    return [given for given in operands if not isinstance(given, (Tensor, list, tuple, bool)) and given is not None]


def _first(operands: tuple[Any, ...]) -> Tensor:
    flat = [part for given in operands for part in (given if isinstance(given, (list, tuple)) else [given])]
    return next(part for part in flat if isinstance(part, Tensor))
