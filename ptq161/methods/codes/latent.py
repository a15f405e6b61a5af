"""A linear whose codes are learned: latent weights in units of the grid's cells, rounded straight through.

The weight is ``scale * (code - offset) + shift`` with ``code = clamp(round(latent))``; scale, offset and shift follow
from a few factors per row and column. Given the gradient ``G = g^T x`` of the weight, that of the latents is
``G * scale`` where they lie on the grid or little outside; those of the factors are sums of ``G * (code - offset)``.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, nn

from ptq161.methods.codes.grid import CodeGrid

_SLACK = 0.75
"""Cells beyond the ends of the grid within which a latent still has a gradient."""
_MARGIN = 0.02
"""Cells that a latent starts inside of its code's cell, at least."""


class LatentLinear(nn.Module):
    """A linear during the learning of its codes.

    Args:
        linear: the full-precision linear.
        grid: of its weight.
        codes: ``[out, in]``, from which learning starts; a latent is the weight's own position on the grid, moved into
            the cell of its code.
        compute_dtype: dtype of the matrix products.

    Attributes:
        latent: parameter ``[out, in]`` float32.
        row_gain: parameter ``[out, 1]``, relative change of the grid's row factors; starts at zero.
        column_gain: parameter ``[1, in]``, of its column factors.
        scale_gain: parameter ``[out, 1]``, of the steps of ranged channels.
        mean_gain: parameter ``[out, 1]``, change of the grid's mean in units of the row factors; None without a mean.
        softness: share in [0, 1] of the way from a code to its latent at which the weight is computed; 0 is the code.

    Example:
        >>> from ptq161.methods.codes.grid import fit_grid
        >>> linear = nn.Linear(3, 2, bias=False)
        >>> grid = fit_grid(linear.weight.detach(), torch.tensor([1, 2, 4]))
        >>> layer = LatentLinear(linear, grid, grid.nearest(linear.weight.detach()), torch.float32)
        >>> torch.allclose(layer(torch.eye(3)).T, grid.values(grid.nearest(linear.weight.detach())), atol=1e-6)
        True
    """

    def __init__(self, linear: nn.Linear, grid: CodeGrid, codes: Tensor, compute_dtype: torch.dtype) -> None:
        super().__init__()
        weight = linear.weight.detach().float()
        self.bias: Tensor | None = linear.bias
        self.compute_dtype = compute_dtype
        self._grid = grid
        inside = torch.maximum(torch.minimum(grid.position(weight), codes + 0.5 - _MARGIN), codes - 0.5 + _MARGIN)
        self.latent = nn.Parameter(inside)
        out_features, in_features = weight.shape
        device = weight.device
        self.row_gain = nn.Parameter(torch.zeros(out_features, 1, device=device))
        self.column_gain = nn.Parameter(torch.zeros(1, in_features, device=device))
        self.scale_gain = nn.Parameter(torch.zeros(out_features, 1, device=device))
        self.mean_gain = None if grid.mean is None else nn.Parameter(torch.zeros(out_features, 1, device=device))
        self.softness = 0.0
        self.levels = grid.levels
        self.offsets = grid.offsets().expand(out_features, in_features)
        self.ranged = grid.ranged.float()
        self.scaled = 1 - self.ranged

    def grid(self) -> CodeGrid:
        """Return the grid as learned so far."""
        grid = self._grid
        with torch.no_grad():
            return grid._replace(
                row=grid.row * (1 + self.row_gain),
                column=grid.column * (1 + self.column_gain[0]),
                scale=grid.scale * (1 + self.scale_gain),
                mean=self._mean(),
            )

    def codes(self) -> Tensor:
        """Return the present codes: ``[out, in]`` float32 whole numbers."""
        with torch.no_grad():
            return torch.minimum(self.latent.round().clamp_(min=0), self.levels)

    def forward(self, x: Tensor) -> Tensor:
        """Map ``[..., in]`` to ``[..., out]`` of ``compute_dtype``."""
        grid = self._grid
        # Scales are a product of two small matrices: a column of row factors and one of the ranged channels' steps.
        rows = torch.cat([grid.row * (1 + self.row_gain), grid.scale * (1 + self.scale_gain)], dim=1)
        column = grid.column * (1 + self.column_gain)
        columns = torch.cat([column * (grid.step * self.scaled), self.ranged.unsqueeze(0)])
        weight: Tensor = _LatentWeight.apply(  # type: ignore[no-untyped-call]  # torch leaves it untyped
            self.latent, rows, columns, self.levels, self.offsets, self.softness, self.compute_dtype
        )
        mean = self._mean()
        if mean is not None:
            weight = weight + (mean * (column * self.scaled)).to(weight.dtype)
        bias = None if self.bias is None else self.bias.to(self.compute_dtype)
        with torch.autocast(x.device.type, enabled=False):
            return nn.functional.linear(x.to(self.compute_dtype), weight, bias)

    def _mean(self) -> Tensor | None:
        if self._grid.mean is None or self.mean_gain is None:
            return None
        return self._grid.mean + self._grid.row * self.mean_gain


class _LatentWeight(torch.autograd.Function):
    """The quantized weight in the compute dtype, with gradients of latents and factors."""

    @staticmethod
    def forward(
        ctx: Any,
        latent: Tensor,
        rows: Tensor,
        columns: Tensor,
        levels: Tensor,
        offsets: Tensor,
        softness: float,
        dtype: torch.dtype,
    ) -> Tensor:
        centered = torch.minimum(latent.round().clamp_(min=0), levels)
        if softness:
            centered.lerp_(torch.minimum(latent.clamp(min=0), levels), softness)
        centered.sub_(offsets)
        scales = rows @ columns
        ctx.save_for_backward(latent, rows, columns, levels, centered)
        return scales.mul_(centered).to(dtype)

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor | None, ...]:
        latent, rows, columns, levels, centered = ctx.saved_tensors
        grad = grad.float()
        grad_scales = grad * centered
        grad_rows, grad_columns = grad_scales @ columns.T, rows.T @ grad_scales
        outside = (latent < -_SLACK) | (latent > levels + _SLACK)
        grad_latent = (rows @ columns).mul_(grad).masked_fill_(outside, 0.0)
        return grad_latent, grad_rows, grad_columns, None, None, None, None
