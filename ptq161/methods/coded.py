"""Packed weights whose codes can be learned, as points on a grid: the way to a latent linear and back to bytes.

A format takes part with an entry in ``LEARNABLE``: how its tensors are read as codes on a
:class:`~ptq161.methods.codes.CodeGrid`, and how a latent linear is packed again.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Callable
from typing import NamedTuple

import torch
from torch import Tensor, nn

from ptq161.methods.codes import CodeGrid, LatentLinear
from ptq161.methods.ptq161.coding import grid_of_signs, pack_codes_on
from ptq161.packed.allotted import RANGED, AllottedWeight, Grid, tier_centers, tier_steps
from ptq161.packed.structured_binary import StructuredBinaryWeight
from ptq161.packed.weight import PackedWeight, scale_dtype_of


class Coded(NamedTuple):
    """A packed weight on its grid.

    Attributes:
        grid: of the weight, without its exponent.
        codes: ``[out, in]`` float32 whole numbers.

    Example:
        >>> from ptq161.packed.allotted import Grid
        >>> ones = torch.ones(1, 1)
        >>> grid = Grid(row=ones, column=torch.ones(2), scale=ones, zero_point=ones)
        >>> packed = AllottedWeight.pack(torch.tensor([[1, 9]]), torch.tensor([1, 4]), grid, tiers=[1, 4])
        >>> coded = coded_weight(packed)
        >>> coded.codes.tolist(), torch.equal(coded.grid.values(coded.codes), packed.dequantize())
        ([[1.0, 9.0]], True)
    """

    grid: CodeGrid
    codes: Tensor


def coded_weight(packed: PackedWeight) -> Coded:
    """Read a packed weight of a format in ``LEARNABLE`` as a grid and codes.

    Example:
        >>> ones = torch.ones(1, 1)
        >>> grid = Grid(row=ones, column=torch.ones(1), scale=ones, zero_point=ones)
        >>> packed = AllottedWeight.pack(torch.tensor([[3]]), torch.tensor([2]), grid, tiers=[2])
        >>> coded_weight(packed).codes.tolist()
        [[3.0]]
    """
    return LEARNABLE[packed.format].read(packed)


def latent_linear(packed: PackedWeight, linear: nn.Linear, compute_dtype: torch.dtype) -> LatentLinear:
    """Return a linear that learns the codes of a packed weight, and at first computes what that stands for.

    Args:
        packed: of a format in ``LEARNABLE``.
        linear: the full-precision linear, on the same device; its weights are where the latents start, moved into the
            cells of the stored codes.
        compute_dtype: dtype of the matrix products.

    Example:
        >>> linear = nn.Linear(4, 2, bias=False)
        >>> grid = Grid(torch.ones(2, 1), torch.ones(4), torch.ones(2, 1), torch.ones(2, 1))
        >>> packed = AllottedWeight.pack(torch.ones(2, 4, dtype=torch.int64), torch.full((4,), 2), grid, tiers=[2])
        >>> layer = latent_linear(packed, linear, torch.float32)
        >>> torch.allclose(layer(torch.eye(4)).T, packed.dequantize())
        True
    """
    grid, codes = coded_weight(packed)
    return LatentLinear(linear, grid.scaled(2.0**packed.exponent), codes, compute_dtype)


def repack(packed: PackedWeight, layer: LatentLinear) -> PackedWeight:
    """Pack the codes and factors that a layer of :func:`latent_linear` has learned, in as many bytes as ``packed``.

    Raises:
        UserError: a factor leaves the range of the dtype in which it is stored.

    Example:
        >>> linear = nn.Linear(4, 2, bias=False)
        >>> grid = Grid(torch.ones(2, 1), torch.ones(4), torch.ones(2, 1), torch.ones(2, 1))
        >>> packed = AllottedWeight.pack(torch.ones(2, 4, dtype=torch.int64), torch.full((4,), 2), grid, tiers=[2])
        >>> layer = latent_linear(packed, linear, torch.float32)
        >>> with torch.no_grad():
        ...     _ = layer.latent[0, 0].fill_(3.2)
        >>> again = repack(packed, layer)
        >>> (again.dequantize() - packed.dequantize()).count_nonzero().item(), again.nbytes == packed.nbytes
        (1, True)
    """
    grid = layer.grid().scaled(2.0**-packed.exponent)
    again = LEARNABLE[packed.format].pack(packed, Coded(grid, layer.codes()))
    return dataclasses.replace(again, exponent=packed.exponent)


def _read_allotted(packed: PackedWeight) -> Coded:
    assert isinstance(packed, AllottedWeight)
    bits, codes, zero_point = packed.channel_bits(), packed.unpacked_codes(), packed.zero_points()
    ones, ranged = codes.new_ones(packed.out_features, 1), bits == RANGED
    column = codes.new_ones(packed.in_features)
    if packed.column is not None:
        column[~ranged] = packed.column.float()
    grid = CodeGrid(
        step=tier_steps(bits),
        center=tier_centers(bits),
        levels=2.0**bits - 1,
        ranged=ranged,
        row=ones if packed.row is None else packed.row.float(),
        column=column,
        mean=None,
        scale=ones if packed.ranged_scale is None else packed.ranged_scale.float(),
        zero_point=torch.zeros_like(ones) if zero_point is None else zero_point,
    )
    return Coded(grid, codes)


def _pack_allotted(packed: PackedWeight, coded: Coded) -> PackedWeight:
    assert isinstance(packed, AllottedWeight)
    grid, codes = coded
    factors = packed.ranged_scale if packed.row is None else packed.row
    assert factors is not None, "a weight has channels"
    return AllottedWeight.pack(
        codes.to(torch.uint8),
        packed.channel_bits(),
        Grid(grid.row, grid.column, grid.scale, grid.zero_point),
        tiers=packed.tiers,
        scale_dtype=scale_dtype_of(factors),
    )


def _read_binary(packed: PackedWeight) -> Coded:
    assert isinstance(packed, StructuredBinaryWeight)
    mask = packed.salient_channels()
    codes = packed.unpacked_codes()
    column = codes.new_ones(packed.in_features)
    column[~mask] = packed.column_angle.float()
    grid = grid_of_signs(
        mask,
        packed.salient_bits,
        row=packed.scale.float(),
        column=column,
        mean=packed.mean.float(),
        salient_scale=packed.salient_scale.float(),
        salient_zero_point=packed.salient_zero_point.float(),
    )
    return Coded(grid, codes)


def _pack_binary(packed: PackedWeight, coded: Coded) -> PackedWeight:
    assert isinstance(packed, StructuredBinaryWeight)
    return pack_codes_on(coded.grid, coded.codes, packed.salient_bits, scale_dtype_of(packed.scale))


class _Format(NamedTuple):
    read: Callable[[PackedWeight], Coded]
    pack: Callable[[PackedWeight, Coded], PackedWeight]


LEARNABLE: dict[str, _Format] = {
    AllottedWeight.format: _Format(_read_allotted, _pack_allotted),
    StructuredBinaryWeight.format: _Format(_read_binary, _pack_binary),
}
"""By the name of the format."""
