"""The storage format of allotted channel bits: each input channel has codes of 1, 2, 3 or 4 bits.

Which of them a channel has is its label. Channels of 1 to 3 bits lie on a symmetric grid of evenly spaced values around
zero, scaled by a factor per row and one per column; those of 4 bits on a grid from the smallest to the largest weight
of each row, which holds the outliers.
"""

from __future__ import annotations

import dataclasses
from typing import ClassVar, NamedTuple, Self

import torch
from torch import Tensor

from ptq161.errors import UserError
from ptq161.kernels.packed_rows import Operands
from ptq161.packed.bits import merge_columns, pack_codes, unpack_codes
from ptq161.packed.weight import PackedWeight, Segment, stored_scale

TIERS = (1, 2, 3, 4)
"""Bits that a channel may have."""
RANGED = 4
"""The tier whose grid spans the range of each row."""
STEPS = {1: 1.5957691, 2: 0.9957, 3: 0.5860}
"""Distance between neighboring values of the grid with the least squared error for a unit Gaussian (Max 1960)."""


class Grid(NamedTuple):
    """Where the values of a weight ``[out, in]`` may lie, channel by channel.

    Attributes:
        row: ``[out, 1]``, factor of each row below 4 bits.
        column: ``[in]``, factor of each channel; read below 4 bits.
        scale: ``[out, 1]``, step of the 4-bit grid.
        zero_point: ``[out, 1]``, code of zero on it, an integer from 0 to 15.

    Example:
        >>> ones = torch.ones(2, 1)
        >>> Grid(row=ones / 3, column=torch.ones(4), scale=ones, zero_point=ones).stored("float16").row.tolist()
        [[0.333251953125], [0.333251953125]]
    """

    row: Tensor
    column: Tensor
    scale: Tensor
    zero_point: Tensor

    def stored(self, scale_dtype: str) -> Grid:
        """Return the grid as it is stored: factors and step rounded to ``scale_dtype``, in float32."""
        row, column, scale = (stored_scale(part, scale_dtype).float() for part in self[:3])
        return Grid(row, column, scale, self.zero_point)


