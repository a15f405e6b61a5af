"""Learned rounding of weights (AdaRound, Nagel et al. 2020, arXiv 2004.10568), as ``AdaRoundFakeQuantize`` has it.

A weight is ``(clamp(floor(w / scale) + h + zero_point, 0, 2^bits - 1) - zero_point) * scale`` with a learned ``h`` in
[0, 1] per weight: the rectified sigmoid of ``alpha`` (Eq. 23). At the end ``h`` is whether ``alpha`` is at least zero.
"""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import torch
from torch import Tensor

_STRETCH = 1.2
_BELOW = 0.1
"""The sigmoid is stretched to (-0.1, 1.1) and cut off at 0 and 1."""
_PIECE = 2**17
"""Values that are worked on at a time."""


def initial_alpha(weight: Tensor, scale: Tensor, zero_point: Tensor, bits: int) -> Tensor:
    """Return the ``alpha`` at which ``h`` is the part that rounding down leaves: the soft weight is the clipped one.

    Args:
        weight: ``[out, ...]``.
        scale: ``[out]``, ``[1]``, or of as many dimensions as ``weight``.
        zero_point: of the same shape.
        bits: of the grid.

    Returns:
        the shape of ``weight``, float32.

    Example:
        >>> scale, zero_point = torch.tensor([1.0]), torch.tensor([1])
        >>> alpha = initial_alpha(torch.tensor([[0.25, 9.0]]), scale, zero_point, bits=2)
        >>> soft_weight(torch.tensor([[0.25, 9.0]]), alpha, scale, zero_point, bits=2).tolist()
        [[0.25, 2.0]]
    """
    steps = weight.float() / _divisor(_aligned(scale, weight))
    return -torch.log(_STRETCH / (steps - steps.floor() + _BELOW) - 1)


def rectified_sigmoid(alpha: Tensor) -> Tensor:
    """Return ``h = clamp(1.2 sigmoid(alpha) - 0.1, 0, 1)``.

    Example:
        >>> rectified_sigmoid(torch.tensor([-5.0, 0.0, 5.0]))
        tensor([0.0000, 0.5000, 1.0000])
    """
    return (_STRETCH * torch.sigmoid(alpha) - _BELOW).clamp(0, 1)


def soft_weight(weight: Tensor, alpha: Tensor, scale: Tensor, zero_point: Tensor, bits: int) -> Tensor:
    """Return the weight with soft rounding, differentiable in ``alpha``.

    Args:
        weight: ``[out, ...]``.
        alpha: the same shape.
        scale: ``[out]``, ``[1]``, or of as many dimensions as ``weight``.
        zero_point: of the same shape.
        bits: of the grid.

    Returns:
        the shape of ``weight``, float32.

    Example:
        >>> weight, scale, zero_point = torch.tensor([[0.25]]), torch.tensor([1.0]), torch.tensor([1])
        >>> alpha = torch.zeros(1, 1, requires_grad=True)
        >>> soft = soft_weight(weight, alpha, scale, zero_point, bits=2)
        >>> soft.sum().backward()
        >>> soft.tolist(), alpha.grad.round(decimals=3).tolist()  # 1.2 / 4
        ([[0.5]], [[0.30000001192092896]])
    """
    scale = _aligned(scale, weight)
    return soft_values(alpha, lower_steps(weight, scale), scale, _aligned(zero_point, weight), bits)


def hard_weight(weight: Tensor, alpha: Tensor, scale: Tensor, zero_point: Tensor, bits: int) -> Tensor:
    """Return the weight rounded up where ``alpha`` is at least zero, and down elsewhere.

    Arguments and result are those of :func:`soft_weight`.

    Example:
        >>> weight, scale, zero_point = torch.tensor([[0.25, 0.25]]), torch.tensor([1.0]), torch.tensor([1])
        >>> hard_weight(weight, torch.tensor([[0.0, -0.1]]), scale, zero_point, bits=2)
        tensor([[1., 0.]])
    """
    scale, zero_point = _aligned(scale, weight), _aligned(zero_point, weight)
    return (hard_codes(alpha, lower_steps(weight, scale), zero_point, bits) - zero_point) * scale


def round_loss(alpha: Tensor, beta: float) -> Tensor:
    """Return how far rounding is from being decided: the sum of ``1 - |2 h - 1|^beta`` (AdaRound, Eq. 24).

    Args:
        alpha: any shape.
        beta: at least 1; a large one acts only near the ends, a small one everywhere.

    Example:
        >>> float(round_loss(torch.tensor([0.0, 5.0]), beta=2.0))  # undecided, decided
        1.0
    """
    loss: Tensor = _RoundLoss.apply(alpha, beta)  # type: ignore[no-untyped-call]  # torch leaves it untyped
    return loss


def temperature(count: int, steps: int, warmup: float = 0.2, start: float = 20.0, end: float = 2.0) -> float:
    """Return ``beta`` of a step: constant during the warm-up, then falling linearly (``LinearTempDecay``).

    Args:
        count: of the step, from 1.
        steps: in all.
        warmup: share of the steps.
        start: value until its end.
        end: value at the last step.

    Example:
        >>> [temperature(count, 10) for count in (1, 2, 6, 10)]
        [20.0, 20.0, 11.0, 2.0]
    """
    begin = warmup * steps
    if count < begin:
        return start
    if count >= steps:
        return end
    return end + (start - end) * (1 - (count - begin) / (steps - begin))


def lower_steps(weight: Tensor, scale: Tensor) -> Tensor:
    """Return ``floor(w / scale)``, which may lie beyond the grid: the shape of ``weight``, float32.

    Example:
        >>> lower_steps(torch.tensor([[0.25, -9.0]]), torch.tensor([1.0]))
        tensor([[ 0., -9.]])
    """
    return torch.floor(weight.float() / _divisor(_aligned(scale, weight)))


