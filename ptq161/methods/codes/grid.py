"""The grid that codes of a weight stand on: a step per channel scaled by factors of row and column, or a row's range.

One description serves every format whose codes can be learned. With a channel's ``step`` and ``center``, its codes
``0, 1, ..., levels`` stand for ``row * column * step * (code - center) + mean * column``; those of a ranged channel for
``scale * (code - zero_point)``. Allotted bits have no mean, and steps for a unit Gaussian; the signs of PTQ1.61 have
a step of 2 around a center of 1/2.
"""

from __future__ import annotations

from typing import NamedTuple

import torch
from torch import Tensor

from ptq161.methods.compensation import compensate_columns, inverse_factor
from ptq161.packed.allotted import RANGED, tier_centers, tier_steps
from ptq161.packed.uniform import uniform_parameters
from ptq161.packed.weight import stored_scale

_ROUNDS = 4
"""In which factors of rows and columns are fitted in turn; the first two do nearly all."""


class CodeGrid(NamedTuple):
    """Where the values of a weight ``[out, in]`` may lie.

    Attributes:
        step: ``[in]``, distance between neighboring values before the factors; read where not ranged.
        center: ``[in]``, code that stands for zero before the mean; read where not ranged.
        levels: ``[in]``, the largest code.
        ranged: ``[in]`` bool, channels on the row's own range.
        row: ``[out, 1]``, factor of each row.
        column: ``[in]``, factor of each channel.
        mean: ``[out, 1]``, added to each row, scaled by the column's factor; None adds nothing.
        scale: ``[out, 1]``, step of the ranged channels.
        zero_point: ``[out, 1]``, code of zero of the ranged channels.

    Example:
        >>> grid = fit_grid(torch.tensor([[0.5, -2.0, 8.0], [-0.5, 2.0, -7.0]]), torch.tensor([1, 2, 4]))
        >>> grid.nearest(torch.tensor([[0.5, -2.0, 8.0], [-0.5, 2.0, -7.0]])).tolist()
        [[1.0, 0.0, 15.0], [0.0, 3.0, 0.0]]
    """

    step: Tensor
    center: Tensor
    levels: Tensor
    ranged: Tensor
    row: Tensor
    column: Tensor
    mean: Tensor | None
    scale: Tensor
    zero_point: Tensor

    def scales(self) -> Tensor:
        """Return the distance between neighboring values of each weight: ``[out, in]``."""
        return torch.where(self.ranged, self.scale, self.row * (self.column * self.step))

    def offsets(self) -> Tensor:
        """Return the code of each weight that stands for zero, but for the mean: ``[out, in]``."""
        return torch.where(self.ranged, self.zero_point, self.center)

    def shift(self) -> Tensor:
        """Return what the mean adds to each weight: ``[out, in]``, or a zero where there is none."""
        if self.mean is None:
            return self.row.new_zeros(())
        return torch.where(self.ranged, 0.0, self.mean * self.column)

    def position(self, weight: Tensor) -> Tensor:
        """Return where weights lie on the grid, in units of its cells: codes, but not whole numbers."""
        scales = self.scales()
        safe = torch.where(scales > 0, scales, 1.0)
        return torch.where(scales > 0, (weight - self.shift()) / safe + self.offsets(), self.offsets())

    def nearest(self, weight: Tensor) -> Tensor:
        """Return the nearest codes: ``[out, in]`` float32."""
        return torch.minimum(self.position(weight).round().clamp(min=0) + 0.0, self.levels)  # no negative zeros

    def values(self, codes: Tensor) -> Tensor:
        """Return what codes ``[out, in]`` stand for."""
        return self.scales() * (codes - self.offsets()) + self.shift()

    def scaled(self, size: float) -> CodeGrid:
        """Return the grid of ``size`` times the weight."""
        mean = None if self.mean is None else self.mean * size
        return self._replace(row=self.row * size, scale=self.scale * size, mean=mean)

    def stored(self, scale_dtype: str) -> CodeGrid:
        """Return the grid with its factors, mean and step rounded to ``scale_dtype``."""

        def rounded(part: Tensor) -> Tensor:
            return stored_scale(part, scale_dtype).float()

        mean = None if self.mean is None else rounded(self.mean)
        return self._replace(row=rounded(self.row), column=rounded(self.column), mean=mean, scale=rounded(self.scale))


