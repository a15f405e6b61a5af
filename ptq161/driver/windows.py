"""One window of decoder blocks: opened for a method, measured, and closed with the packed linears in place."""

from __future__ import annotations

import copy
import logging
from collections.abc import Callable, Iterable, Iterator, Mapping
from contextlib import ExitStack, contextmanager
from functools import partial

import torch
from torch import Tensor, nn
from transformers import PreTrainedModel

from ptq161.driver.capture import BlockArguments
from ptq161.methods.base import ActivationScale, Method, OnMetric, Window, block_and_path
from ptq161.methods.rescaling import Rescaling, exponent_of
from ptq161.models.architectures import decoder_blocks, input_groups
from ptq161.models.checks import HOOKS
from ptq161.models.experts import Experts
from ptq161.numerics import COMPUTE_DTYPES
from ptq161.packed.lenders import link_lenders
from ptq161.packed.linear import PackedLinear, dense_cache
from ptq161.packed.weight import PackedWeight
from ptq161.seeding import stage_generator

log = logging.getLogger(__name__)


def open_window(
    model: PreTrainedModel,
    start: int,
    n_blocks: int,
    method: Method,
    arguments: list[BlockArguments],
    quant_inputs: Tensor,
    *,
    masks: Mapping[str, Tensor] | None,
    plan: Mapping[str, Tensor] | None = None,
    seed: int,
    device: torch.device,
    on_metric: OnMetric,
) -> Window:
    """Copy the blocks of a window to the device, in float32, which holds half-precision checkpoints exactly."""
    blocks = list(decoder_blocks(model))[start : start + n_blocks]
    replicas = [_replica(block).to(device, torch.float32) for block in blocks]
    groups = [
        [f"{start + i}.{path}" for path in group]
        for i, block in enumerate(blocks)
        for group in input_groups(model, block)
    ]
    names = [name for group in groups for name in group]
    calls = [arguments[start + i].to(device) for i in range(len(blocks))]
    window = Window(
        first_block=start,
        blocks=replicas,
        input_groups=groups,
        linears={name: _linear(replicas, start, name) for name in names},
        quant_inputs=quant_inputs,
        full_outputs=None,
        activations={},
        salient_masks=None if masks is None else {name: masks[name].to(device) for name in names},
        plan=None if plan is None else {name: plan[name].to(device) for name in names},
        run_block=lambda i, hidden: calls[i].call(replicas[i], hidden),
        generator=lambda stage: stage_generator(seed, stage, start),
        on_metric=on_metric,
        device=device,
    )
    _rescale(window, method)
    return window


def _replica(block: nn.Module) -> nn.Module:
    """Copy a block; functions that hang on it, and what they hold, are the same ones."""
    hooks = [hook for module in block.modules() for kind in HOOKS for hook in getattr(module, kind).values()]
    return copy.deepcopy(block, {id(hook): hook for hook in hooks})


def _linear(blocks: list[nn.Module], start: int, name: str) -> nn.Linear:
    block, path = block_and_path(name)
    module = blocks[block - start].get_submodule(path)
    assert isinstance(module, nn.Linear)
    return module


def _rescale(window: Window, method: Method) -> None:
    """Take powers of two out of linears whose weights are of unusual size, and then out of the window's inputs."""
    weights = {name: exponent_of(linear.weight) for name, linear in window.linears.items()}
    if not any(weights.values()):
        return
    inputs: dict[str, int] = {}

    def look(leader: str, x: Tensor) -> None:
        inputs[leader] = exponent_of(x)

    with looking(window, look):
        _run_first_batch(window, method)
    for group in window.input_groups:
        for name in group:
            rescaling = Rescaling(weights[name], inputs.get(group[0], 0))
            if rescaling.weight or rescaling.inputs:
                rescaling.take_out_of(window.linears[name])
                window.rescalings[name] = rescaling
                window.replace(name, window.linears[name])


@contextmanager
def looking(
    window: Window, look: Callable[[str, Tensor], None], linears: Iterable[str] | None = None
) -> Iterator[None]:
    """Call ``look(name, x)`` with the input ``[tokens, in]`` of linears, as it arises.

    Args:
        window: whose blocks are run inside the context.
        look: receives the name of a linear and its input.
        linears: None takes the first of each group that shares an input.
    """

    def hook(name: str, _: nn.Module, args: tuple[Tensor, ...]) -> None:
        look(name, args[0].detach().flatten(0, -2))

    with ExitStack() as hooks:
        for name in [group[0] for group in window.input_groups] if linears is None else linears:
            hooks.enter_context(window.linears[name].register_forward_pre_hook(partial(hook, name)))
        yield


def _run_first_batch(window: Window, method: Method) -> None:
    with torch.no_grad(), window.autocast(method.compute_dtype):
        window.run(window.to_device(window.quant_inputs[: method.batch_size]))


def run_full_chain(window: Window, method: Method, full_inputs: Tensor) -> None:
    """Run the full-precision chain through the window.

    Where the method has salient channels, it measures the activation scales of each linear's input as well.
    """
    seen: dict[str, tuple[Tensor, Tensor, Tensor]] = {}
    n_tokens = {group[0]: 0 for group in window.input_groups if method.takes_salient_masks}

    def measure(name: str, x: Tensor) -> None:
        absolute = x.abs().float()
        maximum, total, squares = absolute.amax(0), absolute.sum(0), absolute.square().sum(0)
        if name in seen:
            maximum = torch.maximum(seen[name][0], maximum)
            total, squares = seen[name][1] + total, seen[name][2] + squares
        seen[name] = maximum, total, squares
        n_tokens[name] += len(x)

    window.full_inputs = full_inputs
    with looking(window, measure, n_tokens):
        window.full_outputs = window.run_all(full_inputs, method.batch_size, method.compute_dtype)
    for name in n_tokens:
        if name in seen:
            maximum, total, squares = seen[name]
            window.activations[name] = ActivationScale(maximum, total / n_tokens[name], squares / n_tokens[name])
        else:  # an expert that no token has chosen: its inputs count alike
            ones = torch.ones(window.linears[name].in_features, device=window.device)
            window.activations[name] = ActivationScale(ones, ones, ones)


