"""The reconstruction of a block: rounding and activation scales learn together (``solver/recon.py``)."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable, Sequence

import torch
from torch import Tensor

from ptq161.methods.qdrop.layers import ActivationQuantizer, RoundedLinear
from ptq161.methods.qdrop.rounding import round_loss, temperature

OnStep = Callable[[float, float], None]
"""``on_step(reconstruction, rounding)`` receives both terms of the loss of a step before the step is taken."""


def reconstruct(
    run: Callable[[Tensor], Tensor],
    layers: Sequence[RoundedLinear],
    quantizers: Sequence[ActivationQuantizer],
    batches: Iterable[tuple[Tensor, Tensor]],
    *,
    steps: int,
    alpha_lr: float,
    scale_lrs: Sequence[float],
    rounding_weight: float,
    warmup: float,
    on_step: OnStep,
) -> None:
    """Learn to round the weights of a block so that its output is that of the full-precision block.

    The loss is the squared error, summed over the hidden dimension and averaged over all others, and after the warm-up
    ``rounding_weight`` times :func:`~ptq161.methods.qdrop.rounding.round_loss` of all weights.

    Args:
        run: the block with ``layers`` and ``quantizers`` in place: input to output ``[..., hidden]``.
        layers: whose ``alpha`` learns, with Adam.
        quantizers: whose scale learns, with Adam and a rate that falls to zero along a cosine.
        batches: input and target of each step.
        steps: in all.
        alpha_lr: learning rate of the rounding.
        scale_lrs: learning rate of each quantizer's scale at first.
        rounding_weight: of the rounding loss.
        warmup: share of the steps without it.
        on_step: receives the terms of the loss.

    Example:
        >>> linear = torch.nn.Linear(1, 1, bias=False)
        >>> _ = torch.nn.init.constant_(linear.weight, 0.4)
        >>> layer = RoundedLinear(linear, torch.ones(1, 1), torch.ones(1, 1), bits=2)
        >>> one, found = torch.ones(1, 1), []
        >>> reconstruct(
        ...     layer, [layer], [], [(one, one)] * 100, steps=100, alpha_lr=0.1, scale_lrs=[], rounding_weight=0.01,
        ...     warmup=0.2, on_step=lambda *terms: found.append(terms)
        ... )
        >>> layer.pack().dequantize().tolist(), found[0][1]  # rounded up, since the target is one
        ([[1.0]], 0.0)
    """
    groups = [{"params": [layer.alpha for layer in layers], "lr": alpha_lr}]
    groups += [{"params": [part.scale], "lr": lr} for part, lr in zip(quantizers, scale_lrs, strict=True)]
    optimizer = torch.optim.Adam(groups, fused=True)
    for count, (x, target) in zip(range(1, steps + 1), batches, strict=False):
        for quantizer in quantizers:
            quantizer.begin_step()
        for group, lr in zip(optimizer.param_groups[1:], scale_lrs, strict=True):
            group["lr"] = lr * (1 + math.cos(math.pi * (count - 1) / steps)) / 2
        reconstruction = (run(x).float() - target).square().sum(-1).mean()
        rounding = reconstruction.new_zeros(())
        if count >= warmup * steps:
            beta = temperature(count, steps, warmup)
            rounding = rounding_weight * torch.stack([round_loss(layer.alpha, beta) for layer in layers]).sum()
        on_step(float(reconstruction.detach()), float(rounding.detach()))
        optimizer.zero_grad()
        (reconstruction + rounding).backward()
        optimizer.step()
