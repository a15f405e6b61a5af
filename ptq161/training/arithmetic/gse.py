"""The integers of GSQ-Tuning (Zhou et al., Findings of ACL 2025, arXiv 2502.12913) as an arithmetic.

The numbers themselves are those of the storage format (:mod:`ptq161.packed.gse`). A training multiplies what they stand
for in floating point: float32 holds each group's sum exactly, and :func:`integer_product`, which is the computation of
an accelerator of integers, gives the same (its tests say how closely).
"""

from __future__ import annotations

from functools import partial

import torch
from torch import Tensor
from torch.nn import functional as F

from ptq161.packed.gse import dequantize, quantize, round_to_grid
from ptq161.training.arithmetic.base import Arithmetic, ArithmeticSettings

__all__ = ["accumulate", "arithmetic", "dequantize", "integer_product", "quantize", "round_to_grid"]


def arithmetic(settings: ArithmeticSettings, weight: Tensor) -> Arithmetic:
    """Return the arithmetic of GSQ-Tuning: all operands in one format, only gradients rounded at random if at all."""
    nearest = partial(round_to_grid, bits=settings.bits, group_size=settings.group_size)
    return Arithmetic(nearest, nearest, partial(nearest, stochastic=settings.stochastic_rounding))


def accumulate(left: Tensor, right: Tensor, group_size: int = 32) -> Tensor:
    """Return each group's part of the product of two matrices of mantissas, the integers of an accelerator.

    Args:
        left: ``[m, n]`` int16.
        right: ``[k, n]`` int16, its groups along the same dimension.
        group_size: as in both.

    Returns:
        ``[m, k, groups]`` int32; for 8 bits and groups of 32 below 2^19 in size.

    Example:
        >>> accumulate(torch.tensor([[3, 1, 2]]), torch.tensor([[1, 1, 5]]), group_size=2)
        tensor([[[ 4, 10]]], dtype=torch.int32)
    """
    missing = -left.shape[1] % group_size
    a, b = (F.pad(x, (0, missing)).unflatten(1, (-1, group_size)).transpose(0, 1) for x in (left, right))
    # float64 holds sums of so few integers of so few bits exactly; torch multiplies no int16 on GPUs.
    sums: Tensor = (a.double() @ b.double().transpose(1, 2)).permute(1, 2, 0).to(torch.int32)
    return sums


def integer_product(
    left: tuple[Tensor, Tensor, Tensor],
    right: tuple[Tensor, Tensor, Tensor],
    bits: tuple[int, int],
    group_size: int = 32,
) -> Tensor:
    """Multiply two quantized matrices as an accelerator does: integers within groups, powers of two between them.

    Args:
        left: of a matrix ``[m, n]``, from :func:`quantize`.
        right: of a matrix ``[k, n]``.
        bits: of the mantissas of each.
        group_size: of both.

    Returns:
        ``[m, k]`` float64, exact where the sums over groups span less than 53 bits.

    Example:
        >>> x = torch.tensor([[1.0, -0.25]])
        >>> integer_product(quantize(x, 5), quantize(x, 8), bits=(5, 8))
        tensor([[1.0625]], dtype=torch.float64)
    """
    exponents = left[1].int().unsqueeze(1) + right[1].int().unsqueeze(0) - sum(bits) + 4
    return (accumulate(left[0], right[0], group_size) * torch.exp2(exponents.double())).sum(-1)