@dataclasses.dataclass(frozen=True, eq=False)
class AllottedWeight(PackedWeight):
    """``W[o, i] = row[o] * column[i] * step * (code - center)``, and for 4 bits ``scale[o] * (code - zero_point[o])``.

    With ``n_b`` channels of ``b`` bits, and ``n = n_1 + n_2 + n_3``:

    Attributes:
        tiers: bits of each label, such as ``[1, 2, 4]``.
        labels: ``[ceil(in * label_bits / 8)]`` uint8, each channel's place in ``tiers``; None for a single tier. A
            label has as few bits as the number of tiers needs.
        codes_1: ``[out, ceil(n_1 / 8)]`` uint8, of the channels of one bit in their order; None without any, as below.
        codes_2: ``[out, ceil(n_2 * 2 / 8)]`` uint8.
        codes_3: ``[out, ceil(n_3 * 3 / 8)]`` uint8.
        codes_4: ``[out, ceil(n_4 * 4 / 8)]`` uint8.
        row: ``[out, 1]``, factor of each row; None where all channels have 4 bits.
        column: ``[n]``, factor of each channel of less than 4 bits, in their order in the weight.
        ranged_scale: ``[out, 1]``, step of the 4-bit grid.
        zero_point: ``[ceil(out / 2)]`` uint8, two to a byte: code of zero.

    Example:
        >>> bits = torch.tensor([1, 4, 2, 1])
        >>> codes = torch.tensor([[1, 15, 3, 0], [0, 0, 0, 1]])
        >>> grid = Grid(row=torch.tensor([[1.0], [2.0]]), column=torch.ones(4), scale=torch.ones(2, 1),
        ...             zero_point=torch.tensor([[5.0], [0.0]]))
        >>> packed = AllottedWeight.pack(codes, bits, grid, tiers=[1, 2, 4])
        >>> [[round(value, 2) for value in row] for row in packed.dequantize().tolist()]
        [[0.8, 10.0, 1.49, -0.8], [-1.6, 0.0, -2.99, 1.6]]
        >>> packed.code_bits()
        2.0
    """

    format: ClassVar[str] = "allotted"
    by_row: ClassVar[tuple[str, ...]] = ("codes_1", "codes_2", "codes_3", "codes_4", "row", "ranged_scale")

    tiers: list[int]
    labels: Tensor | None = None
    codes_1: Tensor | None = None
    codes_2: Tensor | None = None
    codes_3: Tensor | None = None
    codes_4: Tensor | None = None
    row: Tensor | None = None
    column: Tensor | None = None
    ranged_scale: Tensor | None = None
    zero_point: Tensor | None = None

    @classmethod
    def pack(cls, codes: Tensor, bits: Tensor, grid: Grid, *, tiers: list[int], scale_dtype: str = "float16") -> Self:
        """Store codes, the bits of each channel and the grid.

        Args:
            codes: ``[out, in]``, any integer dtype, each below 2 to its channel's bits.
            bits: ``[in]`` integers, each one of ``tiers``.
            grid: of the whole weight.
            tiers: bits that a channel may have, rising.
            scale_dtype: ``float16`` or ``float32``, of the factors and the 4-bit step.

        Raises:
            UserError: ``tiers`` are out of range, or a factor leaves the range of ``scale_dtype``.
        """
        check_tiers(tiers)
        ranged = bits == RANGED
        has_ranged, has_scaled = bool(ranged.any()), not bool(ranged.all())
        labels = torch.bucketize(bits, torch.tensor(tiers, device=bits.device))
        codes_1, codes_2, codes_3, codes_4 = (
            pack_codes(codes[:, bits == b], b) if bool((bits == b).any()) else None for b in TIERS
        )
        return cls(
            out_features=codes.shape[0],
            in_features=codes.shape[1],
            tiers=list(tiers),
            labels=pack_codes(labels, _label_bits(tiers)) if len(tiers) > 1 else None,
            codes_1=codes_1,
            codes_2=codes_2,
            codes_3=codes_3,
            codes_4=codes_4,
            row=stored_scale(grid.row, scale_dtype) if has_scaled else None,
            column=stored_scale(grid.column[~ranged], scale_dtype) if has_scaled else None,
            ranged_scale=stored_scale(grid.scale, scale_dtype) if has_ranged else None,
            zero_point=pack_codes(grid.zero_point.flatten(), RANGED) if has_ranged else None,
        )

    def channel_bits(self) -> Tensor:
        """Return the bits of each channel: ``[in]`` int64."""
        if self.labels is None:
            return torch.full((self.in_features,), self.tiers[0], device=self._device)
        labels = unpack_codes(self.labels, self.in_features, _label_bits(self.tiers))
        return torch.tensor(self.tiers, device=self._device)[labels.long()]

    def code_bits(self) -> float:
        """Return the mean bits of a code, without labels, factors and grids."""
        return float(self.channel_bits().double().mean())

    def unpacked_codes(self) -> Tensor:
        """Return the codes of all channels: ``[out, in]`` float32 whole numbers."""
        bits = self.channel_bits()
        parts = []
        for b in TIERS:
            stored: Tensor | None = getattr(self, f"codes_{b}")
            if stored is not None:
                channels = bits == b
                parts.append((unpack_codes(stored, int(channels.sum()), b), channels))
        return merge_columns(parts)

    def zero_points(self) -> Tensor | None:
        """Return the code of zero of each row's 4-bit grid: ``[out, 1]`` float32; None without such channels."""
        if self.zero_point is None:
            return None
        return unpack_codes(self.zero_point, self.out_features, RANGED).float().unsqueeze(1)

    def values(self) -> Tensor:
        """Return the weight: ``[out, in]`` float32."""
        bits, zero_points = self.channel_bits(), self.zero_points()
        ranged = bits == RANGED
        offsets, factors = tier_centers(bits), torch.ones((), device=bits.device)
        if self.row is not None and self.column is not None:
            factors = self.row.float() * torch.ones_like(offsets).masked_scatter(~ranged, self.column.float())
        if self.ranged_scale is not None and zero_points is not None:
            offsets = torch.where(ranged, zero_points, offsets)
            factors = torch.where(ranged, self.ranged_scale.float(), factors)
        return (self.unpacked_codes() - offsets) * tier_steps(bits) * factors

    def rows(self, start: int, stop: int) -> Self:
        """Return rows ``start`` (even: two zero points share a byte) to ``stop``."""
        part = super().rows(start, stop)
        if self.zero_point is None:
            return part
        return dataclasses.replace(part, zero_point=self.zero_point[start // 2 : (stop + 1) // 2])

    def segments(self) -> list[Segment] | None:
        """Return the channels of each tier."""
        bits, codes, zero_points = self.channel_bits(), self.unpacked_codes(), self.zero_points()
        centers, steps, factors = tier_centers(bits), tier_steps(bits), torch.ones(self.in_features, device=bits.device)
        if self.column is not None:
            factors = factors.masked_scatter(bits != RANGED, self.column.float())
        parts = []
        for tier in self.tiers:
            columns = (bits == tier).nonzero().flatten()
            if not columns.numel():
                continue
            if tier == RANGED and self.ranged_scale is not None and zero_points is not None:
                scale, offset = self.ranged_scale.float(), zero_points
            else:
                assert self.row is not None, "channels below 4 bits have a factor per row"
                scale, offset = self.row.float() * steps[columns[0]], centers[columns[0]]
            parts.append(Segment(columns, codes[:, columns], scale, -scale * offset, factors[columns]))
        return parts

    def operands(self) -> Operands | None:
        """Return the weight as compiled operators take it."""
        stored = [getattr(self, f"codes_{bits}") for bits in self.tiers]
        none = torch.empty(self.out_features, 0, dtype=torch.uint8, device=self._device)
        codes = [none if part is None else part for part in stored]
        tensors = (self.labels, codes, self.row, self.column, self.ranged_scale, self.zero_point)
        settings = (self.tiers, [*STEPS.values()], self.in_features)
        return Operands(self.format, tensors, settings, 2.0**self.exponent)

    @property
    def _device(self) -> torch.device:
        return next(iter(self.state_dict().values())).device


def tier_steps(bits: Tensor) -> Tensor:
    """Return the step of each channel's grid for a unit Gaussian: float32 of the shape of ``bits``, one for 4 bits.

    Example:
        >>> tier_steps(torch.tensor([1, 4]))
        tensor([1.5958, 1.0000])
    """
    table = torch.ones(max(TIERS) + 1, device=bits.device)
    for tier, step in STEPS.items():
        table[tier] = step
    return table[bits]


def tier_centers(bits: Tensor) -> Tensor:
    """Return the middle of each channel's codes, which stands for zero: float32 of the shape of ``bits``.

    Example:
        >>> tier_centers(torch.tensor([1, 2, 3]))
        tensor([0.5000, 1.5000, 3.5000])
    """
    return (2.0**bits - 1) / 2


def check_tiers(tiers: list[int]) -> None:
    """Check the bits that a channel may have.

    Raises:
        UserError: they are not some of ``TIERS`` in rising order.

    Example:
        >>> check_tiers([1, 2, 4])
        >>> check_tiers([2, 1])  # doctest: +ELLIPSIS
        Traceback (most recent call last):
            ...
        ptq161.errors.UserError: method.tiers=[2, 1]: use one or more of 1, 2, 3, 4 in rising order.
    """
    if not tiers or any(tier not in TIERS for tier in tiers) or sorted(set(tiers)) != list(tiers):
        allowed = ", ".join(map(str, TIERS))
        raise UserError(f"method.tiers={list(tiers)}: use one or more of {allowed} in rising order.")


def _label_bits(tiers: list[int]) -> int:
    return 1 if len(tiers) <= 2 else 2
