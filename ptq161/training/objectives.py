"""The losses of restorative training, as functions of tensors.

The logits of one batch of 8 x 512 tokens over a vocabulary of 49,152 entries take 0.8 GB in float32. So a loss over
logits is computed a few tokens at a time, together with its gradient (:func:`chunked_mean`).
"""

from __future__ import annotations

from collections.abc import Callable, Iterable
from typing import Any

import torch
from torch import Tensor
from torch.nn import functional as F

from ptq161.kernels.divergence import divergence

_CHUNK_TOKENS = 128

LossSum = Callable[..., Tensor]


def cross_entropy_sum(logits: Tensor, labels: Tensor) -> Tensor:
    """Return the sum over ``n`` tokens of -log p(label); ``logits [n, vocabulary]`` in any dtype, ``labels [n]``."""
    return F.cross_entropy(logits.float(), labels, reduction="sum")


def divergence_sum(logits: Tensor, teacher_logits: Tensor) -> Tensor:
    """Return the sum over tokens of KL(teacher || student), in nats; both ``[n, vocabulary]`` in any dtype.

    Differentiable in ``logits``. The gradient is computed beside the value.
    """
    # Function.apply has no annotations.
    total: Tensor = _Divergence.apply(logits, teacher_logits)  # type: ignore[no-untyped-call]  # torch leaves it untyped
    return total


def relative_error(student: Tensor, teacher: Tensor) -> Tensor:
    """Return the mean over tokens of ||student - teacher||^2 / ||teacher||^2, in float32.

    Each token counts alike; a model's few massive activations would otherwise dominate.

    Args:
        student: ``[..., hidden]``.
        teacher: the same shape.
    """
    difference = (student.float() - teacher.float()).square().sum(-1)
    size = teacher.float().square().sum(-1)
    return (difference / size.clamp(min=torch.finfo(torch.float32).tiny)).mean()


def chunked_mean(
    loss_sum: LossSum,
    hidden: Tensor,
    *targets: Tensor,
    parameters: Iterable[Tensor] = (),
    chunk: int = _CHUNK_TOKENS,
) -> Tensor:
    """Return the mean over tokens of a loss that is a sum over tokens, with a few tokens in memory at a time.

    The gradient is computed chunk by chunk in the forward pass, so that no chunk is computed twice and none is kept.

    Args:
        loss_sum: ``loss_sum(hidden, *targets)`` of ``n`` tokens is a scalar, differentiable in ``hidden`` and in
            ``parameters``.
        hidden: ``[tokens, hidden]``.
        targets: each ``[tokens, ...]``.
        parameters: that ``loss_sum`` uses.
        chunk: tokens at a time.
    """
    # Function.apply has no annotations.
    mean: Tensor = _ChunkedMean.apply(loss_sum, targets, chunk, hidden, *parameters)  # type: ignore[no-untyped-call]  # torch leaves it untyped
    return mean


class _Divergence(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, logits: Tensor, teacher_logits: Tensor) -> Tensor:
        total, gradient = divergence(logits, teacher_logits)
        ctx.save_for_backward(gradient)
        return total

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor, None]:
        (gradient,) = ctx.saved_tensors
        return gradient * grad, None


class _ChunkedMean(torch.autograd.Function):
    @staticmethod
    def forward(
        ctx: Any, loss_sum: LossSum, targets: tuple[Tensor, ...], chunk: int, hidden: Tensor, *parameters: Tensor
    ) -> Tensor:
        gradient = torch.empty_like(hidden)
        sums = [torch.zeros_like(parameter) for parameter in parameters]
        total = torch.zeros((), device=hidden.device)
        for start in range(0, hidden.shape[0], chunk):
            part = slice(start, start + chunk)
            leaf = hidden[part].detach().requires_grad_()
            with torch.enable_grad():
                loss = loss_sum(leaf, *(target[part] for target in targets))
            total += loss.detach()
            gradient[part], *found = torch.autograd.grad(loss, (leaf, *parameters))
            for parameter_sum, one in zip(sums, found, strict=True):
                parameter_sum += one
        ctx.save_for_backward(gradient, *sums)
        ctx.n_tokens = hidden.shape[0]
        mean: Tensor = total / ctx.n_tokens
        return mean

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor | None, ...]:
        scale = grad / ctx.n_tokens
        return None, None, None, *(gradient * scale for gradient in ctx.saved_tensors)
