"""Floats of 4 and 8 bits in float32: rounding to nearest and at random, and their codes.

``E2M1`` is 0, 0.5, 1, 1.5, 2, 3, 4, 6 and their negatives, ``E4M3`` goes to 448 (both without infinities; OCP
Microscaling Formats 1.0, Section 5.3). What is larger than the largest number becomes the largest number.
"""

from __future__ import annotations

from typing import NamedTuple

import torch
from torch import Tensor


class Minifloat(NamedTuple):
    """A float format: a sign, an exponent and a mantissa.

    Attributes:
        mantissa_bits: without the hidden one.
        least_exponent: of a normal number; smaller numbers have its spacing.
        largest: number.
    """

    mantissa_bits: int
    least_exponent: int
    largest: float


E2M1 = Minifloat(1, 0, 6.0)
E4M3 = Minifloat(3, -6, 448.0)

_BIAS, _FLOAT32_MANTISSA = 127, 23


def round_minifloat(x: Tensor, format: Minifloat, uniform: Tensor | None = None) -> Tensor:
    """Round to a number of the format.

    Args:
        x: any shape, float32. NaN stays NaN.
        format: ``E2M1`` or ``E4M3``.
        uniform: of the shape of ``x``, float32 numbers in [0, 1): a number that is a share ``f`` of the way between its
            two neighbours takes the upper one (in magnitude) where ``f + uniform > 1``, so that uniform random numbers
            keep it on average. None rounds to nearest, as 0.5 everywhere does. Ties go to the even code.

    Returns:
        float32 of the same shape.

    Example:
        >>> round_minifloat(torch.tensor([0.2, 0.25, 0.75, -2.6, 5.0, 9.0]), E2M1)
        tensor([ 0.,  0.,  1., -3.,  4.,  6.])
        >>> round_minifloat(torch.tensor([2.6, 2.6]), E2M1, torch.tensor([0.3, 0.5]))
        tensor([2., 3.])
    """
    magnitude = x.abs().clamp(max=format.largest)
    # The exponent is read from the bits: a logarithm is not exact on every device.
    exponent = (magnitude.view(torch.int32) >> _FLOAT32_MANTISSA).clamp_(min=format.least_exponent + _BIAS)
    spacing = ((exponent - format.mantissa_bits) << _FLOAT32_MANTISSA).view(torch.float32)
    steps = magnitude / spacing
    if uniform is None:
        return torch.copysign(steps.round_().mul_(spacing), x)
    floor = steps.floor()
    share, short = steps.sub_(floor), 1 - uniform
    up = (share > short) | ((share == short) & (floor % 2 == 1))
    return torch.copysign(floor.add_(up).mul_(spacing), x)


def e2m1_codes(values: Tensor) -> Tensor:
    """Return the codes of numbers that ``E2M1`` has: uint8 in [0, 16), the sign in the highest bit.

    Example:
        >>> e2m1_codes(torch.tensor([0.0, 0.5, 6.0, -1.5])).tolist()
        [0, 1, 7, 11]
    """
    magnitude = torch.where(values.abs() < 2, values.abs() * 2, values.abs().clamp(max=4) + 2)
    magnitude = torch.where(values.abs() > 4, 7, magnitude)
    return magnitude.to(torch.uint8) | ((values < 0).to(torch.uint8) << 3)


def e2m1_values(codes: Tensor) -> Tensor:
    """Undo :func:`e2m1_codes`: float32.

    Example:
        >>> e2m1_values(torch.tensor([0, 1, 7, 11], dtype=torch.uint8)).tolist()
        [0.0, 0.5, 6.0, -1.5]
    """
    grid = torch.tensor([0.0, 0.5, 1.0, 1.5, 2.0, 3.0, 4.0, 6.0], device=codes.device)
    return torch.cat([grid, -grid])[codes.long()]


