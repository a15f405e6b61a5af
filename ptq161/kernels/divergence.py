"""The divergence of two distributions that are given by logits, with its gradient.

On the CPU every logit is read once from memory (``divergence.cpp``), where torch writes and reads some ten tensors of
the size of the logits in float32.
"""

from __future__ import annotations

import torch
from torch import Tensor

from ptq161.kernels import native

_ROWS = 16
"""Tokens whose logits stay in a processor's cache while torch computes a divergence."""


def divergence(logits: Tensor, teacher_logits: Tensor) -> tuple[Tensor, Tensor]:
    """Return the sum over tokens of KL(teacher || student) in nats, and its gradient: the difference of distributions.

    Args:
        logits: ``[n, vocabulary]`` of the student, in any float dtype.
        teacher_logits: the same shape, on the same device.

    Returns:
        a float32 scalar, and the gradient in the shape and dtype of ``logits``.

    Example:
        >>> total, gradient = divergence(torch.zeros(1, 2), torch.tensor([[0.0, 50.0]]))
        >>> round(float(total), 4), gradient
        (0.6931, tensor([[ 0.5000, -0.5000]]))
    """
    logits, teacher_logits = logits.detach().contiguous(), teacher_logits.detach().contiguous()
    same = logits.dtype == teacher_logits.dtype and logits.dtype in (torch.float32, torch.bfloat16)
    if same and native.usable("divergence", logits, teacher_logits):
        totals, gradient = torch.ops.ptq161.divergence(logits, teacher_logits)
        return totals.sum(), gradient
    gradient = torch.empty_like(logits)
    total = torch.zeros((), device=logits.device)
    for start in range(0, len(logits), _ROWS):
        part = slice(start, start + _ROWS)
        log_q, log_p = (x[part].float().log_softmax(-1) for x in (logits, teacher_logits))
        p = log_p.exp()
        total += log_p.sub_(log_q).mul_(p).sum()
        gradient[part] = log_q.exp_().sub_(p)
    return total, gradient
