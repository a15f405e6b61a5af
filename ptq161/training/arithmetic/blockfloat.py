"""Block floating formats of 4 and 8 bits, as Metis computes in them (Cao et al., arXiv 2509.00404).

Six formats, each simulated: what comes out is float32 and holds the values that the format has. ``fp4e2m1`` and
``fp8e4m3`` have one scale for the whole tensor; in ``fp4e2m1b``, ``nvfp4e2m1b``, ``mxfp4e2m1b`` and ``fp8e4m3b``, 16
numbers along the last dimension share one.

Two of them are not in the released code what they are in the paper and in the standards: there NVFP4 casts its block
scales to E4M3 and throws the result away, so that they stay float32, and MXFP4 divides by an exact scale but multiplies
by the next power of two, so that a block comes out up to sqrt(2) too large or too small. ``as_released`` chooses; this
project trains and stores with ``as_released=False``.
"""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch import Tensor

from ptq161.checks import check_choice
from ptq161.kernels.minifloat import (
    E2M1,
    E4M3,
    Minifloat,
    blocks_of,
    mxfp4_exponents,
    nvfp4_scales,
    power_of_two,
    round_minifloat,
    unblocked,
)

BLOCK = 16
"""Numbers that share a scale, where no other number is given."""

_TINY = torch.finfo(torch.float32).tiny

# The code's scale of a number, and what the value of a code is multiplied by: both ``[..., blocks]`` or of one number.
_Scales = tuple[Tensor, Tensor]


def quantize(
    x: Tensor,
    format: str,
    uniform: Tensor | None = None,
    *,
    block: int | None = None,
    as_released: bool = True,
) -> Tensor:
    """Return what a format holds of a tensor (``Metis/quant.py`` of sii-research/Metis).

    Args:
        x: ``[..., n]``, any float dtype.
        format: one of ``FORMATS``.
        uniform: of the shape of ``x``, random numbers in [0, 1): each number is rounded up where it is closer to its
            upper neighbour than ``uniform`` is to 1, so that it keeps its value on average. None, and 0.5 everywhere,
            round to nearest, ties to the even code.
        block: numbers along the last dimension that share a scale; the last block may be shorter. None is 16, and 32
            for MXFP4 with ``as_released=False``, as its standard has it. Without effect on formats with one scale.
        as_released: take the scales of NVFP4 and MXFP4 of the released code, and the small constants that it adds to
            all scales; else those of their definitions.

    Returns:
        the values, of the shape of ``x``, float32.

    Raises:
        UserError: the format is unknown.

    Example:
        >>> x = torch.tensor([[6.0, 2.6, -0.2, 0.1]])
        >>> quantize(x, "nvfp4e2m1b", as_released=False).tolist()
        [[6.0, 3.0, -0.0, 0.0]]
        >>> quantize(x * 1.4, "mxfp4e2m1b", as_released=False).tolist()  # 8.4 has the scale 2, which holds it as 8
        [[8.0, 4.0, -0.0, 0.0]]
    """
    check_choice("format", format, FORMATS)
    element, find, is_blocked = _FORMATS[format]
    x = x.float()
    if not x.numel():
        return x
    size = (_default_block(format, as_released) if block is None else block) if is_blocked else x.shape[-1]
    blocks = blocks_of(x, size)
    divisor, factor = (scale.unsqueeze(-1) for scale in find(blocks, as_released))
    noise = None if uniform is None else blocks_of(uniform.float(), size)
    return unblocked(round_minifloat(blocks / divisor, element, noise) * factor, x.shape[-1])


def _default_block(format: str, as_released: bool) -> int:
    return 32 if format == "mxfp4e2m1b" and not as_released else BLOCK


def _one(element: Minifloat, floor: float) -> Callable[[Tensor, bool], _Scales]:
    """Return how a format with one scale finds it."""

    def find(blocks: Tensor, as_released: bool) -> _Scales:
        scale = blocks.abs().amax() / element.largest
        scale = scale + floor if as_released else scale.clamp(min=_TINY)
        return scale.view(1), scale.view(1)

    return find


def _float_scales(blocks: Tensor, as_released: bool) -> _Scales:
    scale = blocks.abs().amax(-1) / E2M1.largest
    scale = scale + 1e-9 if as_released else scale.clamp(min=_TINY)
    return scale, scale


def _half_scales(blocks: Tensor, as_released: bool) -> _Scales:
    """FP8 in blocks: scales in float16."""
    scale = blocks.abs().amax(-1) / E4M3.largest
    stored = (scale + 1e-7 if as_released else scale).half().float()
    return stored.clamp(min=_TINY), stored


def _nvfp4_scales(blocks: Tensor, as_released: bool) -> _Scales:
    if as_released:
        # The slip: the cast of scale / largest to E4M3 is not kept, and the largest is that of a column of blocks.
        scale, _ = _float_scales(blocks, True)
        rows = scale.reshape(-1, scale.shape[-1])
        largest = rows.amax(0) / E4M3.largest
        return scale, (rows / largest * largest).view_as(scale)
    scales, scale = nvfp4_scales(blocks.flatten(-2), blocks.shape[-1])
    stored = scales * scale
    return stored.clamp(min=_TINY), stored


def _mxfp4_scales(blocks: Tensor, as_released: bool) -> _Scales:
    if as_released:
        # The slip: codes are chosen against the exact scale, values are made with the rounded one.
        scale, _ = _float_scales(blocks, True)
        return scale, scale.log2().round().exp2()
    stored = power_of_two(mxfp4_exponents(blocks.flatten(-2), blocks.shape[-1]))
    # What is not finite shall not come out finite.
    stored = torch.where(blocks.isfinite().all(-1), stored, torch.nan)
    return stored, stored


_FORMATS: dict[str, tuple[Minifloat, Callable[[Tensor, bool], _Scales], bool]] = {
    "fp4e2m1": (E2M1, _one(E2M1, 1e-6), False),
    "fp8e4m3": (E4M3, _one(E4M3, 1e-6), False),
    "fp4e2m1b": (E2M1, _float_scales, True),
    "nvfp4e2m1b": (E2M1, _nvfp4_scales, True),
    "mxfp4e2m1b": (E2M1, _mxfp4_scales, True),
    "fp8e4m3b": (E4M3, _half_scales, True),
}

FORMATS = tuple(_FORMATS)
"""Names of the formats: those of the released code."""
