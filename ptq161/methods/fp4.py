"""Floats of 4 bits under block scales, rounded to nearest: NVFP4 and MXFP4."""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping
from typing import ClassVar

from torch import Tensor

from ptq161.methods.base import Window
from ptq161.methods.layerwise import InputStatistics, LayerwiseMethod
from ptq161.packed.fp4 import FP4Weight, check_fp4
from ptq161.packed.weight import PackedWeight


@dataclasses.dataclass(frozen=True)
class FP4(LayerwiseMethod):
    """Rounding to 4-bit floats, without any data.

    ``scale_dtype`` has no effect: block scales have 8 bits, and the scale of an NVFP4 weight is float32.

    Attributes:
        block_format: ``nvfp4``, block scales in E4M3 under one scale of the weight, or ``mxfp4``, powers of two.
        group_size: columns that share a block scale; None is the standard's 16 for NVFP4 and 32 for MXFP4.

    Example:
        >>> FP4(block_format="mxfp4").nominal_bits()
        4.0
        >>> FP4(block_format="int4")
        Traceback (most recent call last):
            ...
        ptq161.errors.UserError: method.block_format=int4: use one of nvfp4, mxfp4.
    """

    format: ClassVar[str] = "fp4"
    needs_statistics: ClassVar[bool] = False

    block_format: str = "nvfp4"
    group_size: int | None = None

    def __post_init__(self) -> None:
        """Reject formats that there are not."""
        super().__post_init__()
        check_fp4(self.block_format, self.group_size)

    def nominal_bits(self) -> float:
        """Bits of a code; scales are not counted."""
        return 4.0

    def quantize_group(
        self, weights: Mapping[str, Tensor], statistics: InputStatistics | None, window: Window
    ) -> dict[str, PackedWeight]:
        """Round each linear on its own; statistics and window are not used."""
        return {name: FP4Weight.rounded(weight, self.block_format, self.group_size) for name, weight in weights.items()}
