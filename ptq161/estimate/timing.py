"""Seconds of a run on this machine: the method itself on one block of random weights and a few windows, scaled up.

A method's time for a block is taken as ``a + b n + c s``, with n the calibration windows and s the steps of learning;
three short quantizations of a stand-in model tell the three. A block that is too large for a benchmark of seconds is
measured at two smaller widths of the same proportions: what belongs to windows and steps grows with the number of
weights, the rest with that and with the third power of the width, as the factorization of hessians does.
"""

from __future__ import annotations

import copy
import dataclasses
import time
from typing import NamedTuple

import torch
from torch import Tensor, nn
from transformers import PretrainedConfig, PreTrainedModel

from ptq161.data.settings import CalibConfig
from ptq161.driver.quantization import quantize
from ptq161.errors import UserError
from ptq161.estimate.shapes import ModelShape
from ptq161.evaluation.likelihood import perplexity
from ptq161.evaluation.settings import EvalConfig
from ptq161.methods.base import Method, PlanningMethod, plan_windows
from ptq161.methods.codes.learn import held_out_batches
from ptq161.models.architectures import decoder_blocks
from ptq161.models.loading import auto_class
from ptq161.numerics import plain_torch
from ptq161.seeding import draw, stage_generator

_LARGEST_BLOCK = 16e6
"""Weights of a block that is measured as it is."""
_WIDTHS = ("hidden_size", "intermediate_size", "num_attention_heads", "num_key_value_heads", "moe_intermediate_size")
_WIDTHS_OF_OPT = ("ffn_dim", "word_embed_proj_dim")
_LEARNING = ("epochs", "steps", "refit_steps")
"""Settings that say how long a method learns; of windows passed (epochs), or of batches."""
_LONGER = 4
"""Epochs or steps beside one, from which the time of a step is told."""
_FEW_TOKENS = 16
"""Rows of the embedding, and tokens of a window, where their number does not matter."""
_HELD_OUT = 1 / 3
"""Time of a batch without a backward pass, in batches with one."""


class BlockSeconds(NamedTuple):
    """Seconds of one block.

    Attributes:
        fixed: whatever the windows and steps.
        window: for each calibration window.
        step: for each step of learning.
        plan: of a plan, for each of its windows.
    """

    fixed: float
    window: float
    step: float
    plan: float


@dataclasses.dataclass(frozen=True)
class Seconds:
    """Seconds of the stages of a run, on this machine beside whatever else it does now.

    Attributes:
        quantize: of all blocks, with the plan.
        evaluate: of all perplexity windows, of all models that are scored.
    """

    quantize: float
    evaluate: float


def run_seconds(
    config: PretrainedConfig,
    shape: ModelShape,
    method: Method | None,
    calib: CalibConfig,
    evaluation: EvalConfig,
    *,
    dtype: torch.dtype,
    device: torch.device,
) -> Seconds:
    """Measure a stand-in for seconds and scale its times up.

    Args:
        config: of the model, by transformers.
        shape: of the model.
        method: None evaluates full precision alone.
        calib: windows and their length.
        evaluation: windows, corpora and which models are scored; tasks are left out.
        dtype: of the evaluation.
        device: of the run.

    Raises:
        UserError: the model is too large to be measured, and its widths have no common divisor.
    """
    weights = shape.linear_weights / len(shape.blocks)
    quantization = 0.0
    if method is not None:
        block = _block_seconds(config, shape, weights, method, calib, device)
        n = calib.n_samples
        planned = _planned(method, n)
        quantization = len(shape.blocks) * (
            block.fixed + n * block.window + _steps(method, n) * block.step + planned * block.plan
        )
        quantization += planned * _plan_head(config, shape, method, calib.seq_len, device)
    scored = (method is None or evaluation.full_precision) + (method is not None)
    windows = len(evaluation.corpora) * (evaluation.max_windows or 0) * scored
    each = _window_seconds(config, shape, weights, evaluation.seq_len, dtype, device) if windows else 0.0
    return Seconds(quantization, windows * each)


