"""Uniform integer codes with a scale and a zero point per output channel or group: RTN, GPTQ and their relatives.

The grid is that of IST-DASLab/gptq (``Quantizer.find_params``): the range of a group is that of its weights with
zero included; ``value = scale * (code - zero_point)``. Codes and zero points are chosen against the scale as it is
stored, so that nothing is lost between choosing and storing.
"""

from __future__ import annotations

import dataclasses
from typing import Any, ClassVar, Self

import torch
from torch import Tensor
from torch.nn import functional as F

from ptq161.errors import UserError
from ptq161.kernels.packed_rows import CODE_BITS, Operands
from ptq161.packed.bits import pack_codes, unpack_codes
from ptq161.packed.weight import SCALE_DTYPES, PackedWeight, Segment, stored_scale

UNIFORM_BITS = (2, 3, 4, 8)


@dataclasses.dataclass(frozen=True, eq=False)
class UniformWeight(PackedWeight):
    """Codes of 2, 3, 4 or 8 bits on one uniform grid per row and group of columns.

    Attributes:
        bits: bits per code.
        group_size: columns per group; None is one group per output channel. The last group may be shorter.
        symmetric: the zero point is ``2**(bits - 1)`` everywhere and not stored.
        codes: ``[out, ceil(in * bits / 8)]`` uint8.
        scales: ``[out, groups]`` in ``scale_dtype``.
        zero_points: ``[out, groups]`` in ``scale_dtype``; None when symmetric.
        group_index: ``[in]`` int32, the group of each column; None when groups are consecutive columns.

    Example:
        >>> codes = torch.tensor([[0, 1, 2, 3]])
        >>> packed = UniformWeight.pack(codes, scales=torch.tensor([[0.5]]), zero_points=torch.tensor([[1]]), bits=2)
        >>> packed.codes.shape, packed.dequantize().tolist()
        (torch.Size([1, 1]), [[-0.5, 0.0, 0.5, 1.0]])
    """

    format: ClassVar[str] = "uniform"
    offsets: ClassVar[tuple[str, ...]] = ("zero_points",)
    by_row: ClassVar[tuple[str, ...]] = ("codes", "scales", "zero_points")

    bits: int
    group_size: int | None
    symmetric: bool
    codes: Tensor
    scales: Tensor
    zero_points: Tensor | None = None
    group_index: Tensor | None = None

    @classmethod
    def pack(
        cls,
        codes: Tensor,
        scales: Tensor,
        zero_points: Tensor,
        bits: int,
        *,
        group_size: int | None = None,
        symmetric: bool = False,
        scale_dtype: str = "float16",
        group_index: Tensor | None = None,
    ) -> Self:
        """Store codes and the grid they were chosen on.

        Args:
            codes: ``[out, in]``, any integer dtype, each in ``[0, 2**bits)``.
            scales: ``[out, groups]``.
            zero_points: ``[out, groups]``, integers in ``[0, 2**bits)``; of a symmetric grid not stored.
            bits: one of ``UNIFORM_BITS``.
            group_size: columns per group; None is one group.
            symmetric: whether all zero points are ``2**(bits - 1)``.
            scale_dtype: ``float16`` or ``float32``.
            group_index: ``[in]``, the group of each column where groups are not consecutive columns.

        Raises:
            UserError: ``bits`` or ``group_size`` is out of range, or a scale leaves the range of ``scale_dtype``.
        """
        check_uniform(bits, group_size)
        return cls(
            out_features=codes.shape[0],
            in_features=codes.shape[1],
            bits=bits,
            group_size=group_size,
            symmetric=symmetric,
            codes=pack_codes(codes, bits),
            scales=stored_scale(scales, scale_dtype),
            zero_points=None if symmetric else zero_points.to(SCALE_DTYPES[scale_dtype]),
            group_index=None if group_index is None else group_index.to(torch.int32),
        )

    def unpacked_codes(self) -> Tensor:
        """Return the codes: ``[out, in]`` uint8."""
        return unpack_codes(self.codes, self.in_features, self.bits)

    def values(self) -> Tensor:
        """Return ``scale * (code - zero_point)``: ``[out, in]`` float32."""
        scales = self._per_column(self.scales)
        if self.zero_points is None:
            zero_points: Tensor = torch.full_like(scales, 2 ** (self.bits - 1))
        else:
            zero_points = self._per_column(self.zero_points)
        return uniform_values(self.unpacked_codes(), scales, zero_points)

    def segments(self) -> list[Segment] | None:
        """Return the groups of columns."""
        codes, scales = self.unpacked_codes(), self.scales.float()
        zero_points = torch.full_like(scales, 2 ** (self.bits - 1))
        if self.zero_points is not None:
            zero_points = self.zero_points.float()
        factor = self._column_factor()
        parts = []
        for group, columns in enumerate(self._columns_of_groups()):
            scale = scales[:, group : group + 1]
            shift = -scale * zero_points[:, group : group + 1]
            parts.append(Segment(columns, codes[:, columns], scale, shift, factor[columns]))
        return parts

    def operands(self) -> Operands | None:
        """Return the weight as compiled operators take it.

        None where codes have 8 bits, or groups are no consecutive columns that fill whole bytes.
        """
        whole = self.group_size is None or self.group_size * self.bits % 8 == 0
        if not whole or self.group_index is not None or self.bits not in CODE_BITS:
            return None
        tensors = (self.codes, self.scales, self.zero_points, self._input_scales())
        settings = (self.in_features, self.bits, self.group_size or self.in_features)
        return Operands("uniform", tensors, settings, 2.0**self.exponent)

    def at(self, rows: Tensor) -> Self:
        """Return the rows ``[n]`` int64, in this order.

        Raises:
            IndexError: the weight has no such row.
        """
        taken = {name: getattr(self, name) for name in self.by_row}
        changes: dict[str, Any] = {n: None if t is None else t.index_select(0, rows) for n, t in taken.items()}
        return dataclasses.replace(self, out_features=len(rows), **changes)

    def _input_scales(self) -> Tensor | None:
        return None

    def _column_factor(self) -> Tensor:
        input_scales = self._input_scales()
        if input_scales is None:
            return torch.ones(self.in_features, device=self.codes.device)
        return 1 / input_scales.float()

    def _columns_of_groups(self) -> list[Tensor]:
        columns = torch.arange(self.in_features, device=self.codes.device)
        if self.group_index is not None:
            return [columns[self.group_index == group] for group in range(self.scales.shape[1])]
        return list(columns.split(self.group_size or self.in_features))

    def _per_column(self, parameter: Tensor) -> Tensor:
        if self.group_index is not None:
            return parameter.float()[:, self.group_index]
        return per_column(parameter.float(), self.in_features, self.group_size)


