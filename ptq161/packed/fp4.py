"""Floats of 4 bits under block scales: NVFP4 and MXFP4.

The codes are 0, 0.5, 1, 1.5, 2, 3, 4, 6 with a sign (E2M1). NVFP4 has a scale in 8-bit floats (E4M3) for every 16 of
them and one in float32 for the whole weight; MXFP4 has a power of two for every 32 (OCP Microscaling Formats 1.0).
"""

from __future__ import annotations

import dataclasses
from typing import ClassVar, Self

import torch
from torch import Tensor

from ptq161.checks import check_at_least, check_choice
from ptq161.errors import UserError
from ptq161.kernels.minifloat import (
    E2M1,
    blocks_of,
    e2m1_codes,
    e2m1_values,
    e4m3_codes,
    e4m3_values,
    mxfp4_exponents,
    nvfp4_scales,
    power_of_two,
    round_minifloat,
    unblocked,
)
from ptq161.kernels.packed_rows import Operands
from ptq161.packed.bits import pack_codes, unpack_codes
from ptq161.packed.weight import PackedWeight

FP4_BLOCKS = {"nvfp4": 16, "mxfp4": 32}
"""Name of a format of block scales -> weights that share one."""

_CODE_BITS = 4
_EXPONENT_BIAS = 127
_E2M1 = e2m1_values(torch.arange(2**_CODE_BITS, dtype=torch.uint8))
_E4M3 = e4m3_values(torch.arange(256).to(torch.uint8))
_POWERS = power_of_two(torch.arange(256, dtype=torch.int32) - _EXPONENT_BIAS)
"""What every code of a weight, of a scale in E4M3 and of a power of two stands for."""


@dataclasses.dataclass(frozen=True, eq=False)
class FP4Weight(PackedWeight):
    """Codes of 4 bits, a scale of 8 bits per block of columns in each row, and one of the whole weight for NVFP4.

    Attributes:
        block: columns per block; the last block may be shorter.
        codes: ``[out, ceil(in / 2)]`` uint8.
        scales: ``[out, blocks]`` uint8: the bits of E4M3 for NVFP4, the exponent plus 127 for MXFP4.
        tensor_scale: ``[1]`` float32; None for MXFP4.

    Example:
        >>> import torch
        >>> weight = torch.tensor([[6.0, -2.6, 0.2, 0.0]])
        >>> packed = FP4Weight.rounded(weight, "mxfp4")
        >>> packed.dequantize()
        tensor([[ 6., -3.,  0.,  0.]])
        >>> packed.nbytes  # two bytes of codes and one exponent
        3
    """

    format: ClassVar[str] = "fp4"

    block: int
    codes: Tensor
    scales: Tensor
    tensor_scale: Tensor | None = None

    @classmethod
    def rounded(cls, weight: Tensor, format: str, block: int | None = None) -> Self:
        """Round a weight to nearest.

        Args:
            weight: ``[out, in]``.
            format: ``nvfp4`` or ``mxfp4``.
            block: columns that share a scale; None is the standard's, ``FP4_BLOCKS``.

        Raises:
            UserError: the format is unknown, the block is empty, or a weight is not finite.
        """
        check_fp4(format, block)
        weight = weight.float()
        if not bool(weight.isfinite().all()):
            raise UserError(f"a weight is NaN or infinite and cannot be stored as {format}: check the weights.")
        block = block or FP4_BLOCKS[format]
        if format == "nvfp4":
            scales, scale = nvfp4_scales(weight, block)
            factor, stored, tensor_scale = scales * scale, e4m3_codes(scales), scale.view(1)
        else:
            exponents = mxfp4_exponents(weight, block)
            factor, stored, tensor_scale = power_of_two(exponents), (exponents + _EXPONENT_BIAS).byte(), None
        # Where a scale is zero, everything is.
        blocks = blocks_of(weight, block) * (factor > 0).unsqueeze(-1)
        values = round_minifloat(blocks / factor.masked_fill(factor == 0, 1.0).unsqueeze(-1), E2M1)
        codes = pack_codes(e2m1_codes(unblocked(values, weight.shape[1])), _CODE_BITS)
        return cls(weight.shape[0], weight.shape[1], block, codes, stored, tensor_scale)

    def values(self) -> Tensor:
        """Return code times block scale times the weight's scale: ``[out, in]`` float32."""
        codes = e2m1_values(unpack_codes(self.codes, self.in_features, _CODE_BITS))
        if self.tensor_scale is None:
            factor = power_of_two(self.scales.int() - _EXPONENT_BIAS)
        else:
            factor = e4m3_values(self.scales) * self.tensor_scale
        return unblocked(blocks_of(codes, self.block) * factor.unsqueeze(-1), self.in_features)

    def operands(self) -> Operands | None:
        """Return the weight as compiled operators take it."""
        scales = _POWERS if self.tensor_scale is None else _E4M3 * self.tensor_scale.cpu()
        settings = (self.out_features, self.in_features, self.block)
        return Operands("levels", (self.codes, _E2M1, self.scales, scales), settings, 2.0**self.exponent, "level_rows")


def check_fp4(format: str, block: int | None) -> None:
    """Check the two settings.

    Raises:
        UserError: one is out of range.

    Example:
        >>> check_fp4("nvfp4", None)
        >>> check_fp4("fp4", None)
        Traceback (most recent call last):
            ...
        ptq161.errors.UserError: method.block_format=fp4: use one of nvfp4, mxfp4.
    """
    check_choice("method.block_format", format, FP4_BLOCKS)
    check_at_least("method.group_size", block, 1)