def e4m3_codes(values: Tensor) -> Tensor:
    """Return the codes of numbers that ``E4M3`` has: uint8.

    Example:
        >>> e4m3_codes(torch.tensor([0.0, 1.0, -448.0])).tolist()
        [0, 56, 254]
    """
    codes: Tensor = values.to(torch.float8_e4m3fn).view(torch.uint8)
    return codes


def e4m3_values(codes: Tensor) -> Tensor:
    """Undo :func:`e4m3_codes`: float32.

    Example:
        >>> e4m3_values(torch.tensor([0, 56, 254], dtype=torch.uint8)).tolist()
        [0.0, 1.0, -448.0]
    """
    return codes.view(torch.float8_e4m3fn).float()


def blocks_of(x: Tensor, block: int) -> Tensor:
    """View ``[..., n]`` as ``[..., blocks, block]``, the last block filled up with zeros.

    Example:
        >>> blocks_of(torch.ones(1, 3), 2).tolist()
        [[[1.0, 1.0], [1.0, 0.0]]]
    """
    missing = -x.shape[-1] % block
    blocks: Tensor = torch.nn.functional.pad(x, (0, missing)).unflatten(-1, (-1, block))
    return blocks


def unblocked(blocks: Tensor, n: int) -> Tensor:
    """Undo :func:`blocks_of`: ``[..., n]``.

    Example:
        >>> unblocked(torch.tensor([[[1.0, 1.0], [1.0, 0.0]]]), 3).tolist()
        [[1.0, 1.0, 1.0]]
    """
    return blocks.flatten(-2)[..., :n]


def nvfp4_scales(x: Tensor, block: int = 16) -> tuple[Tensor, Tensor]:
    """Return the scales of NVFP4: numbers of ``E4M3`` per block, under one of the whole tensor.

    The tensor's scale maps its largest number to the largest code times the largest block scale, 6 x 448.

    Args:
        x: ``[..., n]`` float32.
        block: numbers along the last dimension that share a scale.

    Returns:
        block scales ``[..., blocks]`` float32, rounded to ``E4M3``, and the tensor's scale, float32 without dimensions.

    Example:
        >>> scales, scale = nvfp4_scales(torch.tensor([[6.0, 0.0, 3.1, 1.0]]), block=2)
        >>> (scales * scale).tolist()  # the second block's is 3.1 / 6 = 0.517 as E4M3 holds it
        [[1.0, 0.5]]
    """
    largest = blocks_of(x, block).abs().amax(-1)
    scale = largest.amax() / (E2M1.largest * E4M3.largest)
    safe = torch.where(scale > 0, scale, 1.0)
    return round_minifloat(largest / E2M1.largest / safe, E4M3), scale


def mxfp4_exponents(x: Tensor, block: int = 32) -> Tensor:
    """Return the exponents of MXFP4's scales: that of each block's largest number, less that of 4.

    So the largest number of a block is below eight times its scale (OCP Microscaling Formats 1.0, Section 6.3).

    Args:
        x: ``[..., n]`` float32.
        block: numbers along the last dimension that share a scale.

    Returns:
        ``[..., blocks]`` int32 in [-126, 125]; what is smaller has the least. A block of zeros has it, too.

    Example:
        >>> mxfp4_exponents(torch.tensor([[6.0, 0.0, 0.5, 0.3]]), block=2).tolist()
        [[0, -3]]
    """
    largest = blocks_of(x, block).abs().amax(-1)
    exponent = (largest.view(torch.int32) >> _FLOAT32_MANTISSA) - _BIAS
    return (exponent - 2).clamp_(min=1 - _BIAS)


def power_of_two(exponent: Tensor) -> Tensor:
    """Return ``2^exponent`` in float32, exactly, for integers from -126 to 127.

    Example:
        >>> power_of_two(torch.tensor([-1, 3]))
        tensor([0.5000, 8.0000])
    """
    return ((exponent.to(torch.int32) + _BIAS) << _FLOAT32_MANTISSA).view(torch.float32)