def _block_seconds(
    config: PretrainedConfig,
    shape: ModelShape,
    weights: float,
    method: Method,
    calib: CalibConfig,
    device: torch.device,
) -> BlockSeconds:
    divisor = _divisor(config, weights)
    one = _measured(_stand_in(config, 2, divisor, _FEW_TOKENS), method, calib, device)
    if divisor == 1:
        return one
    half = _measured(_stand_in(config, 2, 2 * divisor, _FEW_TOKENS), method, calib, device)
    # half = square + cube and one = 4 square + 8 cube, neither below zero.
    cube = min(max(one.fixed / 4 - half.fixed, 0.0), one.fixed / 8)
    square = (one.fixed - 8 * cube) / 4
    width = 2 * divisor
    return BlockSeconds(square * width**2 + cube * width**3, *(divisor**2 * seconds for seconds in one[1:]))


def _measured(model: PreTrainedModel, method: Method, calib: CalibConfig, device: torch.device) -> BlockSeconds:
    """Measure a method on the first block of a model, with as few windows and steps as tell what each takes."""
    few = min(method.batch_size, calib.n_samples) * (2 if hasattr(method, "held_out") else 1)  # a batch may be held out
    name = _learning(method)
    once, longer = (_replaced(method, name, amount) for amount in (1, _LONGER))
    _first_block(model, once, few, _FEW_TOKENS, device)  # compiles what is compiled at first use
    plan, base = _first_block(model, once, few, calib.seq_len, device)
    _, more = _first_block(model, once, 2 * few, calib.seq_len, device)
    last = _first_block(model, longer, few, calib.seq_len, device)[1] if name else base
    step = max(last - base, 0.0) / (_steps(longer, few) - _steps(once, few)) if name else 0.0
    # The second run has more windows, and more steps where these follow from the windows.
    window = max(more - base - (_steps(once, 2 * few) - _steps(once, few)) * step, 0.0) / few
    fixed = max(base - few * window - _steps(once, few) * step, 0.0)
    planned = _planned(method, few)
    return BlockSeconds(fixed, window, step, plan / planned / len(decoder_blocks(model)) if planned else 0.0)


def _first_block(
    model: PreTrainedModel, method: Method, n: int, seq_len: int, device: torch.device
) -> tuple[float, float]:
    """Return the seconds before the first block of a quantization, and those of the block."""
    tokens = torch.randint(0, 2, (n, seq_len), generator=torch.Generator().manual_seed(0))
    found: list[float] = []

    def on_metric(name: str, value: float, /, **where: int | str) -> None:
        if name == "seconds":
            found.append(value)
            raise _MeasuredError

    began = time.perf_counter()
    try:
        quantize(copy.deepcopy(model), tokens, method, on_metric=on_metric, device=device)
    except _MeasuredError:
        return time.perf_counter() - began - found[0], found[0]
    raise AssertionError("a quantization emits the seconds of its first block")


class _MeasuredError(Exception):
    """Ends a quantization after its first block."""


