"""Products of a few rows with a packed weight on the CPU, from its bytes, and the weight's dense form.

A product writes no weight to memory. The operators (``packed_rows.cpp``) take float32 and bfloat16 and compute in
float32, or with activations of eight bits where ``int8`` is set. They are not differentiable. A row of a product
depends neither on the number of threads nor on the rows beside it; the dense form has the bits that torch gives.
:mod:`ptq161.packed` says which tensors each of its formats has, and has the same in torch.
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


def usable(dtype: torch.dtype, tensor: Tensor) -> bool:
    """Whether the operators serve a dtype and the device of a tensor, and are compiled."""
    return dtype in DTYPES and tensor.device.type == "cpu" and _loaded()


def product(operands: Operands, x: Tensor, bias: Tensor | None, *, int8: bool = False, level: int = HIGHEST) -> Tensor:
    """Return ``x @ W.T + bias``.

    Args:
        operands: the weight ``[out, in]``.
        x: ``[..., in]``, in one of ``DTYPES``.
        bias: ``[out]`` in the dtype of ``x``.
        int8: round the activations of each row to eight bits.
        level: the highest instruction set to use.

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
    """Return the weight: ``[out, in]`` in one of ``DTYPES``.

    Raises:
        RuntimeError: the tensors are not those of one weight.
    """
    operator = getattr(torch.ops.ptq161, f"{operands.format}_dense")
    weight: Tensor = operator(*operands.tensors, *operands.settings, operands.factor, dtype == torch.bfloat16)
    return weight


@torch.compiler.assume_constant_result  # type: ignore[untyped-decorator]  # torch leaves it without annotations
def _loaded() -> bool:
    """Whether there are operators, which torch's compiler is not to trace."""
    return _load()


@functools.cache
def _load() -> bool:
    """Load the operators, once, and tell torch the shapes of their results, for tracing; False if there are none."""
    if not native.load("packed_rows"):
        return False

    def register(name: str, rows: Any, in_features: Any) -> None:
        def of_product(x: Tensor, *operands: Any) -> Tensor:
            return x.new_empty((*x.shape[:-1], rows(operands)))

        def of_dense(*operands: Any) -> Tensor:
            dtype = torch.bfloat16 if operands[-1] else torch.float32
            return _first(operands).new_empty((rows(operands), in_features(operands)), dtype=dtype)

        torch.library.register_fake(f"ptq161::{name}_rows", of_product)
        torch.library.register_fake(f"ptq161::{name}_dense", of_dense)

    register("structured_binary", lambda given: given[1].shape[0], lambda given: given[8])
    register("uniform", lambda given: given[0].shape[0], lambda given: given[4])
    register("allotted", lambda given: given[1][0].shape[0], lambda given: given[8])
    return True


def _first(operands: tuple[Any, ...]) -> Tensor:
    flat = [part for given in operands for part in (given if isinstance(given, (list, tuple)) else [given])]
    return next(part for part in flat if isinstance(part, Tensor))
