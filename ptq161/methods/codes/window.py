"""Learning the codes of a window of blocks, from its statistics to linears in their best state.

The linears that are still float can absorb the errors of those that are not (:func:`absorb`), before all codes are
learned together (:func:`~ptq161.methods.codes.learn.learn_codes`).
"""

from __future__ import annotations

import copy
import dataclasses
from collections.abc import Callable, Mapping, MutableMapping, Sequence

from torch import Tensor, nn

from ptq161.methods.base import Method, Window
from ptq161.methods.blockwise import replaced_linears
from ptq161.methods.codes.latent import LatentLinear
from ptq161.methods.codes.learn import Learning, learn_codes
from ptq161.methods.layerwise import InputStatistics, collect_statistics, watching_inputs

Start = Callable[[Sequence[str], Mapping[str, nn.Linear], Tensor], dict[str, LatentLinear]]
"""``start(names, linears, hessian)``: linears that share an input, from compensated codes."""


def learn_window(method: Method, window: Window, start: Start) -> dict[str, LatentLinear]:
    """Start the linears of a window from compensated codes, and learn these.

    Args:
        method: has the settings of :class:`Learning`.
        window: with the full-precision chain's outputs.
        start: makes the linears of a group that shares an input.

    Returns:
        the linears in their best state.

    Raises:
        UserError: an input or a loss is not finite.

    Example:
        >>> import ptq161, torch
        >>> from transformers import LlamaConfig, LlamaForCausalLM
        >>> sizes = {"vocab_size": 8, "hidden_size": 64, "intermediate_size": 64, "num_attention_heads": 1}
        >>> model = LlamaForCausalLM(LlamaConfig(num_hidden_layers=1, **sizes))
        >>> epochs = []
        >>> method = ptq161.Waterfill(level="linear", epochs=2, batch_size=1)  # calls it for each window
        >>> tokens = torch.arange(8).view(2, 4)
        >>> on_metric = lambda name, value, **where: epochs.append(where.get("epoch")) if name == "loss" else None
        >>> model = ptq161.quantize(model, tokens, method, on_metric=on_metric)
        >>> epochs
        [0, 1]
    """
    settings = Learning.of(method)
    absorbs = settings.absorb_epochs > 0 and settings.epochs > 0
    watched = dataclasses.replace(window, input_groups=window.input_groups[:1]) if absorbs else window
    with watching_inputs(watched, settings.compute_dtype) as statistics:
        homologous = window.run_all(window.quant_inputs, settings.batch_size, settings.compute_dtype)
    if absorbs:
        layers = absorb(method, window, homologous, statistics, settings, start)
    else:
        layers = start_all(window, start, statistics)
    learn_codes(window, layers, homologous, settings)
    return layers


def start_all(
    window: Window, start: Start, statistics: MutableMapping[str, InputStatistics]
) -> dict[str, LatentLinear]:
    """Start all linears of a window from its own weights and inputs.

    Args:
        window: whose linears.
        start: makes those of a group that shares an input.
        statistics: of the inputs, by the first name of each group; those that were used are removed.

    Example:
        >>> import ptq161, torch
        >>> from transformers import LlamaConfig, LlamaForCausalLM
        >>> sizes = {"vocab_size": 8, "hidden_size": 64, "intermediate_size": 64, "num_attention_heads": 1}
        >>> model = LlamaForCausalLM(LlamaConfig(num_hidden_layers=1, **sizes))
        >>> method = ptq161.Waterfill(level="linear", codes="compensated")  # calls it for each window
        >>> model = ptq161.quantize(model, torch.arange(8).view(2, 4), method)
    """
    layers: dict[str, LatentLinear] = {}
    for group in window.input_groups:
        layers |= start(group, window.linears, statistics.pop(group[0]).hessian)
    return layers


def absorb(
    method: Method,
    window: Window,
    homologous: Tensor,
    statistics: Mapping[str, InputStatistics],
    settings: Learning,
    start: Start,
) -> dict[str, LatentLinear]:
    """Start the linears of a window one input group after the other, each from what those before it have left.

    After each group, codes and factors of the linears that have them are learned together with the weights of those
    that are still float, so that these absorb the errors (as NanoQuant does with the layers of a block). The next group
    starts from its trained weights and from the inputs that it now has. The window's own weights stay as they were.
    ``on_metric`` receives ``absorb_loss`` of each epoch; that of the last group counts where several have one.

    Args:
        method: for the statistics of the inputs.
        window: with the full-precision chain's outputs.
        homologous: ``[n_samples, seq_len, hidden]``, the full-precision window on the quantized chain's inputs.
        statistics: of the first group's inputs.
        settings: how.
        start: makes the linears of a group.

    Returns:
        the linears to learn.

    Raises:
        UserError: an input or a loss is not finite.

    Example:
        >>> import ptq161, torch
        >>> from transformers import LlamaConfig, LlamaForCausalLM
        >>> sizes = {"vocab_size": 8, "hidden_size": 64, "intermediate_size": 64, "num_attention_heads": 1}
        >>> model = LlamaForCausalLM(LlamaConfig(num_hidden_layers=1, **sizes))
        >>> found = []
        >>> method = ptq161.Waterfill(level="linear", epochs=1, absorb_epochs=2, batch_size=1)  # calls it
        >>> tokens = torch.arange(8).view(2, 4)
        >>> on_metric = lambda name, value, **where: found.append(name)
        >>> model = ptq161.quantize(model, tokens, method, on_metric=on_metric)
        >>> found.count("absorb_loss")  # after q, k, v; after o; after gate and up
        6
    """

    def prefixed(name: str, value: float, /, **where: int | str) -> None:
        window.on_metric(f"absorb_{name}", value, **where)

    quiet = dataclasses.replace(window, on_metric=prefixed)
    brief = dataclasses.replace(settings, epochs=settings.absorb_epochs, held_out=0.0)
    floats = {name: copy.deepcopy(linear).requires_grad_(True) for name, linear in window.linears.items()}
    layers: dict[str, LatentLinear] = {}
    groups = window.input_groups
    for i, group in enumerate(groups):
        rest = {name: floats[name] for later in groups[i:] for name in later}
        if i > 0:
            with replaced_linears(window, {**layers, **rest}):
                seen = dataclasses.replace(window, linears=rest, input_groups=[group])
                statistics = collect_statistics(method, seen)
        layers |= start(group, rest, statistics[group[0]].hessian)
        left = {name: linear for name, linear in rest.items() if name not in group}
        if left:
            learn_codes(quiet, layers, homologous, brief, left)
    return layers