def _steps(method: Method, n: int) -> float:
    """Return the steps of learning with ``n`` windows, a held-out batch as the share of a step that it takes."""
    name = _learning(method)
    if name is None:
        return 0.0
    amount: float = getattr(method, name)
    size = min(method.batch_size, n)
    if name != "epochs":
        return amount
    if getattr(method, "codes", None) != "learned":
        return amount * -(-n // size)
    held = held_out_batches(getattr(method, "held_out", 0.0), n, size)
    return amount * ((n - size * held) // size + _HELD_OUT * held) + _HELD_OUT * held


def _learning(method: Method) -> str | None:
    return next((name for name in _LEARNING if getattr(method, name, 0)), None)


def _replaced(method: Method, name: str | None, amount: int) -> Method:
    if name is None:
        return method
    changed: Method = dataclasses.replace(method, **{name: amount})  # type: ignore[type-var]  # methods are dataclasses
    return changed


def _planned(method: Method, n: int) -> int:
    """Return the windows of a method's plan; 0 without one."""
    if not isinstance(method, PlanningMethod) or not method.needs_plan:
        return 0
    return plan_windows(method, n)


def _plan_head(
    config: PretrainedConfig, shape: ModelShape, method: Method, seq_len: int, device: torch.device
) -> float:
    """Return the seconds that a plan takes for the logits of a window, and their gradient; on the host."""
    if not _planned(method, 1):
        return 0.0
    divisor = _divisor(config, shape.linear_weights / len(shape.blocks))
    return divisor * _head_seconds(_stand_in(config, 1, divisor), seq_len)


def _head_seconds(model: PreTrainedModel, seq_len: int) -> float:
    head = model.get_output_embeddings()
    assert isinstance(head, nn.Linear)
    rows = torch.randn(seq_len, head.weight.shape[1]).to(head.weight.dtype).requires_grad_()
    began = time.perf_counter()
    logits = head(rows).float()
    drawn = draw(logits.detach().softmax(-1), stage_generator(0, "estimate"))
    torch.nn.functional.cross_entropy(logits, drawn, reduction="sum").backward()
    return time.perf_counter() - began


def _window_seconds(
    config: PretrainedConfig, shape: ModelShape, weights: float, seq_len: int, dtype: torch.dtype, device: torch.device
) -> float:
    """Return the seconds of a perplexity window: of all blocks, of the head, and of the losses."""
    divisor = _divisor(config, weights)
    one, two = (_passed(_stand_in(config, n, divisor), seq_len, dtype, device) for n in (1, 2))
    block = max(two - one, 0.0)
    return divisor**2 * len(shape.blocks) * block + divisor * max(one - block, 0.0)


def _passed(model: PreTrainedModel, seq_len: int, dtype: torch.dtype, device: torch.device) -> float:
    nn.Module.to(model, device, dtype)
    tokens: Tensor = torch.zeros(2 * seq_len, dtype=torch.long)
    seconds = []
    for _ in range(3):
        began = time.perf_counter()
        perplexity(model, tokens, seq_len, batch_size=2)
        seconds.append((time.perf_counter() - began) / 2)
    return sorted(seconds)[1]  # the first may be slower, and any beside other work


def _stand_in(config: PretrainedConfig, n_blocks: int, divisor: int, vocabulary: int | None = None) -> PreTrainedModel:
    """Make a model of random weights with a few blocks, its widths divided, in float32.

    Args:
        config: of the whole model.
        n_blocks: how many.
        divisor: of the widths.
        vocabulary: rows of the embedding; None takes the model's own.
    """
    changed = copy.deepcopy(config)
    text = changed.get_text_config()
    if vocabulary is not None:
        text.vocab_size, text.pad_token_id = vocabulary, None
    for name in _widths(text):
        setattr(text, name, getattr(text, name) // divisor)
    text.num_hidden_layers = n_blocks
    if getattr(text, "layer_types", None):
        text.layer_types = text.layer_types[:n_blocks]
    with plain_torch(), torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        model: PreTrainedModel = auto_class(changed).from_config(changed)
    model.eval()
    return model


def _divisor(config: PretrainedConfig, weights: float) -> int:
    """Return the least power of two by which the widths are divided so that a block is small enough."""
    divisor = 1
    while weights / divisor**2 > _LARGEST_BLOCK:
        divisor *= 2
    text = config.get_text_config()
    odd = [name for name in _widths(text) if divisor > 1 and getattr(text, name) % (2 * divisor)]
    if odd:
        raise UserError(
            f"the time of a model whose {odd[0]} is {getattr(text, odd[0])} cannot be measured in seconds: "
            f"it is no multiple of {2 * divisor}."
        )
    return divisor


def _widths(text: PretrainedConfig) -> list[str]:
    return [name for name in (*_WIDTHS, *_WIDTHS_OF_OPT) if isinstance(getattr(text, name, None), int)]
