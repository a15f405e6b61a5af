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
    scheduler: torch.optim.lr_scheduler.LRScheduler | None = None,
    input_drop: float = 0.0,
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
        scheduler: of the optimizer's rates, one step of it after each of the optimizer; None keeps them.
        input_drop: probability with which an element of the input comes from the full-precision chain.

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
    generator = window.generator("input_drop")
    for epoch in range(epochs):
        means = LossMeans(window, compute_dtype, epoch=epoch)
        for batch in window.batches(batch_size):
            if taken == steps:
                break
            taken += 1
            x = mixed_inputs(window, batch, input_drop, generator)
            with window.autocast(compute_dtype):
                output = window.run(x)
            loss = loss_of(output.float(), *(window.to_device(target[batch]) for target in targets))
            means.add(loss=loss.item())
            optimizer.zero_grad()
            loss.backward()
            optimizer.step()
            if scheduler is not None:
                scheduler.step()
        means.emit()


def mixed_inputs(window: Window, batch: slice | Tensor, input_drop: float, generator: torch.Generator) -> Tensor:
    """Return inputs of the quantized chain of which random elements come from the full-precision chain (QDrop).

    Args:
        window: with the full-precision chain's inputs, unless ``input_drop`` is zero.
        batch: which samples.
        input_drop: probability of an element of the full-precision chain; 0 draws no random number.
        generator: on the CPU.

    Returns:
        ``[b, seq_len, hidden]`` float32 on the window's device.

    Example:
        >>> block = nn.Sequential(nn.Linear(1, 1, bias=False))
        >>> window = Window(
        ...     first_block=0,
        ...     blocks=[block],
        ...     input_groups=[["0.0"]],
        ...     linears={"0.0": block[0]},
        ...     quant_inputs=torch.zeros(1, 1, 1),
        ...     full_outputs=None,
        ...     activations={},
        ...     salient_masks=None,
        ...     run_block=lambda i, hidden: block(hidden),
        ...     generator=lambda stage: torch.Generator(),
        ...     on_metric=lambda name, value, **where: None,
        ...     device=torch.device("cpu"),
        ...     full_inputs=torch.ones(1, 1, 1),
        ... )
        >>> [float(mixed_inputs(window, slice(0, 1), drop, torch.Generator())) for drop in (0.0, 1.0)]
        [0.0, 1.0]
    """
    quantized = window.to_device(window.quant_inputs[batch])
    if not input_drop:
        return quantized
    assert window.full_inputs is not None, "the driver brings the full-precision chain (needs_full_chain)"
    dropped = torch.rand(quantized.shape, generator=generator) < input_drop
    return torch.where(dropped.to(window.device), window.to_device(window.full_inputs[batch]), quantized)


def check_input_drop(input_drop: float) -> None:
    """Check the setting of :func:`mixed_inputs`.

    Raises:
        UserError: it is no probability.

    Example:
        >>> check_input_drop(0.5)
        >>> check_input_drop(1.5)
        Traceback (most recent call last):
            ...
        ptq161.errors.UserError: method.input_drop=1.5: use a probability in [0, 1].
    """
    if not 0 <= input_drop <= 1:
        raise UserError(f"method.input_drop={input_drop}: use a probability in [0, 1].")


class LossMeans:
    """Checks the losses of a window's steps, and emits their means over each epoch.

    Args:
        window: whose ``on_metric`` receives them.
        compute_dtype: dtype of matrix products, of which the error of an overflow speaks.
        epoch: the first one.
        steps: after so many the next epoch begins; None leaves that to the caller.

    Example:
        >>> from types import SimpleNamespace
        >>> on_metric = lambda name, value, **where: print(name, value, where)
        >>> means = LossMeans(SimpleNamespace(first_block=3, on_metric=on_metric), "float32", steps=2)
        >>> for loss in (1.0, 2.0, 4.0):
        ...     means.add(loss=loss)
        loss 1.5 {'block': 3, 'epoch': 0}
        >>> means.emit()
        loss 4.0 {'block': 3, 'epoch': 1}
    """

    def __init__(self, window: Window, compute_dtype: str, *, epoch: int = 0, steps: int | None = None) -> None:
        self._window = window
        self._compute_dtype = compute_dtype
        self._epoch = epoch
        self._steps = steps
        self._losses: list[dict[str, float]] = []

    def add(self, *, loss: float, **parts: float) -> None:
        """Add the loss of a step, and parts of it by their names.

        Raises:
            UserError: the loss is not finite.
        """
        if not math.isfinite(loss):
            where = f"in block {self._window.first_block}, epoch {self._epoch}"
            helps = "use method.compute_dtype=float32, or " if self._compute_dtype == "float16" else ""
            raise UserError(f"the loss is {loss} {where}: {helps}lower the method's learning rates.")
        self._losses.append({"loss": loss, **parts})
        if len(self._losses) == self._steps:
            self.emit()

    def emit(self) -> None:
        """Emit the means since the last call, if there are any, and begin the next epoch."""
        for name in self._losses[0] if self._losses else ():
            mean = sum(losses[name] for losses in self._losses) / len(self._losses)
            self._window.on_metric(name, mean, block=self._window.first_block, epoch=self._epoch)
        self._epoch += bool(self._losses)
        self._losses = []


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
