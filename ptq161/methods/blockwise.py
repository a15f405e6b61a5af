"""Block-wise optimization: train replacements of a window's linears against given outputs."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager

import torch
from torch import Tensor, nn

from ptq161.errors import UserError
from ptq161.methods.base import Window


def optimize(
    window: Window,
    optimizer: torch.optim.Optimizer,
    targets: Sequence[Tensor],
    loss_of: Callable[..., Tensor],
    *,
    epochs: int,
    batch_size: int,
    compute_dtype: str,
) -> None:
    """Run the window on the quantized chain's inputs, epoch by epoch, and step on the loss of each batch.

    ``on_metric`` receives ``loss``, the mean over each epoch.

    Args:
        window: with the trainable replacements in place (:func:`replaced_linears`).
        optimizer: over their parameters.
        targets: each ``[n_samples, seq_len, hidden]`` in host memory.
        loss_of: ``loss_of(output, *targets)`` returns a scalar for a batch ``[b, seq_len, hidden]`` of each.
        epochs: passes over the samples, in their order.
        batch_size: samples per step.
        compute_dtype: dtype of matrix products; the loss is computed outside autocast.

    Raises:
        UserError: a loss is not finite.
    """
    for epoch in range(epochs):
        losses = []
        for batch in window.batches(batch_size):
            with window.autocast(compute_dtype):
                output = window.run(window.to_device(window.quant_inputs[batch]))
            loss = loss_of(output.float(), *(window.to_device(target[batch]) for target in targets))
            losses.append(loss.item())
            if not math.isfinite(losses[-1]):
                where = f"in block {window.first_block}, epoch {epoch}"
                raise UserError(f"the loss is {losses[-1]} {where}: lower the method's learning rates.")
            optimizer.zero_grad()
            loss.backward()
            optimizer.step()
        window.on_metric("loss", sum(losses) / len(losses), block=window.first_block, epoch=epoch)


@contextmanager
def replaced_linears(window: Window, modules: Mapping[str, nn.Module]) -> Iterator[None]:
    """Replace the window's linears by ``modules`` of the same names; nothing else is trainable inside the context."""
    trainable = [p for block in window.blocks for p in block.parameters() if p.requires_grad]
    for parameter in trainable:
        parameter.requires_grad_(False)
    try:
        for name, module in modules.items():
            window.replace(name, module)
        yield
    finally:
        for name in modules:
            window.replace(name, window.linears[name])
        for parameter in trainable:
            parameter.requires_grad_(True)
