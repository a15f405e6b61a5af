"""PB-LLM's format: a few salient weights as integer codes, all others as a sign between two values per row."""

from __future__ import annotations

import dataclasses
from typing import ClassVar, Self

import torch
from torch import Tensor

from ptq161.errors import UserError
from ptq161.kernels.packed_rows import Operands
from ptq161.kernels.where import fast_where
from ptq161.packed.bits import pack_codes, pack_plane, unpack_codes, unpack_plane
from ptq161.packed.uniform import UNIFORM_BITS, uniform_values
from ptq161.packed.weight import PackedWeight, stored_scale


@dataclasses.dataclass(frozen=True, eq=False)
class PBLLMWeight(PackedWeight):
    """Salient weights on a uniform grid per row, the others at ``mean + scale`` or ``mean - scale`` of their row.

    A sign is stored for each weight that is not salient and a code for each that is, in row-major order.

    Attributes:
        high_bit: bits of a salient weight's code.
        n_salient: number of salient weights.
        salient: mask plane ``[out, ceil(in / 8)]`` uint8, set where a weight is salient.
        signs: ``[ceil((out * in - n_salient) / 8)]`` uint8, set where a weight lies at ``mean + scale``.
        codes: ``[ceil(n_salient * high_bit / 8)]`` uint8.
        means: ``[out, 1]`` in ``scale_dtype``.
        scales: ``[out, 1]`` in ``scale_dtype``.
        high_scales: ``[out, 1]`` in ``scale_dtype``, of the salient weights' grid.
        high_zero_points: ``[out, 1]`` in ``scale_dtype``, of the salient weights' grid.

    Example:
        >>> packed = PBLLMWeight.pack(
        ...     salient=torch.tensor([[False, False, False, True]]),
        ...     signs=torch.tensor([[True, False, True, False]]),
        ...     codes=torch.tensor([[0, 0, 0, 3]]),
        ...     means=torch.tensor([[1.0]]),
        ...     scales=torch.tensor([[2.0]]),
        ...     high_scales=torch.tensor([[5.0]]),
        ...     high_zero_points=torch.tensor([[0.0]]),
        ...     high_bit=8,
        ... )
        >>> packed.dequantize().tolist()
        [[3.0, -1.0, 3.0, 15.0]]
    """

    format: ClassVar[str] = "pb_llm"
    offsets: ClassVar[tuple[str, ...]] = ("means", "high_zero_points")

    high_bit: int
    n_salient: int
    salient: Tensor
    signs: Tensor
    codes: Tensor
    means: Tensor
    scales: Tensor
    high_scales: Tensor
    high_zero_points: Tensor

    @classmethod
    def pack(
        cls,
        salient: Tensor,
        signs: Tensor,
        codes: Tensor,
        *,
        means: Tensor,
        scales: Tensor,
        high_scales: Tensor,
        high_zero_points: Tensor,
        high_bit: int,
        scale_dtype: str = "float16",
    ) -> Self:
        """Store both kinds of weights.

        Args:
            salient: ``[out, in]`` bool.
            signs: ``[out, in]`` bool; read where not salient.
            codes: ``[out, in]``, any integer dtype; read where salient.
            means: ``[out, 1]``.
            scales: ``[out, 1]``.
            high_scales: ``[out, 1]``.
            high_zero_points: ``[out, 1]``, integers.
            high_bit: bits per code.
            scale_dtype: ``float16`` or ``float32``.

        Raises:
            UserError: ``high_bit`` is not supported, or a scale leaves the range of ``scale_dtype``.
        """
        check_high_bit(high_bit)
        return cls(
            out_features=salient.shape[0],
            in_features=salient.shape[1],
            high_bit=high_bit,
            n_salient=int(salient.sum()),
            salient=pack_plane(salient),
            signs=pack_plane(signs.masked_select(~salient)),
            codes=pack_codes(codes.masked_select(salient), high_bit),
            means=stored_scale(means, scale_dtype),
            scales=stored_scale(scales, scale_dtype),
            high_scales=stored_scale(high_scales, scale_dtype),
            high_zero_points=stored_scale(high_zero_points, scale_dtype),
        )

    def values(self) -> Tensor:
        """Return the weight: ``[out, in]`` float32."""
        salient = unpack_plane(self.salient, self.in_features)
        # Signs and codes were stored in row-major order of their own weights, which masked_scatter_ puts back.
        signs = torch.zeros_like(salient)
        signs.masked_scatter_(~salient, unpack_plane(self.signs, salient.numel() - self.n_salient))
        codes = torch.zeros_like(salient, dtype=torch.uint8)
        codes.masked_scatter_(salient, unpack_codes(self.codes, self.n_salient, self.high_bit))
        high = uniform_values(codes, self.high_scales.float(), self.high_zero_points.float())
        return fast_where(salient, high, fast_where(signs, *binary_levels(self.means.float(), self.scales.float())))

    def operands(self) -> Operands | None:
        """Return the weight as compiled operators take it."""
        tensors = (self.salient, self.signs, self.codes, self.means, self.scales, self.high_scales)
        settings = (self.out_features, self.in_features, self.high_bit, self.n_salient)
        return Operands(self.format, (*tensors, self.high_zero_points), settings, 2.0**self.exponent, "binary_rows")


def binary_levels(mean: Tensor, scale: Tensor) -> tuple[Tensor, Tensor]:
    """Return the two values of a binarized weight: ``mean + scale`` and ``mean - scale``.

    Example:
        >>> binary_levels(torch.tensor([1.0]), torch.tensor([2.0]))
        (tensor([3.]), tensor([-1.]))
    """
    return mean + scale, mean - scale


def check_high_bit(high_bit: int) -> None:
    """Check the bits of salient weights.

    Raises:
        UserError: they are not supported.

    Example:
        >>> check_high_bit(1)
        Traceback (most recent call last):
            ...
        ptq161.errors.UserError: method.high_bit=1: use one of 2, 3, 4, 8.
    """
    if high_bit not in UNIFORM_BITS:
        raise UserError(f"method.high_bit={high_bit}: use one of {', '.join(map(str, UNIFORM_BITS))}.")
