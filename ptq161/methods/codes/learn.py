"""Learning codes block by block: latent weights and factors against the full-precision block's output.

1. Each linear starts from codes with error compensation (:func:`~ptq161.methods.codes.grid.compensated_codes`).
2. Latents and factors learn together, with AdamW and a one-cycle schedule, on batches in random order.
3. The loss compares the block's output with that of the full-precision block on both chains' inputs, as PTQ1.61 does
   (Section 3.3), but relatively: all tokens together, which the few massive activations of a model decide, and each
   token alike. The first alone sees little else, the second alone may lose them.
4. The state with the least loss on held-out windows is kept, that of the start included.

:mod:`ptq161.methods.codes.window` does it for a window of blocks.
"""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Iterable, Mapping, MutableMapping
from typing import Any, Self

import torch
from torch import Tensor, nn

from ptq161.checks import check_at_least
from ptq161.errors import UserError
from ptq161.kernels.token_sums import token_sums
from ptq161.methods.base import Method, Window, check_rate
from ptq161.methods.blockwise import check_input_drop, mixed_inputs, replaced_linears
from ptq161.methods.codes.latent import LatentLinear

CODES = ("rounded", "compensated", "learned")
"""How codes are chosen: the nearest ones, those of error compensation, or learned from these."""
BETAS = (0.9, 0.95)
_SHARP = 0.75
"""Share of the steps after which softened codes are whole numbers."""
_HOMOLOGOUS = 0.5
"""Weight of the comparison with the full-precision block on the quantized chain's input."""


@dataclasses.dataclass(frozen=True)
class Learning:
    """How codes are learned.

    Attributes:
        epochs: passes over the windows that are not held out.
        batch_size: windows per step.
        code_lr: learning rate of the latents, in cells of the grid.
        factor_lr: learning rate of the factors, relative to them.
        held_out: share of the windows on which the best state is chosen; at least one window, if above zero.
        softness: share of the way to their latents at which codes are when learning starts; it falls to zero over three
            quarters of the steps (softened codes, as in CAT-Q). 0 learns whole numbers from the first step on.
        absorb_epochs: passes in which the linears that are still float are trained, after each input group.
        absorb_lr: learning rate of their weights, in units of their root mean square.
        input_drop: probability with which an element of the input comes from the full-precision chain.
        compute_dtype: of matrix products.

    Example:
        >>> import ptq161
        >>> Learning.of(ptq161.Waterfill(epochs=3)).epochs
        3
    """

    epochs: int
    batch_size: int
    code_lr: float
    factor_lr: float
    held_out: float
    softness: float
    absorb_epochs: int
    absorb_lr: float
    input_drop: float
    compute_dtype: str

    def __post_init__(self) -> None:
        """Reject rates that are negative or not finite, and a share that is out of range."""
        check_rate("method.code_lr", self.code_lr)
        check_rate("method.factor_lr", self.factor_lr)
        check_rate("method.absorb_lr", self.absorb_lr)
        check_input_drop(self.input_drop)
        check_at_least("method.absorb_epochs", self.absorb_epochs, 0)
        if not 0 <= self.held_out <= 0.5:
            raise UserError(f"method.held_out={self.held_out}: use a share of the windows from 0 to 0.5.")
        if not 0 <= self.softness <= 1:
            raise UserError(f"method.softness={self.softness}: use a share in [0, 1].")

    @classmethod
    def of(cls, method: Method) -> Self:
        """Read the settings off a method that has them all.

        Raises:
            UserError: one is out of range.
        """
        return cls(**{field.name: getattr(method, field.name) for field in dataclasses.fields(cls)})


def relative_errors(output: Tensor, target: Tensor) -> Tensor:
    """Return the sum of two relative squared errors: over all tokens together, and the mean over tokens.

    Args:
        output: ``[..., hidden]``.
        target: the same shape.

    Example:
        >>> target = torch.tensor([[3.0, 4.0], [0.0, 1.0]])  # squares of 25 and 1
        >>> error = relative_errors(target + torch.tensor([[0.0, 0.0], [1.0, 0.0]]), target)  # 1 / 26 + 1 / 2
        >>> round(float(error), 4)
        0.5385
    """
    error: Tensor = _relative_errors(output, target)[0]
    return error