def report_experts(window: Window, method: Method) -> None:
    """Emit how many calibration tokens each expert of a mixture has seen, and warn of those that saw none."""
    blocks = dict(enumerate(window.blocks, window.first_block))
    mixtures = [i for i, block in blocks.items() if any(isinstance(part, Experts) for part in block.modules())]
    if not mixtures:
        return
    counts = {name: 0 for name in window.linears if ".experts." in name}

    def count(name: str, x: Tensor) -> None:
        counts[name] += len(x)

    with looking(window, count, counts):
        window.run_all(window.quant_inputs, method.batch_size, method.compute_dtype)
    for name, n_tokens in counts.items():
        window.on_metric("input_tokens", n_tokens, linear=name)
    for i in mixtures:
        unseen = {
            name.partition(".experts.")[2].split(".")[0]
            for name, n in counts.items()
            if not n and block_and_path(name)[0] == i
        }
        if unseen:
            log.warning(
                "block %d: no calibration token reaches %s; quantized from the weights alone",
                i,
                f"expert{'s' if len(unseen) > 1 else ''} {', '.join(sorted(unseen, key=int))}",
            )


def report_linears(window: Window, packed: dict[str, PackedWeight], method: Method) -> None:
    """Emit each linear's size, its relative output error on the first calibration sequence, and rows that are lost."""
    errors: dict[str, float] = {}
    lost: dict[str, int] = {}
    n_tokens = window.quant_inputs.shape[1]

    def compare(name: str, x: Tensor) -> None:
        x, weight = x[:n_tokens], window.linears[name].weight
        quantized = packed[name].dequantize()
        lost[name] = _lost_rows(weight, quantized)
        difference = quantized - weight
        error, size = ((x @ w.T.to(x.dtype)).float().square().sum() for w in (difference, weight))
        errors[name] = float(error / size.clamp(min=torch.finfo(torch.float32).tiny))

    with looking(window, compare, window.linears):
        _run_first_batch(window, method)
    for name, weight in packed.items():
        if name in errors:  # no token of the first batch may have chosen an expert
            window.on_metric("output_error", errors[name], linear=name)
        window.on_metric("nbytes", weight.nbytes, linear=name)
        window.on_metric("bits_per_weight", weight.bits_per_weight, linear=name)
        if name not in lost:
            lost[name] = _lost_rows(window.linears[name].weight, weight.dequantize())
        if lost[name]:
            window.on_metric("zero_rows", lost[name], linear=name)
            log.warning("%s: %d rows are too small for their scales and became zeros", name, lost[name])


def _lost_rows(full: Tensor, quantized: Tensor) -> int:
    """Count the rows that are zero in the quantized weight alone."""
    return int(((full != 0).any(1) & ~(quantized != 0).any(1)).sum())


def restore_scale(window: Window, packed: dict[str, PackedWeight]) -> dict[str, PackedWeight]:
    """Put the powers of two that were taken out of the linears into their packed weights."""
    return {
        name: weight.scaled(found.weight, found.inputs) if (found := window.rescalings.get(name)) else weight
        for name, weight in packed.items()
    }


def close_window(model: PreTrainedModel, window: Window, packed: dict[str, PackedWeight], method: Method) -> Tensor:
    """Put the packed linears into the model and return the quantized chain's outputs.

    Nothing reads those of the last window, so they are not computed.
    """
    install(model, packed)
    if window.first_block + len(window.blocks) == len(decoder_blocks(model)):
        return window.quant_inputs
    window.rescalings.clear()
    window.linears.clear()  # the full-precision weights make room for the dense cache
    for name, weight in packed.items():
        bias = packed_linear(model, name).bias
        window.replace(name, PackedLinear(weight, None if bias is None else bias.to(window.device, torch.float32)))
    with dense_cache(nn.ModuleList(window.blocks), COMPUTE_DTYPES[method.compute_dtype]):
        return window.run_all(window.quant_inputs, method.batch_size, method.compute_dtype)


def packed_linear(model: PreTrainedModel, name: str) -> PackedLinear:
    """Return the packed linear called ``"{block}.{path}"``."""
    block, path = block_and_path(name)
    module = decoder_blocks(model)[block].get_submodule(path)
    assert isinstance(module, PackedLinear)
    return module


def moved(weight: PackedWeight, device: torch.device) -> PackedWeight:
    """Move a packed weight to a device."""
    return weight.with_tensors({key: tensor.to(device) for key, tensor in weight.tensors().items()})


def install(model: PreTrainedModel, packed: dict[str, PackedWeight]) -> None:
    """Replace linears of the model by packed ones on the same devices."""
    blocks = decoder_blocks(model)
    for name, weight in packed.items():
        block, path = block_and_path(name)
        original = blocks[block].get_submodule(path)
        assert isinstance(original, nn.Linear)
        blocks[block].set_submodule(path, PackedLinear(moved(weight, original.weight.device), original.bias))
    if any(weight.lender is not None for weight in packed.values()):
        link_lenders(blocks)