def uniform_parameters(
    weight: Tensor, bits: int, symmetric: bool = False, *, scale_dtype: str = "float16"
) -> tuple[Tensor, Tensor]:
    """Find the grid of each row.

    Args:
        weight: ``[..., n]``; one grid for each slice along the last axis.
        bits: one of ``UNIFORM_BITS``.
        symmetric: center the grid on zero. A row without a negative weight then has its range cut in half, as in
            IST-DASLab/gptq, which mirrors the range only where it reaches below zero.
        scale_dtype: dtype in which the scale will be stored.

    Returns:
        scale and zero point, both ``[..., 1]`` float32, rounded to what ``scale_dtype`` can hold. A row of zeros has
        the range [-1, 1].

    Raises:
        UserError: a scale leaves the range of ``scale_dtype``, or a weight is not finite.

    Example:
        >>> uniform_parameters(torch.tensor([[-1.0, 0.5, 2.0]]), bits=2)  # 0 has a code of its own: the zero point
        (tensor([[1.]]), tensor([[1.]]))
        >>> uniform_parameters(torch.tensor([[-1.0, 0.5, 1.5]]), bits=2, symmetric=True)
        (tensor([[1.]]), tensor([[2.]]))
    """
    low = weight.float().amin(-1, keepdim=True).clamp(max=0)
    high = weight.float().amax(-1, keepdim=True).clamp(min=0)
    return uniform_grid(low, high, bits, symmetric, scale_dtype=scale_dtype)