def fit_grid(weight: Tensor, bits: Tensor, scale_dtype: str = "float32") -> CodeGrid:
    """Fit the grid of allotted bits to a weight: factors to its energies, 4-bit channels to each row's range.

    The factors are those for which ``row_i^2 column_j^2`` has the energies of the rows and of the columns of
    ``W_ij^2``, in turn; the codes of less than 4 bits then stand for a unit Gaussian.

    Args:
        weight: ``[out, in]``.
        bits: ``[in]``, of each channel.
        scale_dtype: the grid's parts are rounded to what is stored.

    Example:
        >>> weight = torch.tensor([[1.0, -2.0], [3.0, 6.0]])
        >>> grid = fit_grid(weight, torch.tensor([1, 1]))
        >>> (grid.row * grid.column).round(decimals=3).tolist()
        [[1.0, 2.0], [3.0, 6.0]]
    """
    weight = weight.float()
    ranged = bits == RANGED
    squares = weight.square() * ~ranged
    row = torch.ones(weight.shape[0], 1, device=weight.device)
    column = torch.ones(weight.shape[1], device=weight.device)
    n_rows, n_columns = weight.shape[0], max(1, int((~ranged).sum()))
    tiny = torch.finfo(torch.float32).tiny
    for _ in range(_ROUNDS):
        row = (squares / column.square().clamp(min=tiny)).sum(1, keepdim=True).div(n_columns).sqrt()
        column = (squares / row.square().clamp(min=tiny)).sum(0).div(n_rows).sqrt()
    column = torch.where(ranged, 1.0, column)
    if bool(ranged.any()):
        scale, zero_point = uniform_parameters(weight[:, ranged], RANGED, scale_dtype=scale_dtype)
    else:
        scale, zero_point = torch.ones_like(row), torch.zeros_like(row)
    # Both factors are defined up to a constant: at a mean column of one, rows have the magnitude of the weights.
    level = column[~ranged].mean() if bool((~ranged).any()) else column.new_ones(())
    level = torch.where(level > 0, level, 1.0)
    column = torch.where(ranged, 1.0, column / level)
    grid = CodeGrid(
        step=tier_steps(bits),
        center=tier_centers(bits),
        levels=2.0**bits - 1,
        ranged=ranged,
        row=row * level,
        column=column,
        mean=None,
        scale=scale,
        zero_point=zero_point,
    )
    return grid.stored(scale_dtype)


def compensated_codes(weight: Tensor, grid: CodeGrid, hessian: Tensor, damping: float = 0.01) -> Tensor:
    """Choose codes with GPTQ's error compensation, channels in the order of falling hessian diagonal.

    Args:
        weight: ``[out, in]``.
        grid: of the weight.
        hessian: ``[in, in]``, 2/n X^T X.
        damping: see :func:`ptq161.methods.compensation.inverse_factor`.

    Returns:
        ``[out, in]`` float32 whole numbers.

    Example:
        >>> weight = torch.tensor([[0.4, 0.4, -1.0, 1.0]])
        >>> grid = fit_grid(weight, torch.tensor([1, 1, 1, 1]))
        >>> compensated_codes(weight, grid, torch.eye(4)).tolist()
        [[1.0, 1.0, 0.0, 1.0]]
    """
    factor = inverse_factor(hessian, damping, act_order=True)
    order = factor.order if factor.order is not None else torch.arange(weight.shape[1], device=weight.device)
    scales, offsets = grid.scales()[:, order], grid.offsets().expand_as(weight)[:, order]
    shift, levels = grid.shift().expand_as(weight)[:, order], grid.levels[order]
    codes = torch.empty_like(weight, dtype=torch.float32)
    columns = [part.T.contiguous() for part in (scales.clamp(min=torch.finfo(torch.float32).tiny), offsets, shift)]

    def quantize_column(column: Tensor, j: int, lagged: Tensor) -> Tensor:
        scale, offset, mean = (part[j] for part in columns)
        code = ((column - mean) / scale + offset).round().clamp(0, float(levels[j])) + 0.0  # no negative zeros
        codes[:, order[j]] = code
        return (code - offset) * scale + mean

    compensate_columns(weight.float()[:, order], factor, quantize_column)
    return codes