def block_error(output: Tensor, full: Tensor, homologous: Tensor) -> Tensor:
    """Return the loss of a block's output ``[b, seq, hidden]`` against the full-precision block on both chains' inputs.

    Example:
        >>> target = torch.ones(1, 2, 4)
        >>> float(block_error(2 * target, target, target))
        3.0
    """
    of_full, of_homologous = _relative_errors(output, full, homologous)
    error: Tensor = of_full + _HOMOLOGOUS * of_homologous
    return error


def _relative_errors(output: Tensor, *targets: Tensor) -> Tensor:
    tiny = torch.finfo(torch.float32).tiny
    sums = token_sums(output, targets)
    together = sums.errors.sum(1) / sums.target_sizes.sum(1).clamp(min=tiny)
    of_each_token = sums.errors / sums.target_sizes.clamp(min=tiny)
    return together + of_each_token.mean(1)


def held_out_batches(share: float, n: int, size: int) -> int:
    """Return how many batches of ``size`` are held out of ``n`` windows: a share of them, one at least, never all.

    Example:
        >>> held_out_batches(0.125, 64, 4), held_out_batches(0.125, 8, 4), held_out_batches(0.0, 64, 4)
        (2, 1, 0)
    """
    return min(n // size - 1, max(1, round(share * n / size))) if share > 0 else 0


def learn_codes(
    window: Window,
    layers: Mapping[str, LatentLinear],
    homologous: Tensor,
    settings: Learning,
    floats: Mapping[str, nn.Linear] | None = None,
) -> None:
    """Learn the codes of a window's linears, which end in their best state.

    ``on_metric`` receives ``loss``, the mean over each epoch, and ``held_out_loss`` at its end; epoch -1 is the start.

    Args:
        window: with the full-precision chain's outputs.
        layers: for each linear, from its compensated codes.
        homologous: ``[n_samples, seq_len, hidden]``, the full-precision window on the quantized chain's inputs.
        settings: how.
        floats: linears whose weights are learned as well, in place.

    Raises:
        UserError: a loss is not finite.

    Example:
        >>> import ptq161
        >>> from transformers import LlamaConfig, LlamaForCausalLM
        >>> sizes = {"vocab_size": 8, "hidden_size": 64, "intermediate_size": 64, "num_attention_heads": 1}
        >>> model = LlamaForCausalLM(LlamaConfig(num_hidden_layers=1, **sizes))
        >>> losses = []
        >>> method = ptq161.Waterfill(level="linear", epochs=2, batch_size=1, held_out=0.5)  # calls it
        >>> on_metric = lambda name, value, **where: losses.append(value) if name == "held_out_loss" else None
        >>> model = ptq161.quantize(model, torch.arange(16).remainder(8).view(4, 4), method, on_metric=on_metric)
        >>> len(losses)  # at the start and after each epoch
        3
    """
    full = window.full_outputs
    assert full is not None, "the driver brings the full-precision chain (needs_full_chain)"
    generator, dropping = window.generator("codes"), window.generator("input_drop")
    n = window.quant_inputs.shape[0]
    size = min(settings.batch_size, n)
    # Whole batches only: the block's arguments (masks, positions) are those of a whole batch.
    n_held = size * held_out_batches(settings.held_out, n, size)
    shuffled = torch.randperm(n, generator=generator)
    held, training = shuffled[:n_held], shuffled[n_held:]
    floats = floats or {}
    optimizer = _optimizer(layers, settings, floats)
    steps = settings.epochs * (len(training) // size)
    schedule = torch.optim.lr_scheduler.OneCycleLR(
        optimizer, [group["lr"] for group in optimizer.param_groups], total_steps=max(1, steps), cycle_momentum=False
    )

    def loss_of(batch: Tensor, input_drop: float = 0.0) -> Tensor:
        x = mixed_inputs(window, batch, input_drop, dropping)
        with window.autocast(settings.compute_dtype):
            output = window.run(x)
        return block_error(output.float(), window.to_device(full[batch]), window.to_device(homologous[batch]))

    learned = [parameter for layer in layers.values() for parameter in layer.parameters()]

    def state() -> list[Tensor]:
        return [parameter.detach().clone() for parameter in learned]

    def soften(share: float) -> None:
        for layer in layers.values():
            layer.softness = settings.softness * share

    def held_out_loss(epoch: int) -> float:
        soften(0.0)  # what is stored are whole numbers
        with torch.no_grad():
            losses = [float(loss_of(batch)) * len(batch) for batch in held.split(size)]
        loss = sum(losses) / len(held)
        window.on_metric("held_out_loss", loss, block=window.first_block, epoch=epoch)
        return loss

    with replaced_linears(window, {**layers, **floats}):
        best, least = (state(), held_out_loss(-1)) if n_held else ([], math.inf)
        step = 0
        for epoch in range(settings.epochs):
            losses = []
            order = training[torch.randperm(len(training), generator=generator)]
            for batch in order[: len(order) // size * size].split(size):
                soften(max(0.0, 1 - step / (_SHARP * steps)))
                loss = loss_of(batch, settings.input_drop)
                losses.append(loss.item())
                if not math.isfinite(losses[-1]):
                    where = f"in block {window.first_block}, epoch {epoch}"
                    raise UserError(f"the loss is {losses[-1]} {where}: lower method.code_lr or method.factor_lr.")
                optimizer.zero_grad()
                loss.backward()
                if step == 0:
                    damp(optimizer.param_groups[: len(layers)])
                step += 1
                optimizer.step()
                schedule.step()
            window.on_metric("loss", sum(losses) / len(losses), block=window.first_block, epoch=epoch)
            if not n_held:
                continue
            found = held_out_loss(epoch)
            if found < least:
                best, least = state(), found
    if n_held:
        with torch.no_grad():
            for parameter, value in zip(learned, best, strict=True):
                parameter.copy_(value)


def _optimizer(
    layers: Mapping[str, LatentLinear], settings: Learning, floats: Mapping[str, nn.Linear]
) -> torch.optim.Optimizer:
    groups: list[dict[str, Any]] = [{"params": [layer.latent], "lr": settings.code_lr} for layer in layers.values()]
    factors = [p for layer in layers.values() for p in layer.parameters() if p is not layer.latent]
    groups.append({"params": factors, "lr": settings.factor_lr})
    for linear in floats.values():
        size = float(linear.weight.detach().square().mean().sqrt())
        groups.append({"params": [linear.weight], "lr": settings.absorb_lr * size})
    return torch.optim.AdamW(groups, betas=BETAS, weight_decay=0.0, fused=True)


def damp(groups: Iterable[MutableMapping[str, Any]]) -> None:
    """Let Adam move a latent less where its gradient is small beside that of its linear's others.

    Adam alone moves every latent by the same amount, in a direction that is noise where the gradient is small: the
    codes near the edge of their cell, which the compensation chose against rounding, would flip all at once.

    Args:
        groups: of an Adam optimizer, each of a single latent that has its first gradient.

    Example:
        >>> latent = torch.nn.Parameter(torch.zeros(2))
        >>> latent.grad = torch.tensor([3.0, 4.0])
        >>> optimizer = torch.optim.Adam([latent])
        >>> damp(optimizer.param_groups)
        >>> round(optimizer.param_groups[0]["eps"], 3)  # the root of (9 + 16) / 2
        3.536
    """
    for group in groups:
        (latent,) = group["params"]
        if latent.grad is not None:  # no token of the batch may have chosen an expert
            group["eps"] = max(group["eps"], float(latent.grad.square().mean().sqrt()))
