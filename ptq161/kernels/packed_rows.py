"""Products of a few rows with a packed weight on the CPU, from its bytes: no weight is written to memory.

The operators (``packed_rows.cpp``) take float32 and bfloat16, and compute in float32, or with activations of eight bits
where ``int8`` is set. They are not differentiable. A result depends neither on the number of threads nor on that of
rows. :mod:`ptq161.packed` says which tensors each of its formats has, and has the same in torch.
"""

from __future__ import annotations

import functools
from collections.abc import Sequence

import torch
from torch import Tensor

from ptq161.kernels import native

DTYPES = (torch.float32, torch.bfloat16)
"""Of the rows that the operators take."""
CODE_BITS = (1, 2, 3, 4)
"""Of the codes that the operators take."""
HIGHEST = 2
"""Instruction sets: 0 is portable, 1 AVX2, 2 AVX-512; the processor's highest up to the one that is given is used."""


def usable(x: Tensor) -> bool:
    """Whether the operators serve ``x``: on the CPU, in one of ``DTYPES``, and compiled."""
    return x.dtype in DTYPES and native.usable("packed_rows", x) and _fakes()


def structured_binary_rows(
    x: Tensor,
    mask: Tensor,
    sign: Tensor,
    scale: Tensor,
    mean: Tensor,
    column_angle: Tensor,
    codes: Tensor,
    salient_scale: Tensor,
    salient_zero_point: Tensor,
    bias: Tensor | None,
    *,
    salient_bits: int,
    factor: float = 1.0,
    int8: bool = False,
    level: int = HIGHEST,
) -> Tensor:
    """Return ``x @ W.T + bias`` for a weight of signs and salient channels.

    Args:
        x: ``[..., in]``, one of ``DTYPES``.
        mask: and the tensors up to ``salient_zero_point``: those of
            :class:`ptq161.packed.structured_binary.StructuredBinaryWeight`.
        sign: see there, as all others.
        scale: of the signs.
        mean: of the signs.
        column_angle: of the binary channels.
        codes: of the salient channels.
        salient_scale: of the codes.
        salient_zero_point: of the codes.
        bias: ``[out]`` in the dtype of ``x``.
        salient_bits: one of ``CODE_BITS``.
        factor: of the whole weight.
        int8: round the activations to eight bits.
        level: the highest instruction set to use.

    Returns:
        ``[..., out]`` in the dtype of ``x``.

    Raises:
        RuntimeError: the tensors are not those of one weight.
    """
    tensors = (mask, sign, scale, mean, column_angle, codes, salient_scale, salient_zero_point, bias)
    settings = (x.shape[-1], salient_bits, factor, int8, level)
    y: Tensor = torch.ops.ptq161.structured_binary_rows(x.contiguous(), *tensors, *settings)
    return y


def uniform_rows(
    x: Tensor,
    codes: Tensor,
    scales: Tensor,
    zero_points: Tensor | None,
    input_scales: Tensor | None,
    bias: Tensor | None,
    *,
    bits: int,
    group_size: int | None,
    factor: float = 1.0,
    int8: bool = False,
    level: int = HIGHEST,
) -> Tensor:
    """Return ``x @ W.T + bias`` for a weight of uniform codes.

    Args:
        x: ``[..., in]``, one of ``DTYPES``.
        codes: and ``scales``, ``zero_points``: those of :class:`ptq161.packed.uniform.UniformWeight`.
        scales: see there.
        zero_points: see there.
        input_scales: ``[in]`` of :class:`ptq161.packed.awq.AWQWeight`, by which columns are divided.
        bias: ``[out]`` in the dtype of ``x``.
        bits: one of ``CODE_BITS``.
        group_size: columns per group, whose codes fill whole bytes; None is one group.
        factor: of the whole weight.
        int8: round the activations to eight bits.
        level: the highest instruction set to use.

    Returns:
        ``[..., out]`` in the dtype of ``x``.

    Raises:
        RuntimeError: the tensors are not those of one weight.
    """
    tensors = (codes, scales, zero_points, input_scales, bias)
    settings = (x.shape[-1], bits, group_size or x.shape[-1], factor, int8, level)
    y: Tensor = torch.ops.ptq161.uniform_rows(x.contiguous(), *tensors, *settings)
    return y


def allotted_rows(
    x: Tensor,
    labels: Tensor | None,
    codes: Sequence[Tensor],
    row: Tensor | None,
    column: Tensor | None,
    ranged_scale: Tensor | None,
    zero_point: Tensor | None,
    bias: Tensor | None,
    *,
    tiers: Sequence[int],
    steps: Sequence[float],
    factor: float = 1.0,
    int8: bool = False,
    level: int = HIGHEST,
) -> Tensor:
    """Return ``x @ W.T + bias`` for a weight whose channels have 1 to 4 bits.

    Args:
        x: ``[..., in]``, one of ``DTYPES``.
        labels: and the tensors up to ``zero_point``: those of :class:`ptq161.packed.allotted.AllottedWeight`.
        codes: of the tiers that have channels, in rising order.
        row: see there.
        column: see there.
        ranged_scale: see there.
        zero_point: see there.
        bias: ``[out]`` in the dtype of ``x``.
        tiers: bits of each label.
        steps: of the grids of 1, 2 and 3 bits.
        factor: of the whole weight.
        int8: round the activations to eight bits.
        level: the highest instruction set to use.

    Returns:
        ``[..., out]`` in the dtype of ``x``.

    Raises:
        RuntimeError: the tensors are not those of one weight.
    """
    tensors = (labels, list(codes), row, column, ranged_scale, zero_point, bias)
    settings = (list(tiers), list(steps), x.shape[-1], factor, int8, level)
    y: Tensor = torch.ops.ptq161.allotted_rows(x.contiguous(), *tensors, *settings)
    return y


@functools.cache
def _fakes() -> bool:
    """Tell torch the shapes of results, for tracing; once, with the operators loaded."""
    torch.library.register_fake("ptq161::structured_binary_rows", lambda x, mask, sign, *_: _empty(x, sign))
    torch.library.register_fake("ptq161::uniform_rows", lambda x, codes, *_: _empty(x, codes))
    torch.library.register_fake("ptq161::allotted_rows", lambda x, labels, codes, *_: _empty(x, codes[0]))
    return True


def _empty(x: Tensor, by_row: Tensor) -> Tensor:
    return x.new_empty((*x.shape[:-1], by_row.shape[0]))
