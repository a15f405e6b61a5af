"""Peak memory of a run from shapes: what is held in each phase, counted, with one row of figures for each method.

A phase holds what the code of that phase holds at its peak: :mod:`ptq161.driver` for the quantization, the stages of
:mod:`ptq161.run` around it. Temporaries are counted in copies of the largest linear or hessian; the counts of
:func:`needs_of` were read off the methods and checked against torch's own record of its allocations
(``tests/estimate/test_memory.py``) and against the memory of whole processes (``benchmarks/estimate.py``).
"""

from __future__ import annotations

import dataclasses
from collections.abc import Sequence

import torch

from ptq161.data.settings import CalibConfig
from ptq161.errors import UserError
from ptq161.estimate.shapes import BlockShape, ModelShape
from ptq161.estimate.sizes import Sizes
from ptq161.evaluation.settings import EvalConfig
from ptq161.methods.base import Method, PlanningMethod, plan_windows
from ptq161.methods.compensation import CompensatedMethod
from ptq161.methods.layerwise import LayerwiseMethod
from ptq161.methods.omniquant import OmniQuant
from ptq161.methods.ptq161 import PTQ161
from ptq161.methods.qdrop import QDrop
from ptq161.methods.vptq import VPTQ
from ptq161.methods.waterfill import Waterfill
from ptq161.numerics import COMPUTE_DTYPES

FLOAT = 4
CUDA_CONTEXT = 0.5e9
"""Bytes that the context of a GPU takes beside torch's own tensors; less or more by driver and card."""
RETAINED = 2.0
"""Memory of a process for each byte of activations on a CPU: what is freed in pieces stays with the allocator."""
_LOSS_ROWS = 512
"""Rows of logits whose cross-entropy is computed at once (:mod:`ptq161.evaluation.likelihood`)."""
_PERPLEXITY_TOKENS = 4096
"""Tokens of a batch of perplexity windows at most (:mod:`ptq161.evaluation.protocol`)."""


@dataclasses.dataclass(frozen=True)
class Needs:
    """What a method holds on the device beside a window's blocks in float32, at its peaks.

    Attributes:
        largest: bytes for each weight of the largest linear, while one linear after the other is worked on.
        hessians: whether those of all inputs of the window are collected.
        factors: copies of the largest hessian in float32 while it is factorized.
        learning: bytes for each weight of the window, in the backward pass of a step; 0 learns nothing.
        stepping: the same while the optimizer steps, when activations are gone and gradients are all there.
        outputs: copies of each linear's outputs that the backward pass needs.
    """

    largest: float
    hessians: bool = False
    factors: float = 0.0
    learning: float = 0.0
    stepping: float = 0.0
    outputs: float = 1.0


@dataclasses.dataclass(frozen=True)
class Held:
    """Bytes of one moment, or of the peaks of a phase.

    Attributes:
        host: in host memory.
        device: on a GPU; zero where the device is the CPU.
        mapped: of those in host memory, what is mapped from the model's files, which is given back when memory is
            short: ``host - mapped`` has to fit.
    """

    host: float
    device: float = 0.0
    mapped: float = 0.0


def needs_of(method: Method, device: torch.device) -> Needs:
    """Return what a method holds; the figures are bytes, c those of an element of its compute dtype.

    Raises:
        UserError: the method is none of this project's own.
    """
    c = COMPUTE_DTYPES[method.compute_dtype].itemsize
    if isinstance(method, Waterfill) or (isinstance(method, PTQ161) and method.codes == "learned"):
        if method.codes != "learned" or not method.epochs:
            return Needs(largest=12, hessians=True, factors=4.5, learning=4)
        # Latents, two moments and the rounded weight; then gradients. Absorption trains the float weights likewise.
        floats = 16 if method.absorb_epochs else 0
        largest = 8 if device.type == "cpu" else 24  # a compiled pass over the latents, or several of torch's
        return Needs(
            largest, hessians=True, factors=4.5, learning=12 + c + floats, stepping=16 + c + floats, outputs=1.5
        )
    if isinstance(method, PTQ161):
        # Codes in a byte, signs, salient weights, and the latter's columns once more.
        held = 1 + (2 + method.mask_ratio) * c
        return Needs(13, hessians=method.codes == "compensated", factors=4.5, learning=held, stepping=held, outputs=2.5)
    if isinstance(method, OmniQuant):
        return Needs(largest=16, learning=2 * c, stepping=2 * c)  # the rounded weight and its slope
    if isinstance(method, QDrop):
        # The float part, alpha with two moments, the soft weight; then gradients.
        return Needs(largest=40, learning=16 + c, stepping=20 + c, outputs=2)
    if isinstance(method, VPTQ):
        refit = 8 + c if method.refit_steps else 0
        return Needs(largest=24, hessians=True, factors=4.5, learning=refit, stepping=refit)
    if isinstance(method, CompensatedMethod):
        return Needs(largest=12, hessians=True, factors=4.5)
    if isinstance(method, LayerwiseMethod):
        return Needs(largest=24 if method.needs_statistics else 14, hessians=method.needs_statistics, factors=4.5)
    raise UserError(f"the memory of {type(method).__name__} is not known before it is run.")


