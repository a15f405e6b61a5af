"""Round to nearest on NormalFloat codes of 4 bits (Dettmers et al., NeurIPS 2023, arXiv 2305.14314: QLoRA's base)."""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping
from typing import ClassVar

from torch import Tensor

from ptq161.checks import check_at_least
from ptq161.methods.base import Window
from ptq161.methods.layerwise import InputStatistics, LayerwiseMethod
from ptq161.packed.nf4 import NF4Weight, nf4_parameters
from ptq161.packed.weight import PackedWeight, check_magnitude


@dataclasses.dataclass(frozen=True)
class NF4(LayerwiseMethod):
    """Round to NormalFloat codes, without any data; the second quantization, of the scales, is left out.

    Attributes:
        group_size: columns that share a scale.

    Example:
        >>> NF4().nominal_bits()  # the scales are in what is measured
        4.0
    """

    format: ClassVar[str] = "nf4"
    needs_statistics: ClassVar[bool] = False

    group_size: int = 64

    def __post_init__(self) -> None:
        """Reject a group size that the format cannot hold."""
        super().__post_init__()
        check_at_least("method.group_size", self.group_size, 1)

    def nominal_bits(self) -> float:
        """Bits of a code."""
        return 4.0

    def quantize_group(
        self, weights: Mapping[str, Tensor], statistics: InputStatistics | None, window: Window
    ) -> dict[str, PackedWeight]:
        """Quantize each linear on its own; statistics and window are not used."""
        return {
            name: quantize_weight(weight, self.group_size, scale_dtype=self.scale_dtype)
            for name, weight in weights.items()
        }


def quantize_weight(weight: Tensor, group_size: int = 64, *, scale_dtype: str = "float16") -> NF4Weight:
    """Round a weight ``[out, in]`` to the nearest levels of each group's scale.

    Raises:
        UserError: the group size is out of range, or a weight is not finite or too small for ``scale_dtype``.

    Example:
        >>> import torch
        >>> packed = quantize_weight(torch.tensor([[2.0, -1.0, 0.1, 0.0]]))
        >>> packed.codes.shape, packed.scales.tolist()
        (torch.Size([1, 2]), [[2.0]])
    """
    check_at_least("method.group_size", group_size, 1)
    check_magnitude(weight, scale_dtype)
    codes, scales = nf4_parameters(weight, group_size, scale_dtype=scale_dtype)
    return NF4Weight.pack(codes, scales, group_size, scale_dtype=scale_dtype)
