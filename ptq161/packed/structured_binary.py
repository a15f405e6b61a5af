"""The storage format of PTQ1.61: salient input channels as integer codes, the others as one sign bit.

Per linear: a bit per input channel for the mask; per row the codes of the salient channels with their scale and
zero point, a sign bit per other channel, and the products scale x row angle and mean x row angle; per binary
channel the column angle.
"""

from __future__ import annotations

import dataclasses
from typing import ClassVar, Self

import torch
from torch import Tensor

from ptq161.kernels.packed_rows import CODE_BITS, Operands
from ptq161.packed.bits import merge_columns, pack_codes, pack_plane, unpack_codes, unpack_plane
from ptq161.packed.uniform import uniform_values
from ptq161.packed.weight import PackedWeight, Segment, stored_scale


@dataclasses.dataclass(frozen=True, eq=False)
class StructuredBinaryWeight(PackedWeight):
    """``W[o, i] = column_angle[i] * (scale[o] * sign[o, i] + mean[o])``, salient channels uniformly quantized.

    With ``b`` binary and ``s`` salient channels, ``b + s = in_features``:

    Attributes:
        salient_bits: bits of a salient code.
        mask: ``[ceil(in / 8)]`` uint8, set bits are salient channels.
        sign: ``[out, ceil(b / 8)]`` uint8, set bits are +1.
        scale: ``[out, 1]``, the row scale times the row angle.
        mean: ``[out, 1]``, the row mean times the row angle.
        column_angle: ``[b]``, the angular factor of each binary channel.
        codes: ``[out, ceil(s * salient_bits / 8)]`` uint8.
        salient_scale: ``[out, 1]``, step of the salient codes; ``[out, 0]`` where there are none.
        salient_zero_point: the same shape, code of zero.

    Example:
        >>> packed = StructuredBinaryWeight.pack(
        ...     mask=torch.tensor([True, False, False]),
        ...     sign=torch.tensor([[True, False]]),
        ...     scale=torch.tensor([[2.0]]),
        ...     mean=torch.tensor([[1.0]]),
        ...     column_angle=torch.tensor([1.0, 0.5]),
        ...     codes=torch.tensor([[5]]),
        ...     salient_scale=torch.tensor([[3.0]]),
        ...     salient_zero_point=torch.tensor([[1.0]]),
        ...     salient_bits=4,
        ...     scale_dtype="float16",
        ... )
        >>> packed.dequantize().tolist()  # 3 (5 - 1), 1 (2 + 1), 0.5 (-2 + 1)
        [[12.0, 3.0, -0.5]]
    """

    format: ClassVar[str] = "structured_binary"
    offsets: ClassVar[tuple[str, ...]] = ("mean", "salient_zero_point")
    by_row: ClassVar[tuple[str, ...]] = ("sign", "scale", "mean", "codes", "salient_scale", "salient_zero_point")

    salient_bits: int
    mask: Tensor
    sign: Tensor
    scale: Tensor
    mean: Tensor
    column_angle: Tensor
    codes: Tensor
    salient_scale: Tensor
    salient_zero_point: Tensor

    @classmethod
    def pack(
        cls,
        *,
        mask: Tensor,
        sign: Tensor,
        scale: Tensor,
        mean: Tensor,
        column_angle: Tensor,
        codes: Tensor,
        salient_scale: Tensor,
        salient_zero_point: Tensor,
        salient_bits: int,
        scale_dtype: str,
    ) -> Self:
        """Pack the parts of one weight.

        Args:
            mask: ``[in]`` bool, True for salient channels.
            sign: ``[out, b]`` bool, True for +1.
            scale: ``[out, 1]``.
            mean: ``[out, 1]``.
            column_angle: ``[b]``.
            codes: ``[out, s]``, integers below ``2**salient_bits``.
            salient_scale: ``[out, 1]``.
            salient_zero_point: ``[out, 1]``.
            salient_bits: bits of a salient code.
            scale_dtype: ``float16`` or ``float32``, for scales, mean, angles and zero points.

        Raises:
            UserError: a scale does not fit ``scale_dtype``.
        """
        return cls(
            out_features=sign.shape[0],
            in_features=mask.numel(),
            salient_bits=salient_bits,
            mask=pack_plane(mask),
            sign=pack_plane(sign),
            scale=stored_scale(scale, scale_dtype),
            mean=stored_scale(mean, scale_dtype),
            column_angle=stored_scale(column_angle, scale_dtype),
            codes=pack_codes(codes, salient_bits),
            salient_scale=stored_scale(salient_scale, scale_dtype),
            salient_zero_point=stored_scale(salient_zero_point, scale_dtype),
        )

    def salient_channels(self) -> Tensor:
        """Return the mask of salient channels: ``[in]`` bool."""
        return unpack_plane(self.mask, self.in_features)

    def values(self) -> Tensor:
        """Return ``[out, in]`` float32."""
        salient, codes = self.salient_channels(), self.unpacked_codes()
        # PTQ1.61, Eq. 2 and 5: the row angle is in scale and mean already. A sign is a code of 0 or 1.
        angle = torch.ones(self.in_features, device=codes.device).masked_scatter(~salient, self.column_angle.float())
        binary = (self.scale.float() * (2 * codes - 1) + self.mean.float()) * angle
        if not self.salient_scale.numel():
            return binary
        high = uniform_values(codes, self.salient_scale.float(), self.salient_zero_point.float())
        return torch.where(salient, high, binary)

    def unpacked_codes(self) -> Tensor:
        """Return the codes, 0 or 1 for a sign: ``[out, in]`` float32."""
        salient = self.salient_channels()
        n_salient = int(salient.sum())
        sign = unpack_plane(self.sign, self.in_features - n_salient)
        codes = unpack_codes(self.codes, n_salient, self.salient_bits)
        return merge_columns([(sign, ~salient), (codes, salient)])

    def segments(self) -> list[Segment] | None:
        """Return the binary and the salient channels."""
        salient, codes = self.salient_channels(), self.unpacked_codes()
        scale, mean, angle = self.scale.float(), self.mean.float(), self.column_angle.float()
        columns = (~salient).nonzero().flatten()
        binary = Segment(columns, codes[:, columns], scale=2 * scale, shift=mean - scale, factor=angle)
        if not self.salient_scale.numel():
            return [binary]
        columns, scale = salient.nonzero().flatten(), self.salient_scale.float()
        shift = -scale * self.salient_zero_point.float()
        return [binary, Segment(columns, codes[:, columns], scale, shift, torch.ones_like(columns, dtype=scale.dtype))]

    def operands(self) -> Operands | None:
        """Return the weight as compiled operators take it; None where salient codes are wider than theirs."""
        if self.salient_bits not in CODE_BITS:
            return None
        parts = (self.mask, self.sign, self.scale, self.mean, self.column_angle)
        salient = (self.codes, self.salient_scale, self.salient_zero_point)
        settings = (self.in_features, self.salient_bits)
        return Operands(self.format, (*parts, *salient), settings, 2.0**self.exponent)
