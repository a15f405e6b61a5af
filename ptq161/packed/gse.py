"""Group-shared-exponent integers (GSE; Zhou et al., Findings of ACL 2025, arXiv 2502.12913), and weights of them.

A group of ``group_size`` numbers shares the exponent ``e = floor(log2 max|x|)``. A number is ``mantissa * 2^(e - bits +
2)`` with an integer mantissa of ``bits`` bits, its sign included: a group's part of a dot product is one of integers,
and a power of two times it. What the paper leaves open is fixed here: mantissas are rounded to even and clamped to
``+-(2^(bits-1) - 1)``; exponents take 5 bits below the largest one of a tensor, and a group below them takes the least.
"""

from __future__ import annotations

import dataclasses
from typing import ClassVar, Self

import torch
from torch import Tensor
from torch.nn import functional as F

from ptq161.checks import check_at_least
from ptq161.errors import UserError
from ptq161.kernels.minifloat import power_of_two
from ptq161.kernels.packed_rows import Operands
from ptq161.packed.bits import pack_indices, unpack_indices
from ptq161.packed.weight import PackedWeight

LEAST_BITS = 2
MOST_BITS = 8

EXPONENT_BITS = 5
EXPONENT_SPAN = 2**EXPONENT_BITS - 1
"""Exponents of a tensor lie at most so far below its largest."""

# The step of 8 bits is the least normal float32 there. The largest exponent of a tensor fits an int8, too.
_LEAST_EXPONENT = -120
_MOST_EXPONENT = 127


