"""A linear whose codes are learned: latent weights in units of the grid's cells, rounded straight through.

Its weight and the gradients are :func:`ptq161.kernels.latent.latent_weight`.
"""

from __future__ import annotations

import torch
from torch import Tensor, nn

from ptq161.kernels.latent import Columns, codes_of, latent_weight
from ptq161.methods.codes.grid import CodeGrid

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
        self._columns = Columns(grid.levels, grid.center, grid.ranged.float(), grid.step)

    def grid(self) -> CodeGrid:
        """Return the grid as learned so far."""
        grid = self._grid
        with torch.no_grad():
            return grid._replace(
                row=grid.row * (1 + self.row_gain),
                column=grid.column * (1 + self.column_gain[0]),
                scale=grid.scale * (1 + self.scale_gain),
                mean=None if grid.mean is None else self._mean(grid.mean),
            )

    def codes(self) -> Tensor:
        """Return the present codes: ``[out, in]`` float32 whole numbers."""
        with torch.no_grad():
            return codes_of(self.latent, self._columns.levels)

    def forward(self, x: Tensor) -> Tensor:
        """Map ``[..., in]`` to ``[..., out]`` of ``compute_dtype``."""
        grid = self._grid
        weight = latent_weight(
            self.latent,
            self._columns,
            grid.column * (1 + self.column_gain[0]),
            grid.row * (1 + self.row_gain),
            grid.scale * (1 + self.scale_gain),
            grid.zero_point,
            torch.zeros_like(grid.row) if grid.mean is None else self._mean(grid.mean),
            softness=self.softness,
            dtype=self.compute_dtype,
        )
        bias = None if self.bias is None else self.bias.to(self.compute_dtype)
        with torch.autocast(x.device.type, enabled=False):
            return nn.functional.linear(x.to(self.compute_dtype), weight, bias)

    def _mean(self, start: Tensor) -> Tensor:
        return start if self.mean_gain is None else start + self._grid.row * self.mean_gain
