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
    steps: int | None = None,
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
        steps: at most so many in all; None is no limit.

    Raises:
        UserError: a loss is not finite.

    Example:
        >>> block = nn.Sequential(nn.Linear(1, 1, bias=False))
        >>> window = Window(
        ...     first_block=0,
        ...     blocks=[block],
        ...     input_groups=[["0.0"]],
        ...     linears={"0.0": block[0]},
        ...     quant_inputs=torch.ones(1, 1, 1),
        ...     full_outputs=None,
        ...     activations={},
        ...     salient_masks=None,
        ...     run_block=lambda i, hidden: block(hidden),
        ...     generator=lambda stage: torch.Generator(),
        ...     on_metric=lambda name, value, **where: print(name, value, where),
        ...     device=torch.device("cpu"),
        ... )
        >>> layer = nn.Linear(1, 1, bias=False)
        >>> _ = nn.init.ones_(layer.weight)
        >>> optimizer = torch.optim.SGD(layer.parameters(), lr=0.5)
        >>> settings = {"epochs": 2, "batch_size": 1, "compute_dtype": "float32"}
        >>> with replaced_linears(window, {"0.0": layer}):
        ...     optimize(window, optimizer, [torch.full((1, 1, 1), 2.0)], nn.functional.mse_loss, **settings)
        loss 1.0 {'block': 0, 'epoch': 0}
        loss 0.0 {'block': 0, 'epoch': 1}
    """
    taken = 0
    for epoch in range(epochs):
        losses: list[float] = []
        for batch in window.batches(batch_size):
            if taken == steps:
                break
            taken += 1
            with window.autocast(compute_dtype):
                output = window.run(window.to_device(window.quant_inputs[batch]))
            loss = loss_of(output.float(), *(window.to_device(target[batch]) for target in targets))
            losses.append(loss.item())
            if not math.isfinite(losses[-1]):
                where = f"in block {window.first_block}, epoch {epoch}"
                helps = "use method.compute_dtype=float32, or " if compute_dtype == "float16" else ""
                raise UserError(f"the loss is {losses[-1]} {where}: {helps}lower the method's learning rates.")
            optimizer.zero_grad()
            loss.backward()
            optimizer.step()
        if losses:
            window.on_metric("loss", sum(losses) / len(losses), block=window.first_block, epoch=epoch)


@contextmanager
def replaced_linears(window: Window, modules: Mapping[str, nn.Module]) -> Iterator[None]:
    """Replace the window's linears by ``modules`` of the same names; nothing else is trainable inside the context.

    Example:
        >>> from ptq161.methods.base import ignore_metric
        >>> block = nn.Sequential(nn.Linear(4, 4, bias=False))
        >>> window = Window(
        ...     first_block=0,
        ...     blocks=[block],
        ...     input_groups=[["0.0"]],
        ...     linears={"0.0": block[0]},
        ...     quant_inputs=torch.ones(1, 2, 4),
        ...     full_outputs=None,
        ...     activations={},
        ...     salient_masks=None,
        ...     run_block=lambda i, hidden: block(hidden),
        ...     generator=lambda stage: torch.Generator(),
        ...     on_metric=ignore_metric,
        ...     device=torch.device("cpu"),
        ... )
        >>> with replaced_linears(window, {"0.0": nn.Identity()}):
        ...     outputs = window.run(window.quant_inputs)
        >>> torch.equal(outputs, window.quant_inputs), block[0] is window.linears["0.0"]
        (True, True)
    """
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
