"""What a plan over the whole model may rest on: one pass forward and one backward, block by block.

The inputs of every block are kept in host memory, and each block is on the device while it is worked on, as in the
quantization itself.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import ExitStack, contextmanager
from functools import partial

import torch
from torch import Tensor, nn
from tqdm.auto import tqdm
from transformers import PreTrainedModel

from ptq161.driver.capture import BlockArguments, logits_after
from ptq161.driver.windows import looking, open_window
from ptq161.errors import UserError
from ptq161.methods.base import (
    LinearStatistics,
    PlanningMethod,
    Window,
    block_and_path,
    ignore_metric,
    not_finite,
    plan_windows,
)
from ptq161.methods.rescaling import Rescaling
from ptq161.models.architectures import decoder_blocks
from ptq161.seeding import draw, stage_generator


def plan_statistics(
    model: PreTrainedModel,
    tokens: Tensor,
    method: PlanningMethod,
    arguments: list[BlockArguments],
    inputs: Tensor,
    *,
    seed: int,
    device: torch.device,
    progress: bool,
) -> dict[str, LinearStatistics]:
    """Measure the inputs of every linear, and the gradients at its outputs, in the full-precision model.

    The gradient is that of the cross-entropy of tokens which the model draws itself at each position, given the
    calibration tokens before it: the expected squares are the diagonal of the Fisher information.

    Args:
        model: full precision.
        tokens: ``[n_samples, seq_len]``; the first ``method.plan_samples`` are used, in whole batches.
        method: for batch size and dtype.
        arguments: of each block.
        inputs: ``[n_samples, seq_len, hidden]``, of the first block, in host memory.
        seed: the drawn tokens follow from it.
        device: where blocks are worked on.
        progress: show a progress bar.

    Returns:
        the statistics of each linear by name (``"{block}.{path}"``), where the model is.

    Raises:
        UserError: the model has no head, or an activation or a gradient is not finite.
    """
    if model.get_output_embeddings() is None:
        raise UserError("a plan for the whole model needs one that predicts tokens; use method.level=linear.")
    if any(parameter.is_inference() for parameter in model.parameters()):
        raise UserError("the weights were made in torch.inference_mode: load them outside, or use method.level=linear.")
    size = min(method.batch_size, len(tokens))
    n = plan_windows(method, len(tokens))
    tokens, chain = tokens[:n], [inputs[:n]]
    n_blocks = len(decoder_blocks(model))
    squares: dict[str, Tensor] = {}
    statistics: dict[str, LinearStatistics] = {}

    def opened(i: int) -> Window:
        return open_window(
            model, i, 1, method, arguments, chain[i], masks=None, seed=seed, device=device, on_metric=ignore_metric
        )

    with tqdm(total=2 * n_blocks, desc="plan", unit="block", disable=not progress) as bar:
        for i in range(n_blocks):
            window = opened(i)
            for group in window.input_groups:
                squares[group[0]] = torch.zeros(window.linears[group[0]].in_features, device=device)
            with looking(window, partial(_add_squares, squares)):
                chain.append(window.run_all(chain[i], size, method.compute_dtype))
            bar.update()
        gradients = _output_gradients(model, tokens, chain.pop(), size, stage_generator(seed, "plan", 0))
        for i in reversed(range(n_blocks)):
            window = opened(i)
            energies = {
                name: torch.zeros(linear.out_features, device=device) for name, linear in window.linears.items()
            }
            with _watching_gradients(window, partial(_add_squares, energies)):
                gradients = _input_gradients(window, chain.pop(), gradients, size, method.compute_dtype)
            weights = dict(decoder_blocks(model)[i].named_parameters())
            leaders = {name: group[0] for group in window.input_groups for name in group}
            for name, energy in energies.items():
                taken_out = window.rescalings.get(name, Rescaling(0, 0))
                weight = weights[f"{block_and_path(name)[1]}.weight"]  # of the model itself, not a copy
                mean_square = squares[leaders[name]] / tokens.numel() * 4.0**taken_out.inputs
                gradient_energy = energy / tokens.numel() * 4.0 ** -(taken_out.weight + taken_out.inputs)
                statistics[name] = LinearStatistics(
                    weight=weight,
                    mean_square=mean_square.to(weight.device),
                    gradient_energy=gradient_energy.to(weight.device),
                )
            bar.update()
    return statistics


def _add_squares(sums: dict[str, Tensor], name: str, values: Tensor) -> None:
    sums[name] += values.detach().float().flatten(0, -2).square().sum(0)


@contextmanager
def _watching_gradients(window: Window, look: Callable[[str, Tensor], None]) -> Iterator[None]:
    """Call ``look(name, gradient)`` with the gradient ``[..., out]`` at each linear's output."""

    def hook(name: str, _: nn.Module, __: object, output: Tensor) -> None:
        output.register_hook(lambda gradient: look(name, gradient))

    with ExitStack() as hooks:
        for name, linear in window.linears.items():
            hooks.enter_context(linear.register_forward_hook(partial(hook, name)))
        yield


def _input_gradients(window: Window, inputs: Tensor, gradients: Tensor, size: int, compute_dtype: str) -> Tensor:
    """Pass gradients ``[n, seq_len, hidden]`` at a window's outputs on to its inputs."""
    passed = torch.empty_like(gradients)
    for batch in window.batches(size):
        hidden = window.to_device(inputs[batch]).requires_grad_()
        with window.autocast(compute_dtype):
            output = window.run(hidden)
        (gradient,) = torch.autograd.grad(output, hidden, window.to_device(gradients[batch]).to(output.dtype))
        passed[batch] = gradient.to(passed.device, passed.dtype)
    if not bool(torch.isfinite(passed).all()):
        raise not_finite(f"the gradients in block {window.first_block} are NaN or infinite", compute_dtype)
    return passed


def _output_gradients(
    model: PreTrainedModel, tokens: Tensor, outputs: Tensor, size: int, generator: torch.Generator
) -> Tensor:
    """Return the gradient at the last block's outputs of the cross-entropy of tokens that the model draws itself."""
    gradients = torch.empty_like(outputs, dtype=torch.float32)
    for batch in (slice(start, start + size) for start in range(0, len(outputs), size)):
        hidden = outputs[batch].to(model.device).requires_grad_()
        logits = logits_after(model, tokens[batch], hidden).float().flatten(0, 1)
        with torch.no_grad():
            drawn = draw(logits.softmax(-1).cpu(), generator).to(logits.device)
        loss = nn.functional.cross_entropy(logits, drawn, reduction="sum")
        gradients[batch] = torch.autograd.grad(loss, hidden)[0].to("cpu", torch.float32)
    return gradients
