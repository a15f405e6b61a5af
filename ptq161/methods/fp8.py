"""Floats of 8 bits (E4M3), rounded to nearest."""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping
from typing import ClassVar

from torch import Tensor

from ptq161.checks import check_at_least
from ptq161.methods.base import Window
from ptq161.methods.layerwise import InputStatistics, LayerwiseMethod
from ptq161.packed.fp8 import FP8Weight
from ptq161.packed.weight import PackedWeight


@dataclasses.dataclass(frozen=True)
class FP8(LayerwiseMethod):
    """Rounding to 8-bit floats, without any data.

    Attributes:
        group_size: columns that share a scale; None is one scale for the whole weight, in float32.

    Example:
        >>> FP8().nominal_bits()
        8.0
        >>> FP8(group_size=0)
        Traceback (most recent call last):
            ...
        ptq161.errors.UserError: method.group_size=0: use at least 1.
    """

    format: ClassVar[str] = "fp8"
    needs_statistics: ClassVar[bool] = False

    group_size: int | None = None

    def __post_init__(self) -> None:
        """Reject empty groups."""
        super().__post_init__()
        check_at_least("method.group_size", self.group_size, 1)

    def nominal_bits(self) -> float:
        """Bits of a code; scales are not counted."""
        return 8.0

    def quantize_group(
        self, weights: Mapping[str, Tensor], statistics: InputStatistics | None, window: Window
    ) -> dict[str, PackedWeight]:
        """Round each linear on its own; statistics and window are not used."""
        return {name: FP8Weight.rounded(weight, self.group_size, self.scale_dtype) for name, weight in weights.items()}
