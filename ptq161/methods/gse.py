"""Round to nearest on shared-exponent integers, the format of GSQ-Tuning (Zhou et al., ACL 2025, arXiv 2502.12913)."""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping
from typing import ClassVar

from torch import Tensor

from ptq161.methods.base import Window
from ptq161.methods.layerwise import InputStatistics, LayerwiseMethod
from ptq161.packed.gse import EXPONENT_BITS, GseWeight, check_gse, quantize
from ptq161.packed.weight import PackedWeight


@dataclasses.dataclass(frozen=True)
class GSE(LayerwiseMethod):
    """Round to group-shared-exponent integers, without any data. No scale is stored, so ``scale_dtype`` has no effect.

    Attributes:
        bits: of an integer, its sign included, 2 to 8; the paper's are 8, 6 and 5.
        group_size: columns that share an exponent of 5 bits.

    Example:
        >>> GSE(bits=5).nominal_bits()
        5.15625
    """

    format: ClassVar[str] = "gse"
    needs_statistics: ClassVar[bool] = False

    bits: int = 5
    group_size: int = 32

    def __post_init__(self) -> None:
        """Reject bits and group sizes that the format cannot hold."""
        super().__post_init__()
        check_gse("method", self.bits, self.group_size)

    def nominal_bits(self) -> float:
        """Bits of an integer, and its share of the exponent."""
        return self.bits + EXPONENT_BITS / self.group_size

    def quantize_group(
        self, weights: Mapping[str, Tensor], statistics: InputStatistics | None, window: Window
    ) -> dict[str, PackedWeight]:
        """Quantize each linear on its own; statistics and window are not used."""
        return {name: quantize_weight(weight, self.bits, self.group_size) for name, weight in weights.items()}


def quantize_weight(weight: Tensor, bits: int, group_size: int = 32) -> GseWeight:
    """Round a weight ``[out, in]`` to nearest.

    Example:
        >>> import torch
        >>> quantize_weight(torch.tensor([[1.0, -0.3, 0.0, 0.9]]), bits=4).dequantize().tolist()
        [[1.0, -0.25, 0.0, 1.0]]
    """
    check_gse("method", bits, group_size)
    return GseWeight.pack(*quantize(weight, bits, group_size), bits=bits, group_size=group_size)
