"""The weight of a linear whose codes are learned, with the gradients of latents and factors.

For a latent ``z`` the code is ``clamp(round(z), 0, levels)``, and the weight ``cell * (code - offset) + shift``, where

- an ordinary column has ``cell = row * column * step``, ``offset = center`` and ``shift = mean * column``,
- a ranged one has ``cell = scale``, ``offset = zero_point`` and no shift.

The gradient passes straight through to latents on the grid or little outside. On the CPU both directions are one pass
over the latents (``latent.cpp``) where torch takes some fifteen.
"""

from __future__ import annotations

from typing import Any, NamedTuple

import torch
from torch import Tensor

from ptq161.kernels import native

SLACK = 0.75
"""Cells beyond the ends of the grid within which a latent still has a gradient."""


class Columns(NamedTuple):
    """What is fixed of the columns of a weight, ``[in]`` float32 each.

    Attributes:
        levels: the largest code.
        center: code that stands for zero before the mean.
        ranged: one for ranged columns, else zero.
        step: distance between neighboring values before the factors.
    """

    levels: Tensor
    center: Tensor
    ranged: Tensor
    step: Tensor


def latent_weight(
    latent: Tensor,
    columns: Columns,
    column: Tensor,
    row: Tensor,
    scale: Tensor,
    zero_point: Tensor,
    mean: Tensor,
    *,
    softness: float = 0.0,
    dtype: torch.dtype = torch.float32,
) -> Tensor:
    """Return the weight ``[out, in]`` in ``dtype``, differentiable in latents, factors, cells and means.

    Args:
        latent: ``[out, in]`` float32, in cells of the grid.
        columns: what is fixed of each column.
        column: ``[in]`` float32, factor of each column.
        row: ``[out, 1]`` float32, factor of each row.
        scale: ``[out, 1]`` float32, cell of the ranged columns.
        zero_point: ``[out, 1]`` float32, code of zero of the ranged columns; without a gradient.
        mean: ``[out, 1]`` float32, added to each row, scaled by the column's factor.
        softness: share in [0, 1] of the way from the code to the latent at which the weight is computed.
        dtype: float32 or bfloat16 for the compiled operator; any float dtype of torch.

    Example:
        >>> one = torch.ones(1, 1)
        >>> columns = Columns(torch.tensor([1.0, 15]), torch.tensor([0.5, 0]), torch.tensor([0.0, 1]), torch.ones(2))
        >>> latent_weight(torch.tensor([[0.8, 9.2]]), columns, torch.tensor([4.0, 1]), one, 2 * one, 8 * one, 0 * one)
        tensor([[2., 2.]])
    """
    # Function.apply has no annotations.
    weight: Tensor = _LatentWeight.apply(  # type: ignore[no-untyped-call]  # torch leaves it untyped
        latent, column, row, scale, mean, zero_point, columns, softness, dtype
    )
    return weight


class _LatentWeight(torch.autograd.Function):
    @staticmethod
    def forward(
        ctx: Any,
        latent: Tensor,
        column: Tensor,
        row: Tensor,
        scale: Tensor,
        mean: Tensor,
        zero_point: Tensor,
        columns: Columns,
        softness: float,
        dtype: torch.dtype,
    ) -> Tensor:
        rows = tuple(part.contiguous() for part in (row, scale, zero_point, mean))
        ctx.columns, ctx.softness = columns, softness
        ctx.save_for_backward(latent, column, *rows)
        if dtype in (torch.float32, torch.bfloat16) and _compiled(latent, column, *rows):
            arguments = (latent, [*columns, column], rows, softness, dtype == torch.bfloat16)
            weight: Tensor = torch.ops.ptq161.latent_weight(*arguments)
            return weight
        cell, offset, shift = _grid(columns, column, *rows)
        code = codes_of(latent, columns.levels, softness)
        return (cell * (code - offset) + shift).to(dtype)

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor | None, ...]:
        latent, column, *rows = ctx.saved_tensors
        columns: Columns = ctx.columns
        rest = (None,) * 4
        if grad.dtype in (torch.float32, torch.bfloat16) and _compiled(latent, column, *rows):
            operator = torch.ops.ptq161.latent_gradients
            found = operator(grad.contiguous(), latent, [*columns, column], rows, ctx.softness)
            of_latent, of_row, of_scale, of_mean, of_column = found
            return of_latent, of_column, of_row, of_scale, of_mean, *rest
        row, _, _, mean = rows
        cell, offset, _ = _grid(columns, column, *rows)
        grad = grad.float()
        outside = (latent < -SLACK) | (latent > columns.levels + SLACK)
        by_cell = grad * (codes_of(latent, columns.levels, ctx.softness) - offset)
        scaled, shifted = by_cell * (1 - columns.ranged), grad * (1 - columns.ranged)
        return (
            (grad * cell).masked_fill_(outside, 0.0),
            columns.step * (row * scaled).sum(0) + (mean * shifted).sum(0),
            (scaled @ (column * columns.step)).unsqueeze(1),
            (by_cell @ columns.ranged).unsqueeze(1),
            (shifted @ column).unsqueeze(1),
            *rest,
        )


def _compiled(*tensors: Tensor) -> bool:
    plain = all(tensor.dtype == torch.float32 and tensor.is_contiguous() for tensor in tensors)
    return plain and native.usable("latent", *tensors)


def codes_of(latent: Tensor, levels: Tensor, softness: float = 0.0) -> Tensor:
    """Return the codes of latents, or with softness what lies between both: ``[out, in]`` float32."""
    soft = torch.minimum(latent.clamp(min=0), levels)
    code = soft.round()
    return code + softness * (soft - code) if softness else code


def _grid(
    columns: Columns, column: Tensor, row: Tensor, scale: Tensor, zero_point: Tensor, mean: Tensor
) -> tuple[Tensor, Tensor, Tensor]:
    """Return cell, offset and shift of each weight."""
    ranged = columns.ranged > 0
    cell = torch.where(ranged, scale, row * (column * columns.step))
    return cell, torch.where(ranged, zero_point, columns.center), torch.where(ranged, 0.0, mean * column)