def hard_codes(alpha: Tensor, lower: Tensor, zero_point: Tensor, bits: int) -> Tensor:
    """Return the codes at the end of the learning: float32 whole numbers on the grid.

    Arguments are those of :func:`soft_values`.

    Example:
        >>> one = torch.ones(1)
        >>> hard_codes(torch.tensor([0.5, -0.5, 0.5]), torch.tensor([0.0, 0.0, 2.0]), zero_point=one, bits=2)
        tensor([2., 1., 3.])
    """
    return (lower + (alpha >= 0) + zero_point).clamp(0, 2**bits - 1)


def soft_values(
    alpha: Tensor,
    lower: Tensor,
    scale: Tensor,
    zero_point: Tensor,
    bits: int,
    dtype: torch.dtype = torch.float32,
) -> Tensor:
    """Return the soft weight of steps: :func:`soft_weight` where :func:`lower_steps` are known.

    Args:
        alpha: ``[out, ...]`` float32.
        lower: the same shape.
        scale: broadcasts to it.
        zero_point: the same.
        bits: of the grid.
        dtype: of the weight.

    Example:
        >>> one = torch.ones(1)
        >>> soft_values(torch.zeros(2), torch.tensor([0.0, 2.0]), scale=one, zero_point=one, bits=2)
        tensor([0.5000, 2.0000])
    """
    values: Tensor = _SoftValues.apply(  # type: ignore[no-untyped-call]  # torch leaves it untyped
        alpha, lower, scale, zero_point, bits, dtype
    )
    return values


class _SoftValues(torch.autograd.Function):
    """Few passes over the weight, in the order of autograd's own."""

    @staticmethod
    def forward(
        ctx: Any, alpha: Tensor, lower: Tensor, scale: Tensor, zero_point: Tensor, bits: int, dtype: torch.dtype
    ) -> Tensor:
        values, slope = torch.empty_like(alpha, dtype=dtype), torch.empty_like(alpha)
        for rows in _pieces(alpha):
            sigmoid, h, outside = _rectified(alpha[rows])
            codes = h.add_(lower[rows]).add_(_rows(zero_point, rows))
            clamped = codes.clamp(0, 2**bits - 1)
            slope[rows] = sigmoid.masked_fill_(outside.logical_or_(clamped != codes), 0.0)
            values[rows] = clamped.sub_(_rows(zero_point, rows)).mul_(_rows(scale, rows))
        ctx.save_for_backward(slope, scale)
        return values

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor | None, ...]:
        slope, scale = ctx.saved_tensors
        of_alpha = torch.empty_like(slope)
        for rows in _pieces(slope):
            of_alpha[rows] = _through_sigmoid(grad[rows] * _rows(scale, rows), slope[rows])
        return of_alpha, None, None, None, None, None


class _RoundLoss(torch.autograd.Function):
    """Takes one power for the loss and its gradient."""

    @staticmethod
    def forward(ctx: Any, alpha: Tensor, beta: float) -> Tensor:
        slope, power = torch.empty_like(alpha), torch.empty_like(alpha)
        loss = alpha.new_zeros(())
        for rows in _pieces(alpha):
            sigmoid, h, outside = _rectified(alpha[rows])
            centered = h.sub_(0.5)
            distance = centered.abs().mul_(2)
            part = torch.pow(distance, beta - 1, out=power[rows])
            loss += distance.mul_(part).neg_().add_(1).sum()
            part.copysign_(centered)
            slope[rows] = sigmoid.masked_fill_(outside, 0.0)
        ctx.beta = beta
        ctx.save_for_backward(slope, power)
        return loss

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor | None, ...]:
        slope, power = ctx.saved_tensors
        of_alpha = torch.empty_like(slope)
        for rows in _pieces(slope):
            of_h = (power[rows] * ctx.beta).mul_(-grad).mul_(2)
            of_alpha[rows] = _through_sigmoid(of_h, slope[rows])
        return of_alpha, None


def _pieces(weight: Tensor) -> Iterator[slice]:
    """Yield slices of rows whose values stay in the processor's cache from one pass to the next."""
    step = max(1, _PIECE * len(weight) // max(1, weight.numel()))
    for start in range(0, len(weight), step):
        yield slice(start, start + step)


def _rows(parameter: Tensor, rows: slice) -> Tensor:
    """Return the part of a parameter that broadcasts to some rows of a weight."""
    return parameter[rows] if parameter.ndim and len(parameter) > 1 else parameter


def _rectified(alpha: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """Return the sigmoid, ``h``, and where that is cut off."""
    sigmoid = torch.sigmoid(alpha)
    stretched = (_STRETCH * sigmoid).sub_(_BELOW)
    h = stretched.clamp(0, 1)
    return sigmoid, h, h != stretched


def _through_sigmoid(grad: Tensor, sigmoid: Tensor) -> Tensor:
    """Pass a gradient of ``h`` on to ``alpha``, in place; the sigmoid is zero where there is none."""
    return grad.mul_(_STRETCH).mul_(1 - sigmoid).mul_(sigmoid)


def _aligned(parameter: Tensor, weight: Tensor) -> Tensor:
    """View a parameter of each row so that it broadcasts to the weight."""
    if parameter.ndim == weight.ndim:
        return parameter.float()
    return parameter.float().reshape(-1, *[1] * (weight.ndim - 1))


def _divisor(scale: Tensor) -> Tensor:
    """Return a scale to divide by: one that underflows to zero stands for zeros, whatever the codes."""
    return torch.where(scale > 0, scale, 1.0)
