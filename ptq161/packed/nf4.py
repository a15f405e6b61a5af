"""NormalFloat codes of 4 bits (Dettmers et al., NeurIPS 2023, arXiv 2305.14314: QLoRA), one scale per row and group.

The 16 levels are quantiles of a normal distribution, scaled to [-1, 1] and with a zero. A group's scale is its largest
absolute value; codes are chosen against the scale as it is stored.
"""

from __future__ import annotations

import dataclasses
from typing import ClassVar, Self

import torch
from torch import Tensor

from ptq161.kernels.packed_rows import Operands
from ptq161.packed.bits import pack_codes, unpack_codes
from ptq161.packed.uniform import grouped, per_column
from ptq161.packed.weight import PackedWeight, stored_scale

LEVELS = (
    -1.0,
    -0.6961928009986877,
    -0.5250730514526367,
    -0.39491748809814453,
    -0.28444138169288635,
    -0.18477343022823334,
    -0.09105003625154495,
    0.0,
    0.07958029955625534,
    0.16093020141124725,
    0.24611230194568634,
    0.33791524171829224,
    0.44070982933044434,
    0.5626170039176941,
    0.7229568362236023,
    1.0,
)
"""The values of the 16 codes (QLoRA, Appendix E)."""


@dataclasses.dataclass(frozen=True, eq=False)
class NF4Weight(PackedWeight):
    """Codes of 4 bits for the levels of a normal distribution, with a scale per row and group of columns.

    Attributes:
        group_size: columns per group. The last group may be shorter.
        codes: ``[out, ceil(in / 2)]`` uint8.
        scales: ``[out, groups]`` in ``scale_dtype``.

    Example:
        >>> packed = NF4Weight.pack(torch.tensor([[0, 7, 15]]), torch.tensor([[0.5]]), group_size=64)
        >>> packed.dequantize().tolist(), packed.nbytes
        ([[-0.5, 0.0, 0.5]], 4)
    """

    format: ClassVar[str] = "nf4"

    group_size: int
    codes: Tensor
    scales: Tensor

    @classmethod
    def pack(cls, codes: Tensor, scales: Tensor, group_size: int = 64, *, scale_dtype: str = "float16") -> Self:
        """Store codes ``[out, in]`` of any integer dtype, each below 16, and scales ``[out, groups]``.

        Raises:
            UserError: a scale leaves the range of ``scale_dtype``.
        """
        return cls(
            out_features=codes.shape[0],
            in_features=codes.shape[1],
            group_size=group_size,
            codes=pack_codes(codes, 4),
            scales=stored_scale(scales, scale_dtype),
        )

    def values(self) -> Tensor:
        """Return ``scale * level``: ``[out, in]`` float32."""
        codes = unpack_codes(self.codes, self.in_features, 4)
        levels = torch.tensor(LEVELS, device=codes.device)[codes.int()]
        return levels * per_column(self.scales.float(), self.in_features, self.group_size)

    def operands(self) -> Operands | None:
        """Return the weight as compiled operators take it."""
        tensors = (self.codes, torch.tensor(LEVELS), self.scales, None)
        settings = (self.out_features, self.in_features, self.group_size)
        return Operands("levels", tensors, settings, 2.0**self.exponent, "level_rows")


def nf4_parameters(weight: Tensor, group_size: int = 64, *, scale_dtype: str = "float16") -> tuple[Tensor, Tensor]:
    """Round to the nearest level.

    Args:
        weight: ``[out, in]``.
        group_size: columns that share a scale; the last group may be shorter.
        scale_dtype: dtype in which the scale will be stored.

    Returns:
        codes ``[out, in]`` uint8, and scales ``[out, groups]`` float32, rounded to what ``scale_dtype`` can hold.

    Raises:
        UserError: a scale leaves the range of ``scale_dtype``, or a weight is not finite.

    Example:
        >>> codes, scales = nf4_parameters(torch.tensor([[2.0, -1.0, 0.1, 0.0]]))
        >>> codes.tolist(), scales.tolist()
        ([[15, 2, 8, 7]], [[2.0]])
    """
    scales = stored_scale(grouped(weight.float(), group_size).abs().amax(-1), scale_dtype).float()
    size = per_column(scales, weight.shape[1], group_size)
    levels = torch.tensor(LEVELS, device=weight.device)
    # A scale that underflows to zero can only stand for zeros.
    shares = torch.where(size > 0, weight.float() / size, 0.0)
    return torch.bucketize(shares, (levels[1:] + levels[:-1]) / 2).to(torch.uint8), scales
