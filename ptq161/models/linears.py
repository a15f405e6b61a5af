"""A linear layer around a weight that is there already."""

from __future__ import annotations

from torch import Tensor, nn


def linear_of(weight: Tensor, bias: nn.Parameter | None = None) -> nn.Linear:
    """Return the linear layer of a weight ``[out, in]`` and a bias ``[out]``, both taken as they are.

    Example:
        >>> import torch
        >>> linear_of(torch.full((1, 2), 3.0))(torch.ones(1, 2)).tolist()
        [[6.0]]
    """
    # On the meta device nothing is allocated and drawn that would be thrown away.
    linear = nn.Linear(weight.shape[1], weight.shape[0], bias=bias is not None, device="meta")
    linear.weight = nn.Parameter(weight)
    linear.register_parameter("bias", bias)
    return linear
