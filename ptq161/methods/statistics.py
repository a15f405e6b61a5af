"""Input statistics of a window's linears, accumulated once per shared input in float32."""

from __future__ import annotations

import contextlib
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor, nn

from ptq161.errors import UserError
from ptq161.methods.base import InputStatistics, LayerwiseMethod, Window
from ptq161.methods.products import linear

# A hessian is symmetric: with four strips of rows, each from its diagonal on, 5/8 of the products are left.
HESSIAN_STRIPS = 4


def collect_statistics(method: LayerwiseMethod, window: Window) -> dict[str, InputStatistics]:
    """Run the window on the quantized chain's inputs and accumulate what the linears see.

    Each pass ends where the last group's input has been seen: the rest of the block is not computed.

    Returns:
        the statistics by the first name of each input group.

    Raises:
        UserError: an input is NaN or infinite; the sentence names block and linear.
    """
    statistics = {group[0]: _empty(window.linears[group[0]], window.device) for group in window.input_groups}
    last = window.input_groups[-1][0]
    hooks = [
        window.linears[name].register_forward_pre_hook(_accumulate_into(name, entry, stop=name == last))
        for name, entry in statistics.items()
    ]
    try:
        with torch.no_grad(), window.autocast(method.compute_dtype):
            for batch in window.batches(method.batch_size):
                with contextlib.suppress(_AllSeenError):
                    window.run(window.to_device(window.quant_inputs[batch]))
    finally:
        for hook in hooks:
            hook.remove()
    n_sequences = window.quant_inputs.shape[0]
    for entry in statistics.values():
        entry.n_sequences = n_sequences
        entry.hessian = (entry.hessian.triu() + entry.hessian.triu(1).T) * (2 / n_sequences)
        entry.absolute_mean /= entry.n_tokens
    return statistics


def _empty(linear: nn.Linear, device: torch.device) -> InputStatistics:
    n = linear.in_features
    return InputStatistics(
        hessian=torch.zeros(n, n, device=device),
        absolute_mean=torch.zeros(n, device=device),
        absolute_max=torch.zeros(n, device=device),
    )


class _AllSeenError(Exception):
    """Ends a forward pass once the last input has been seen."""


def _accumulate_into(name: str, entry: InputStatistics, *, stop: bool) -> Callable[[nn.Module, Any], None]:
    def hook(_: nn.Module, args: Any) -> None:
        x: Tensor = args[0].detach()
        # Autocast would also cast this product; the hessian has to be float32.
        with torch.autocast(x.device.type, enabled=False):
            x = x.flatten(0, -2).float()
            absolute = x.abs()
            total = absolute.sum(0)
            if not bool(torch.isfinite(total).all()):
                raise UserError(f"the input of linear {name} is NaN or infinite; check the model's weights.")
            entry.n_tokens += x.shape[0]
            entry.absolute_mean += total
            torch.maximum(entry.absolute_max, absolute.amax(0), out=entry.absolute_max)
            _add_upper_products(entry.hessian, x)
        if stop:
            raise _AllSeenError

    return hook


def _add_upper_products(hessian: Tensor, x: Tensor) -> None:
    """Add the upper triangle of ``X^T X`` for ``x [tokens, in]``, and little below it."""
    channels = x.T.contiguous()
    width = -(-channels.shape[0] // HESSIAN_STRIPS)
    for start in range(0, channels.shape[0], width):
        hessian[start : start + width, start:] += linear(channels[start : start + width], channels[start:])