@dataclasses.dataclass(frozen=True, eq=False)
class GseWeight(PackedWeight):
    """Integers of 2 to 8 bits with an exponent of 5 bits per row and group of columns.

    Attributes:
        bits: of a mantissa, its sign included.
        group_size: columns per group. The last group may be shorter.
        mantissas: uint8, those of all rows one after the other in ``bits`` bits each, plus ``2**(bits - 1) - 1``.
        exponents: uint8, ``base - exponent`` of each row's groups in 5 bits each.
        base: ``[1]`` int8, the largest exponent.

    Example:
        >>> packed = GseWeight.pack(*quantize(torch.tensor([[1.0, -0.26, 0.0, 6.0]]), 5, 2), bits=5, group_size=2)
        >>> packed.dequantize().tolist()
        [[1.0, -0.25, 0.0, 6.0]]
        >>> packed.nbytes  # 20 bits of mantissas in parts of 4 and 1, 10 bits of exponents likewise, and the base
        6
    """

    format: ClassVar[str] = "gse"

    bits: int
    group_size: int
    mantissas: Tensor
    exponents: Tensor
    base: Tensor

    @classmethod
    def pack(cls, mantissa: Tensor, exponent: Tensor, base: Tensor, bits: int, group_size: int = 32) -> Self:
        """Store what :func:`quantize` returns of a weight ``[out, in]``."""
        return cls(
            out_features=mantissa.shape[0],
            in_features=mantissa.shape[1],
            bits=bits,
            group_size=group_size,
            mantissas=pack_indices(mantissa + _offset(bits), bits),
            exponents=pack_indices(base - exponent, EXPONENT_BITS),
            base=base.to(torch.int8).reshape(1),
        )

    def unpacked(self) -> tuple[Tensor, Tensor, Tensor]:
        """Return mantissa ``[out, in]``, exponent ``[out, groups]`` and base, as :func:`quantize` did."""
        rows, groups = self.out_features, -(-self.in_features // self.group_size)
        mantissa = unpack_indices(self.mantissas, rows * self.in_features, self.bits) - _offset(self.bits)
        below = unpack_indices(self.exponents, rows * groups, EXPONENT_BITS)
        base = self.base[0].to(torch.int16)
        return mantissa.view(rows, -1).to(torch.int16), base - below.view(rows, -1).to(torch.int16), base

    def values(self) -> Tensor:
        """Return ``mantissa * 2^(exponent - bits + 2)``: ``[out, in]`` float32."""
        return dequantize(*self.unpacked(), self.bits, self.group_size)

    def operands(self) -> Operands | None:
        """Return the weight as compiled operators take it."""
        levels = torch.arange(2**self.bits, dtype=torch.float32) - _offset(self.bits)
        steps = power_of_two(self.base.cpu().int() - torch.arange(2**EXPONENT_BITS) - self.bits + 2)
        settings = (self.out_features, self.in_features, self.group_size)
        tensors = (self.mantissas, levels, self.exponents, steps)
        return Operands("levels", tensors, settings, 2.0**self.exponent, "level_rows")


def quantize(
    x: Tensor,
    bits: int,
    group_size: int = 32,
    *,
    stochastic: bool = False,
    generator: torch.Generator | None = None,
) -> tuple[Tensor, Tensor, Tensor]:
    """Quantize a tensor, with groups along its last dimension.

    Args:
        x: ``[..., n]`` of any float dtype, finite.
        bits: of a mantissa, its sign included, 2 to 8.
        group_size: numbers that share an exponent; the last group of a row may be shorter.
        stochastic: round up or down at random, to the number itself on average, in place of to the nearest.
        generator: of the random numbers, on the device of ``x``; None is torch's global one.

    Returns:
        mantissa ``[..., n]`` int16; exponent ``[..., groups]`` int16, ``e`` of each group; and base, int16 without
        dimensions: the largest exponent, 0 where all numbers are zero.

    Example:
        >>> mantissa, exponent, base = quantize(torch.tensor([[1.0, -0.26, 0.0, 6.0]]), bits=5, group_size=2)
        >>> mantissa.tolist(), exponent.tolist(), int(base)
        ([[8, -2, 0, 12]], [[0, 2]], 2)
    """
    grouped = _grouped(x, x.ndim - 1, group_size)
    exponent, base = _exponents(grouped.abs().amax(-1, keepdim=True))
    scaled = grouped / power_of_two(exponent - bits + 2)
    mantissa = _rounded(scaled, bits, stochastic, generator).flatten(-2)[..., : x.shape[-1]]
    return mantissa.to(torch.int16), exponent.squeeze(-1).to(torch.int16), base.to(torch.int16)


def dequantize(
    mantissa: Tensor,
    exponent: Tensor,
    base: Tensor,
    bits: int,
    group_size: int = 32,
    dtype: torch.dtype = torch.float32,
) -> Tensor:
    """Return the numbers ``mantissa * 2^(exponent - bits + 2)``, exactly.

    Args:
        mantissa: ``[..., n]`` integers.
        exponent: ``[..., groups]`` integers.
        base: the largest exponent of the tensor; exponents more than ``EXPONENT_SPAN`` below it count as the least.
        bits: of a mantissa.
        group_size: numbers that share an exponent.
        dtype: of the result, float32 or float64.

    Returns:
        ``[..., n]``.

    Example:
        >>> x = torch.tensor([[1.0, -0.26, 0.0, 6.0]])
        >>> dequantize(*quantize(x, bits=5, group_size=2), bits=5, group_size=2)
        tensor([[ 1.0000, -0.2500,  0.0000,  6.0000]])
    """
    stored = torch.maximum(exponent.int(), base.int() - EXPONENT_SPAN)
    step = power_of_two(stored - bits + 2).to(dtype)
    return mantissa.to(dtype) * step.repeat_interleave(group_size, -1)[..., : mantissa.shape[-1]]


def round_to_grid(matrix: Tensor, dim: int, bits: int, group_size: int = 32, stochastic: bool = False) -> Tensor:
    """Return what :func:`dequantize` gives of :func:`quantize`, with groups along any dimension.

    Where a group has a number that is not finite, all of it becomes NaN: a training stops there. Random numbers come
    from torch's global generator.

    Example:
        >>> round_to_grid(torch.tensor([[1.0], [-0.26]]), 0, bits=5).flatten()
        tensor([ 1.0000, -0.2500])
    """
    if not matrix.numel():  # an expert that no token goes to
        return matrix
    grouped = _grouped(matrix, dim, group_size)
    largest = grouped.abs().amax(dim + 1, keepdim=True)
    step = power_of_two(_exponents(largest)[0] - bits + 2)
    step = torch.where(largest.isfinite(), step, torch.nan).to(grouped.dtype)
    values = _rounded(grouped / step, bits, stochastic, None).mul_(step)
    return values.flatten(dim, dim + 1).narrow(dim, 0, matrix.shape[dim])


def check_gse(group: str, bits: int, group_size: int) -> None:
    """Check the two settings of the format.

    Args:
        group: the configuration group, for the error.
        bits: of a mantissa.
        group_size: numbers that share an exponent.

    Raises:
        UserError: one is out of range.

    Example:
        >>> check_gse("method", bits=5, group_size=32)
        >>> check_gse("method", bits=9, group_size=32)
        Traceback (most recent call last):
            ...
        ptq161.errors.UserError: method.bits=9: use 2 to 8.
    """
    if not LEAST_BITS <= bits <= MOST_BITS:
        raise UserError(f"{group}.bits={bits}: use {LEAST_BITS} to {MOST_BITS}.")
    check_at_least(f"{group}.group_size", group_size, 1)


def _grouped(x: Tensor, dim: int, group_size: int) -> Tensor:
    """Return ``x`` in float32 or wider (integers as they are) with ``dim`` split in groups, zeros at the end."""
    missing = -x.shape[dim] % group_size
    if x.is_floating_point() and x.dtype != torch.float64:
        x = x.float()
    if missing:
        x = F.pad(x, (0, 0) * (x.ndim - 1 - dim) + (0, missing))
    grouped: Tensor = x.unflatten(dim, (-1, group_size))
    return grouped


def _exponents(largest: Tensor) -> tuple[Tensor, Tensor]:
    """Return each group's exponent, int32, and the largest of them, from the groups' largest absolute values."""
    exponent = torch.frexp(largest).exponent - 1
    lowest = torch.full_like(exponent, _LEAST_EXPONENT)
    exponent = torch.where(largest > 0, exponent.clamp(_LEAST_EXPONENT, _MOST_EXPONENT), lowest)
    base = torch.where((largest > 0).any(), exponent.max(), 0)
    return torch.maximum(exponent, (base - EXPONENT_SPAN).clamp(min=_LEAST_EXPONENT)), base


def _rounded(scaled: Tensor, bits: int, stochastic: bool, generator: torch.Generator | None) -> Tensor:
    if stochastic:
        noise = torch.rand(scaled.shape, generator=generator, dtype=scaled.dtype, device=scaled.device)
        rounded = scaled.add_(noise).floor_()
    else:
        rounded = scaled.round_()
    most = 2 ** (bits - 1) - 1
    return rounded.clamp_(-most, most)


def _offset(bits: int) -> int:
    """Return what makes a mantissa a code: its largest size."""
    return (1 << (bits - 1)) - 1
