"""The three products of a linear, forward and backward, of quantized operands."""

from __future__ import annotations

from typing import Any, NamedTuple

import torch
from torch import Tensor

from ptq161.training.arithmetic.base import Arithmetic


class FrozenWeight(NamedTuple):
    """A weight that is not trained, quantized once for all steps.

    Attributes:
        forward: ``[out, in]``, groups along ``in``.
        backward: ``[out, in]``, groups along ``out``.
    """

    forward: Tensor
    backward: Tensor


def freeze(weight: Tensor, arithmetic: Arithmetic, dtype: torch.dtype) -> FrozenWeight:
    """Quantize a weight ``[out, in]`` for its two products, in the dtype of these."""
    forward = arithmetic.weight(weight.detach(), 1).to(dtype)
    if arithmetic.quantizes_once:
        return FrozenWeight(forward, forward)
    return FrozenWeight(forward, arithmetic.weight(weight.detach(), 0).to(dtype))


def linear(
    x: Tensor,
    weight: Tensor | FrozenWeight,
    arithmetic: Arithmetic,
    *,
    bias: Tensor | None = None,
    scale: float = 1.0,
) -> Tensor:
    """Return ``Y = scale * Q(X) Q(W)^T + bias``, differentiable in X, in W where it is a tensor, and in the bias.

    With ``G = dL/dY``: ``dX = scale * Q(G) Q(W)`` and ``dW = scale * Q(G)^T Q(X)``; the gradient passes each quantizer
    as if it were the identity. X and G are matrices of all tokens. The products are in the dtype of the autocast, else
    in that of ``x``.

    Args:
        x: ``[..., in]``.
        weight: ``[out, in]``.
        arithmetic: the quantizers.
        bias: ``[out]``.
        scale: of the product, as of a low-rank update.

    Returns:
        ``[..., out]`` of the products' dtype.

    Example:
        >>> x, weight = torch.ones(2, 3), torch.ones(1, 3, requires_grad=True)
        >>> linear(x, weight, Arithmetic(), scale=0.5).sum().backward()
        >>> weight.grad
        tensor([[1., 1., 1.]])
    """
    kind = x.device.type
    dtype = torch.get_autocast_dtype(kind) if torch.is_autocast_enabled(kind) else x.dtype
    trained, frozen = (None, weight) if isinstance(weight, FrozenWeight) else (weight, None)
    y: Tensor = _Linear.apply(  # type: ignore[no-untyped-call]  # torch leaves it untyped
        x.reshape(-1, x.shape[-1]), trained, frozen, arithmetic, scale, dtype
    )
    y = y.view(*x.shape[:-1], y.shape[-1])
    return y if bias is None else y + bias.to(y.dtype)


class _Linear(torch.autograd.Function):
    @staticmethod
    def forward(
        ctx: Any,
        x: Tensor,
        weight: Tensor | None,
        frozen: Any,
        arithmetic: Arithmetic,
        scale: float,
        dtype: torch.dtype,
    ) -> Tensor:
        with torch.autocast(x.device.type, enabled=False):
            qx = arithmetic.input(x, 1).to(dtype)
            qw = frozen.forward.to(dtype) if weight is None else arithmetic.weight(weight, 1).to(dtype)
            y = qx @ qw.T
        once = arithmetic.quantizes_once
        ctx.save_for_backward(*((qx, qw) if once else (x, weight)))
        ctx.frozen, ctx.arithmetic, ctx.scale, ctx.dtype = frozen, arithmetic, scale, dtype
        ctx.types = x.dtype, None if weight is None else weight.dtype
        return y if scale == 1 else y * scale

    @staticmethod
    def backward(ctx: Any, gradient: Tensor) -> tuple[Tensor | None, ...]:
        x, weight = ctx.saved_tensors
        arithmetic, dtype = ctx.arithmetic, ctx.dtype
        once = arithmetic.quantizes_once
        dx = dw = None
        with torch.autocast(gradient.device.type, enabled=False):
            if once or ctx.needs_input_grad[0]:
                along_out = arithmetic.gradient(gradient, 1).to(dtype)
            if ctx.needs_input_grad[0]:
                if ctx.frozen is not None:
                    qw = ctx.frozen.backward.to(dtype)
                else:
                    qw = weight if once else arithmetic.weight(weight, 0).to(dtype)
                dx = (along_out @ qw).mul_(ctx.scale).to(ctx.types[0])
            if ctx.needs_input_grad[1]:
                qg = along_out if once else arithmetic.gradient(gradient, 0).to(dtype)
                qx = x if once else arithmetic.input(x, 0).to(dtype)
                dw = (qg.T @ qx).mul_(ctx.scale).to(ctx.types[1])
        return dx, dw, None, None, None, None
