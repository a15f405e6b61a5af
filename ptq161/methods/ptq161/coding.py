"""The codes of a binarized linear on the grid that learned codes share: signs and salient codes beyond the nearest.

The released code takes the sign of ``W - mean`` and the nearest salient code, whatever the inputs are. On
:class:`~ptq161.methods.codes.CodeGrid`, a sign is a code of 0 or 1 around a center of 1/2 with a step of 2, so that the
same codes may be chosen by error compensation, or learned (this project's own).
"""

from __future__ import annotations

import torch
from torch import Tensor

from ptq161.methods.codes import CodeGrid, LatentLinear
from ptq161.methods.ptq161.binarization import initial_scales, quantize_salient
from ptq161.packed.structured_binary import StructuredBinaryWeight
from ptq161.packed.weight import check_magnitude


def binary_grid(
    weight: Tensor, mask: Tensor, salient_bits: int = 4, salient_range: str = "row", scale_dtype: str = "float32"
) -> CodeGrid:
    """Return the grid of a weight with its initial scales: nearest codes are those of the released code.

    Args:
        weight: ``[out, in]``.
        mask: ``[in]`` bool, True for salient channels.
        salient_bits: bits of a salient code.
        salient_range: see :func:`~ptq161.methods.ptq161.quantize_salient`.
        scale_dtype: dtype in which scales are stored.

    Example:
        >>> weight, mask = torch.tensor([[1.0, -3.0, 9.0, 2.0]]), torch.tensor([False, False, True, False])
        >>> grid = binary_grid(weight, mask)
        >>> codes = grid.nearest(weight)
        >>> codes.tolist(), [round(value, 1) for value in grid.values(codes)[0].tolist()]
        ([[1.0, 0.0, 15.0, 1.0]], [2.0, -2.0, 8.8, 2.0])
    """
    weight = weight.float()
    check_magnitude(weight, scale_dtype)
    mean, row = initial_scales(weight, mask)
    _, salient_scale, salient_zero_point = quantize_salient(weight, mask, salient_bits, salient_range, scale_dtype)
    return grid_of_signs(
        mask,
        salient_bits,
        row=row,
        # Columns that are all zero stay so, which pruning relies on.
        column=((weight != 0).any(0) | mask).float(),
        mean=mean,
        salient_scale=salient_scale,
        salient_zero_point=salient_zero_point,
    )


def grid_of_signs(
    mask: Tensor,
    salient_bits: int,
    *,
    row: Tensor,
    column: Tensor,
    mean: Tensor,
    salient_scale: Tensor,
    salient_zero_point: Tensor,
) -> CodeGrid:
    """Return the grid of signs and salient codes.

    Args:
        mask: ``[in]`` bool, True for salient channels.
        salient_bits: bits of a salient code.
        row: ``[out, 1]``, scale of each row of signs.
        column: ``[in]``, factor of each channel of signs; read where not salient.
        mean: ``[out, 1]``.
        salient_scale: ``[out, 1]``, step of the salient codes; ``[out, 0]`` where there are none.
        salient_zero_point: the same shape, code of zero.

    Example:
        >>> one, none = torch.ones(1, 1), torch.ones(1, 0)
        >>> parts = {"row": 2 * one, "column": torch.ones(2), "mean": one, "salient_scale": none}
        >>> grid = grid_of_signs(torch.tensor([False, False]), 4, salient_zero_point=none, **parts)
        >>> grid.values(torch.tensor([[0.0, 1.0]])).tolist()
        [[-1.0, 3.0]]
    """
    has_salient = salient_scale.numel() > 0
    return CodeGrid(
        step=torch.full_like(column, 2.0),
        center=torch.full_like(column, 0.5),
        levels=torch.where(mask, 2.0**salient_bits - 1, 1.0),
        ranged=mask,
        row=row,
        column=column,
        mean=mean,
        scale=salient_scale if has_salient else torch.ones_like(row),
        zero_point=salient_zero_point if has_salient else torch.zeros_like(row),
    )


def pack_latent(layer: LatentLinear, salient_bits: int = 4, scale_dtype: str = "float16") -> StructuredBinaryWeight:
    """Pack a linear with the codes and the grid that it has learned so far.

    Raises:
        UserError: a scale does not fit ``scale_dtype``.

    Example:
        >>> linear = torch.nn.Linear(8, 4, bias=False)
        >>> weight, mask = linear.weight.detach(), torch.arange(8) < 2
        >>> grid = binary_grid(weight, mask)
        >>> layer = LatentLinear(linear, grid, grid.nearest(weight), torch.float32)
        >>> packed = pack_latent(layer, scale_dtype="float32")
        >>> torch.allclose(packed.dequantize(), grid.values(grid.nearest(weight)))
        True
    """
    return pack_codes_on(layer.grid(), layer.codes(), salient_bits, scale_dtype)


def pack_codes_on(grid: CodeGrid, codes: Tensor, salient_bits: int, scale_dtype: str) -> StructuredBinaryWeight:
    """Pack codes on a grid as :func:`binary_grid` makes it.

    Raises:
        UserError: a scale does not fit ``scale_dtype``.

    Example:
        >>> weight = torch.tensor([[1.0, -3.0, 2.0]])
        >>> grid = binary_grid(weight, torch.zeros(3, dtype=torch.bool))
        >>> pack_codes_on(grid, grid.nearest(weight), salient_bits=4, scale_dtype="float32").dequantize().tolist()
        [[2.0, -2.0, 2.0]]
    """
    mask, none = grid.ranged, grid.scale[:, :0]
    assert grid.mean is not None, "of binary_grid"
    salient = bool(mask.any())
    return StructuredBinaryWeight.pack(
        mask=mask,
        sign=codes[:, ~mask] > 0,
        scale=grid.row,
        mean=grid.mean,
        column_angle=grid.column[~mask],
        codes=codes[:, mask].to(torch.uint8),
        salient_scale=grid.scale if salient else none,
        salient_zero_point=grid.zero_point if salient else none,
        salient_bits=salient_bits,
        scale_dtype=scale_dtype,
    )