def uniform_grid(
    low: Tensor, high: Tensor, bits: int, symmetric: bool = False, *, scale_dtype: str = "float16"
) -> tuple[Tensor, Tensor]:
    """Turn ranges ``low <= 0 <= high`` of one shape into scales and zero points (see :func:`uniform_parameters`).

    Example:
        >>> uniform_grid(torch.tensor([[-1.0]]), torch.tensor([[2.0]]), bits=2)
        (tensor([[1.]]), tensor([[1.]]))
    """
    check_uniform(bits, None)
    largest = 2**bits - 1
    if symmetric:
        high = torch.maximum(-low, high)
        low = torch.where(low < 0, -high, low)
    empty = (low == 0) & (high == 0)
    low, high = low.masked_fill(empty, -1.0), high.masked_fill(empty, 1.0)
    scale = stored_scale((high - low) / largest, scale_dtype).float()
    if symmetric:
        return scale, torch.full_like(scale, 2 ** (bits - 1))
    # A scale that underflows to zero can only stand for zeros: any zero point will do.
    zero_point = torch.where(scale > 0, torch.round(-low / scale), 0.0)
    return scale, zero_point.clamp(0, largest)


def uniform_codes(weight: Tensor, scale: Tensor, zero_point: Tensor, bits: int) -> Tensor:
    """Round to the nearest code: uint8 of the shape that the three tensors broadcast to.

    Example:
        >>> scale, zero_point = torch.tensor(1.0), torch.tensor(1.0)
        >>> uniform_codes(torch.tensor([-1.0, 0.4, 5.0]), scale, zero_point, bits=2)  # 5 is beyond the grid
        tensor([0, 1, 3], dtype=torch.uint8)
    """
    steps = torch.where(scale > 0, torch.round(weight / scale), 0.0)
    return (steps + zero_point).clamp(0, 2**bits - 1).to(torch.uint8)


def uniform_values(codes: Tensor, scale: Tensor, zero_point: Tensor) -> Tensor:
    """Return ``scale * (codes - zero_point)`` in float32.

    Example:
        >>> uniform_values(torch.tensor([0, 1, 3]), scale=torch.tensor(1.0), zero_point=torch.tensor(1.0))
        tensor([-1.,  0.,  2.])
    """
    return scale * (codes.float() - zero_point)


def uniform_nearest(weight: Tensor, scale: Tensor, zero_point: Tensor, bits: int) -> Tensor:
    """Return the nearest value of the grid: ``uniform_values(uniform_codes(...), ...)`` in fewer steps.

    Example:
        >>> scale, zero_point = torch.tensor(1.0), torch.tensor(1.0)
        >>> uniform_nearest(torch.tensor([-1.0, 0.4, 5.0]), scale, zero_point, bits=2)
        tensor([-1.,  0.,  2.])
    """
    # A scale of zero has the one value zero, which any finite code stands for.
    codes = (weight / scale.clamp(min=torch.finfo(torch.float32).tiny)).round_().add_(zero_point)
    return codes.clamp_(0, 2**bits - 1).sub_(zero_point).mul_(scale)


def grouped(weight: Tensor, group_size: int | None) -> Tensor:
    """View ``[out, in]`` as ``[out, groups, group_size]``.

    A shorter last group is filled up with zeros, which change no range: every range includes zero.

    Example:
        >>> grouped(torch.ones(2, 5), group_size=4)[0].tolist()
        [[1.0, 1.0, 1.0, 1.0], [1.0, 0.0, 0.0, 0.0]]
    """
    if group_size is None:
        return weight.unsqueeze(1)
    missing = -weight.shape[1] % group_size
    return F.pad(weight, (0, missing)).reshape(weight.shape[0], -1, group_size)


def per_column(parameter: Tensor, in_features: int, group_size: int | None) -> Tensor:
    """Repeat ``[out, groups]`` for the columns of each group: ``[out, in]``, or ``[out, 1]`` for a single group.

    Example:
        >>> per_column(torch.tensor([[1.0, 2.0]]), in_features=5, group_size=3).tolist()
        [[1.0, 1.0, 1.0, 2.0, 2.0]]
    """
    if group_size is None:
        return parameter
    return parameter.repeat_interleave(group_size, dim=1)[:, :in_features]


def check_uniform(bits: int, group_size: int | None) -> None:
    """Check the two settings of a uniform grid.

    Raises:
        UserError: one is out of range.

    Example:
        >>> check_uniform(bits=4, group_size=128)
        >>> check_uniform(bits=5, group_size=None)
        Traceback (most recent call last):
            ...
        ptq161.errors.UserError: method.bits=5: use one of 2, 3, 4, 8.
    """
    if bits not in UNIFORM_BITS:
        raise UserError(f"method.bits={bits}: use one of {', '.join(map(str, UNIFORM_BITS))}.")
    if group_size is not None and group_size < 1:
        raise UserError(f"method.group_size={group_size}: use at least 1, or null for one group per output channel.")