def run_memory(
    shape: ModelShape,
    method: Method | None,
    calib: CalibConfig,
    evaluation: EvalConfig,
    sizes: Sizes | None,
    *,
    dtype: torch.dtype,
    device: torch.device,
    stream: bool = False,
) -> dict[str, Held]:
    """Return what each phase of a run holds at its peak, without what a process holds before it loads a model.

    Args:
        shape: of the full-precision model.
        method: None evaluates full precision alone.
        calib: windows and their length.
        evaluation: batches and their length.
        sizes: of the packed model; None leaves out the phases that follow from them.
        dtype: of the evaluation.
        device: of the run.
        stream: blocks are read from the model's folder as they are quantized, and linears dequantized one by one.

    Returns:
        phase -> bytes, in the order of the run.
    """
    model = shape.parameters * shape.dtype.itemsize
    logits = _scoring(shape, evaluation, dtype)
    phases = {} if stream else {"load": Held(model, mapped=model)}
    copied = shape.dtype != dtype
    if method is None or evaluation.full_precision:
        cast = shape.parameters * dtype.itemsize
        phases["full precision"] = _peak(
            device,
            Held(2 * model if copied else model, mapped=model),  # the copy is cast tensor by tensor
            Held(model, cast + logits, mapped=model) if copied else Held(0, model + logits, mapped=model),
        )
    if method is not None:
        retained = 1.0 if device.type == "cuda" else RETAINED
        phases |= quantization_memory(
            shape,
            method,
            calib.n_samples,
            calib.seq_len,
            device=device,
            whole_model=not stream,
            retained=retained,
        )
    if sizes is not None:
        rest = sizes.other_bytes
        phases["save"] = Held(rest + 2 * sizes.linear_bytes + sizes.other_bytes)
        dense = 0 if stream else shape.linear_weights * dtype.itemsize
        scoring = max(logits, 3 * FLOAT * _largest(shape.blocks))  # or a linear on its way to the dense copy
        phases["quantized"] = _peak(device, Held(0, sizes.linear_bytes + rest + dense + scoring))
    return phases


def quantization_memory(
    shape: ModelShape,
    method: Method,
    n_samples: int,
    seq_len: int,
    *,
    device: torch.device,
    whole_model: bool = True,
    retained: float = 1.0,
) -> dict[str, Held]:
    """Return what the phases of a quantization hold at their peaks, beside the process itself.

    Args:
        shape: of the full-precision model.
        method: the hyperparameters.
        n_samples: calibration windows.
        seq_len: tokens of each.
        device: of the quantization; the model and the activations are in host memory.
        whole_model: the model is in memory (:func:`ptq161.quantize`), or the blocks of a window and what is outside of
            the blocks (:func:`ptq161.quantize_folder`).
        retained: bytes for each byte of activations: 1 is what torch allocates, ``RETAINED`` what a process takes.
    """
    width = shape.dtype.itemsize
    windows = shape.windows(method.block_size)
    chain = n_samples * seq_len * shape.hidden * width
    # Inputs of the first block, and of the quantized chain in and out; with the full-precision chain, its inputs and
    # outputs, and, where targets are learned, those of the full-precision window on the quantized chain's inputs.
    chains = (5 if method.needs_full_chain else 3) * chain
    phases: dict[str, Held] = {}
    if isinstance(method, PlanningMethod) and method.needs_plan:
        phases["plan"] = _peak(device, *_plan(shape, method, n_samples, seq_len, chain, device, retained))
    peaks = []
    for window in windows:
        inside = shape.parameters if whole_model else shape.outside + sum(b.weights + b.rest for b in window)
        resident = inside * width
        worked_on = _window(shape, window, method, n_samples, seq_len, device, retained)
        peaks.append(Held(resident + chains, worked_on, mapped=resident))
    phases["quantize"] = _peak(device, *peaks)
    return phases


