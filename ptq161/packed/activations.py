"""Quantized inputs of a linear: one scale and zero point for the whole tensor, rounded as it arises."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from ptq161.errors import UserError

ACTIVATION_BITS = (4, 8)


def quantized_activations(x: Tensor, scale: Tensor, zero_point: Tensor, bits: int) -> Tensor:
    """Round activations to ``scale * (code - zero_point)`` with codes in ``[0, 2**bits)``.

    Rounding passes gradients straight through, none beyond the ends; that of the scale is the one of learned step sizes
    (LSQ, Esser et al. 2020, arXiv 1902.08153, Eq. 3).

    Args:
        x: any shape, any float dtype.
        scale: ``[1]`` float32, positive.
        zero_point: ``[1]``, a whole number in ``[0, 2**bits)``.
        bits: of a code.

    Returns:
        shape and dtype of ``x``; the arithmetic is float32.

    Example:
        >>> x, scale = torch.tensor([-9.0, 0.4, 0.6], requires_grad=True), torch.ones(1, requires_grad=True)
        >>> y = quantized_activations(x, scale, torch.tensor([1]), bits=2)
        >>> y.sum().backward()
        >>> y.tolist(), x.grad.tolist()
        ([-1.0, 0.0, 1.0], [0.0, 1.0, 1.0])
        >>> round(float(scale.grad), 4)  # -1 - 0.4 + 0.4
        -1.0
    """
    y: Tensor = _Quantized.apply(x, scale, zero_point, bits)  # type: ignore[no-untyped-call]  # torch leaves it untyped
    return y


class _Quantized(torch.autograd.Function):
    """Gradients are computed in the order of autograd's own, since a last bit decides which way a value is rounded."""

    @staticmethod
    def forward(ctx: Any, x: Tensor, scale: Tensor, zero_point: Tensor, bits: int) -> Tensor:
        steps = x.float() / scale
        codes = steps.round() + zero_point
        clamped = codes.clamp(0, 2**bits - 1)
        inside = clamped == codes
        clamped -= zero_point
        learned = (steps, clamped) if ctx.needs_input_grad[1] else ()
        ctx.save_for_backward(scale, inside, *learned)
        return (clamped * scale).to(x.dtype)

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor | None, ...]:
        scale, inside, *learned = ctx.saved_tensors
        full = grad.float()
        passed = full * scale * inside
        of_scale = None
        if learned:
            steps, clamped = learned
            of_scale = ((full * clamped).sum() - (passed * (steps / scale)).sum()).reshape(1)
        return (passed / scale).to(grad.dtype), of_scale, None, None


def check_activation_bits(bits: int | None) -> None:
    """Check the bits of a linear's inputs.

    Raises:
        UserError: they are none of ``ACTIVATION_BITS``.

    Example:
        >>> check_activation_bits(None)
        >>> check_activation_bits(3)
        Traceback (most recent call last):
            ...
        ptq161.errors.UserError: method.activation_bits=3: use 4 or 8, or null for activations as they are.
    """
    if bits is not None and bits not in ACTIVATION_BITS:
        choices = " or ".join(map(str, ACTIVATION_BITS))
        raise UserError(f"method.activation_bits={bits}: use {choices}, or null for activations as they are.")
