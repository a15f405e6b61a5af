"""Floats of 8 bits (E4M3) under one scale, or one per block of columns."""

from __future__ import annotations

import dataclasses
from typing import ClassVar, Self

import torch
from torch import Tensor

from ptq161.checks import check_at_least
from ptq161.kernels.minifloat import E4M3, e4m3_codes, e4m3_values, round_minifloat
from ptq161.kernels.packed_rows import Operands
from ptq161.packed.uniform import grouped, per_column
from ptq161.packed.weight import PackedWeight, stored_scale

_E4M3 = e4m3_values(torch.arange(256).to(torch.uint8))
"""What every code stands for."""


@dataclasses.dataclass(frozen=True, eq=False)
class FP8Weight(PackedWeight):
    """Numbers of E4M3 times a scale.

    Attributes:
        group_size: columns of a row that share a scale, the last group may be shorter; None is one scale for all.
        codes: ``[out, in]`` uint8, the bits of E4M3.
        scales: ``[out, groups]`` in ``scale_dtype``; ``[1]`` float32 where there is only one.

    Example:
        >>> weight = torch.tensor([[448.0, -2.6, 33.0, 0.0]])
        >>> packed = FP8Weight.rounded(weight)
        >>> packed.dequantize().tolist()
        [[448.0, -2.5, 32.0, 0.0]]
        >>> packed.nbytes  # four codes and a scale of four bytes
        8
    """

    format: ClassVar[str] = "fp8"

    group_size: int | None
    codes: Tensor
    scales: Tensor

    @classmethod
    def rounded(cls, weight: Tensor, group_size: int | None = None, scale_dtype: str = "float16") -> Self:
        """Round a weight to nearest.

        Args:
            weight: ``[out, in]``.
            group_size: columns that share a scale; None is one scale for the whole weight, in float32.
            scale_dtype: of the scales of groups.

        Raises:
            UserError: the group is empty, or a weight is not finite.
        """
        check_at_least("method.group_size", group_size, 1)
        weight = weight.float()
        if group_size is None:
            scales = stored_scale((weight.abs().amax() / E4M3.largest).view(1), "float32")
        else:
            scales = stored_scale(grouped(weight, group_size).abs().amax(-1) / E4M3.largest, scale_dtype)
        factor = per_column(scales.float(), weight.shape[1], group_size)
        codes = torch.where(factor > 0, weight / factor, 0.0)
        return cls(weight.shape[0], weight.shape[1], group_size, e4m3_codes(round_minifloat(codes, E4M3)), scales)

    def values(self) -> Tensor:
        """Return code times scale: ``[out, in]`` float32."""
        return e4m3_values(self.codes) * per_column(self.scales.float(), self.in_features, self.group_size)

    def operands(self) -> Operands | None:
        """Return the weight as compiled operators take it."""
        settings = (self.out_features, self.in_features, self.group_size or max(1, self.in_features))
        return Operands("levels", (self.codes, _E4M3, self.scales, None), settings, 2.0**self.exponent, "level_rows")
