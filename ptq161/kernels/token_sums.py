"""Sums over the features of each token, of which the losses of a block's output are made, with their gradient.

A squared error, a relative one and a cosine need no more of an output ``y`` and its targets ``t`` than, for each token,
``y.y``, ``|y - t|^2``, ``y.t`` and ``t.t``. On the CPU all are one pass over outputs and targets, and the gradient is
another (``token_sums.cpp``), where torch takes some thirty.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, NamedTuple

import torch
from torch import Tensor

from ptq161.kernels import native


class TokenSums(NamedTuple):
    """Sums of an output ``[..., hidden]`` and its targets for each of ``n`` tokens, float32.

    Attributes:
        size: ``[n]``, the output's squares.
        errors: ``[targets, n]``, squares of the differences from each target.
        products: ``[targets, n]``, products with it.
        target_sizes: ``[targets, n]``, its squares; without a gradient.
    """

    size: Tensor
    errors: Tensor
    products: Tensor
    target_sizes: Tensor


def token_sums(output: Tensor, targets: Sequence[Tensor]) -> TokenSums:
    """Return the sums of each token, differentiable in the output.

    Args:
        output: ``[..., hidden]``; computed in float32.
        targets: each the same shape.

    Example:
        >>> sums = token_sums(torch.tensor([[3.0, 4.0]]), [torch.tensor([[3.0, 0.0]])])
        >>> [float(part) for part in sums]
        [25.0, 16.0, 9.0, 9.0]
    """
    flat = [x.float().reshape(-1, x.shape[-1]).contiguous() for x in (output, *targets)]
    # Function.apply has no annotations.
    sums: Tensor = _TokenSums.apply(*flat)  # type: ignore[no-untyped-call]  # torch leaves it untyped
    size, *parts = sums.split([1, *[len(targets)] * 3])
    return TokenSums(size[0], *parts)


class _TokenSums(torch.autograd.Function):
    """``[1 + 3 targets, n]``, in the order of :class:`TokenSums`."""

    @staticmethod
    def forward(ctx: Any, output: Tensor, *targets: Tensor) -> Tensor:
        ctx.save_for_backward(output, *targets)
        if native.usable("token_sums", output, *targets):
            sums: Tensor = torch.ops.ptq161.token_sums(output, targets)
            return sums
        errors = [(output - target).square().sum(-1) for target in targets]
        products = [(output * target).sum(-1) for target in targets]
        sizes = [x.square().sum(-1) for x in (output, *targets)]
        return torch.stack([sizes[0], *errors, *products, *sizes[1:]])

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor | None, ...]:
        output, *targets = ctx.saved_tensors
        nothing = (None,) * len(targets)
        if native.usable("token_sums", grad, output, *targets):
            return torch.ops.ptq161.token_sums_gradient(grad.contiguous(), output, targets), *nothing
        size, errors, products, _ = grad.unsqueeze(-1).split([1, *[len(targets)] * 3])
        of_output = 2 * size[0] * output
        for target, error, product in zip(targets, errors, products, strict=True):
            of_output += 2 * error * (output - target) + product * target
        return of_output, *nothing
