"""Input statistics of a window's linears, accumulated once per shared input in float32."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor, nn

from ptq161.errors import UserError
from ptq161.methods.base import InputStatistics, LayerwiseMethod, Window


def collect_statistics(method: LayerwiseMethod, window: Window) -> dict[str, InputStatistics]:
    """Run the window on the quantized chain's inputs and accumulate what the linears see.

    Returns:
        the statistics by the first name of each input group.

    Raises:
        UserError: an input is NaN or infinite; the sentence names block and linear.
    """
    statistics = {group[0]: _empty(window.linears[group[0]], window.device) for group in window.input_groups}
    hooks = [
        window.linears[name].register_forward_pre_hook(_accumulate_into(name, entry))
        for name, entry in statistics.items()
    ]
    try:
        window.run_all(window.quant_inputs, method.batch_size, method.compute_dtype)
    finally:
        for hook in hooks:
            hook.remove()
    n_sequences = window.quant_inputs.shape[0]
    for entry in statistics.values():
        entry.n_sequences = n_sequences
        entry.hessian *= 2 / n_sequences
        entry.absolute_mean /= entry.n_tokens
    return statistics


def _empty(linear: nn.Linear, device: torch.device) -> InputStatistics:
    n = linear.in_features
    return InputStatistics(
        hessian=torch.zeros(n, n, device=device),
        absolute_mean=torch.zeros(n, device=device),
        absolute_max=torch.zeros(n, device=device),
    )


def _accumulate_into(name: str, entry: InputStatistics) -> Callable[[nn.Module, Any], None]:
    def hook(_: nn.Module, args: Any) -> None:
        x: Tensor = args[0].detach()
        # Autocast would also cast this product; the hessian has to be float32.
        with torch.autocast(x.device.type, enabled=False):
            x = x.flatten(0, -2).float()
            if not bool(torch.isfinite(x).all()):
                raise UserError(f"the input of linear {name} (block.path) is NaN or infinite; check the model's weights.")
            entry.n_tokens += x.shape[0]
            entry.hessian.addmm_(x.T, x)
            absolute = x.abs()
            entry.absolute_mean += absolute.sum(0)
            torch.maximum(entry.absolute_max, absolute.amax(0), out=entry.absolute_max)

    return hook