def _window(
    shape: ModelShape,
    window: Sequence[BlockShape],
    method: Method,
    n_samples: int,
    seq_len: int,
    device: torch.device,
    retained: float,
) -> float:
    needs, c = needs_of(method, device), COMPUTE_DTYPES[method.compute_dtype].itemsize
    weights = sum(block.weights for block in window)
    blocks = FLOAT * sum(block.weights + block.rest for block in window)
    tokens = retained * min(method.batch_size, n_samples) * seq_len
    # Under autocast the blocks' weights are cast once for a pass.
    cast = c * weights if c < FLOAT else 0
    inputs = [group[0][1] for block in window for group in block.groups]
    hessians = FLOAT * sum(n * n for n in inputs) if needs.hessians else 0
    largest_hessian = FLOAT * max(inputs) ** 2 if needs.hessians else 0
    largest = _largest(window)
    passing = tokens * _passing(shape, window, c)
    peaks = [
        blocks + cast + passing + hessians,
        blocks + cast + needs.largest * largest,
        blocks + max(hessians, (1 + needs.factors) * largest_hessian) + needs.largest * largest,
    ]
    if needs.learning:
        peaks += [
            blocks + needs.learning * weights + cast + needs.largest * largest,
            blocks + needs.learning * weights + tokens * _learning(shape, window, needs, c, seq_len, device),
            blocks + needs.stepping * weights + needs.largest * largest,
        ]
    return max(peaks)


def _plan(
    shape: ModelShape,
    method: PlanningMethod,
    n_samples: int,
    seq_len: int,
    chain: int,
    device: torch.device,
    retained: float,
) -> list[Held]:
    """The inputs of every block are kept, a block is on the device; logits and their gradients are with the model."""
    size = min(method.batch_size, n_samples)
    kept = chain + (len(shape.blocks) + 2) * chain * plan_windows(method, n_samples) // n_samples
    c = COMPUTE_DTYPES[method.compute_dtype].itemsize
    blocks = [
        FLOAT * (block.weights + block.rest)
        + (c * block.weights if c < FLOAT else 0)
        + retained * size * seq_len * _learning(shape, [block], Needs(0), c, seq_len, device)
        for block in shape.blocks
    ]
    # Logits in the model's dtype and in float32, probabilities, and the gradient of either.
    logits = size * seq_len * shape.vocabulary * (2 * shape.dtype.itemsize + 3 * FLOAT)
    model = shape.parameters * shape.dtype.itemsize
    return [Held(model + kept + logits, mapped=model), Held(model + kept, max(blocks), mapped=model)]


def _passing(shape: ModelShape, window: Sequence[BlockShape], width: int) -> float:
    """Bytes for a token of a pass without gradients: the residual stream in float32, and the widest part of a block."""
    widest = max(rows for block in window for rows, _ in block.linears)
    return FLOAT * 3 * shape.hidden + width * 3 * widest


def _learning(
    shape: ModelShape, window: Sequence[BlockShape], needs: Needs, width: int, seq_len: int, device: torch.device
) -> float:
    """Bytes for a token of a pass with gradients: what every linear and every norm keeps, and attention."""
    kept = 0.0
    for block in window:
        inputs = sum(group[0][1] for group in block.groups)
        outputs = sum(rows for rows, _ in block.linears)
        # Half precision on a CPU has attention of its own, which keeps its probabilities; half of them are masked.
        attention = shape.heads * seq_len / 2 if width < FLOAT and device.type == "cpu" else 0
        kept += width * (inputs + needs.outputs * outputs + attention) + FLOAT * 6 * shape.hidden
    return kept


def _scoring(shape: ModelShape, evaluation: EvalConfig, dtype: torch.dtype) -> float:
    """Bytes of a batch of perplexity windows: its logits, their copy without the last of each, and the losses."""
    if not evaluation.corpora:
        return 0.0
    windows = max(1, min(evaluation.batch_size, _PERPLEXITY_TOKENS // evaluation.seq_len))
    tokens = windows * evaluation.seq_len
    losses = min(tokens, _LOSS_ROWS) * 2 * FLOAT
    return shape.vocabulary * (tokens * 2 * dtype.itemsize + losses) + tokens * _passing(
        shape, shape.blocks[:1], dtype.itemsize
    )


def _largest(window: Sequence[BlockShape]) -> int:
    return max(rows * columns for block in window for rows, columns in block.linears)


def _peak(device: torch.device, *moments: Held) -> Held:
    """Return the most that is held in either memory; on a CPU both are one."""
    on_cpu = device.type != "cuda"
    totals = [moment.host + moment.device * on_cpu for moment in moments]
    firm = max(total - moment.mapped for total, moment in zip(totals, moments, strict=True))
    return Held(max(totals), 0.0 if on_cpu else max(moment.device for moment in moments), mapped=max(totals) - firm)
