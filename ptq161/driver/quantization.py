"""The driver of all methods: capture block inputs, run a method window by window, propagate both chains.

The full-precision chain passes each full-precision block's output to the next block, the quantized chain each packed
block's output. Blocks are replayed with the arguments that the model passed to them. The model stays on its device;
only one window of blocks and one batch are on the device of the quantization.
"""

from __future__ import annotations

import dataclasses
import time
from collections.abc import Callable, Mapping
from contextlib import AbstractContextManager, nullcontext
from pathlib import Path
from typing import Any

import torch
from torch import Tensor
from tqdm.auto import tqdm
from transformers import PreTrainedModel

from ptq161.driver.capture import BlockArguments, capture_inputs
from ptq161.driver.planning import plan_statistics
from ptq161.driver.resume import (
    ADVICE,
    FinishedWindow,
    Measured,
    fingerprint,
    finished_windows,
    load_plan,
    load_window,
    save_plan,
    save_window,
)
from ptq161.driver.windows import (
    close_window,
    install,
    moved,
    open_window,
    report_experts,
    report_linears,
    restore_scale,
    run_full_chain,
)
from ptq161.errors import UserError
from ptq161.files.atomic import writing
from ptq161.files.fingerprints import KeyedFolder, claim
from ptq161.methods.base import Method, OnMetric, PlanningMethod, ignore_metric
from ptq161.models.architectures import decoder_blocks, max_seq_len
from ptq161.models.checks import as_tokens, check_quantizable, check_seq_len, evaluation_mode
from ptq161.models.experts import fuse_experts, split_experts
from ptq161.numerics import plain_torch, working_device
from ptq161.packed.checkpoint import own_methods
from ptq161.packed.masks import check_salient_masks
from ptq161.packed.model import packed_linears
from ptq161.packed.weight import PackedWeight


@plain_torch()
def quantize(
    model: PreTrainedModel,
    tokens: object,
    method: Method,
    *,
    on_metric: OnMetric | None = None,
    seed: int = 0,
    device: torch.device | str | None = None,
    progress: bool = False,
    salient_masks: Mapping[str, Tensor] | None = None,
    resume: Path | str | KeyedFolder | None = None,
) -> PreTrainedModel:
    """Quantize a model in place: its blocks' linears become :class:`ptq161.packed.linear.PackedLinear`.

    Args:
        model: a supported transformers model in full precision, with or without a head.
        tokens: ``[n_samples, seq_len]`` integer calibration tokens, in any form that
            :func:`ptq161.models.checks.as_tokens` takes.
        method: hyperparameters, as in ``ptq161.methods.ptq161.PTQ161(mask_ratio=0.2)``.
        on_metric: receives every metric as it arises: ``loss`` (mean over the epoch; ``block``, ``epoch`` from 0); per
            linear ``output_error`` (relative squared error of its output on the first calibration sequence), ``nbytes``
            and ``bits_per_weight``; per window ``seconds``.
        seed: the methods' random numbers follow from it.
        device: where windows are worked on; None is where the model is.
        progress: show a progress bar over the blocks.
        salient_masks: for each linear ("{block}.{path}", as in "3.self_attn.q_proj") its salient input channels,
            ``[in]`` bool, in place of those that the method would select; :func:`ptq161.packed.masks.salient_masks`
            reads them back from a quantized model.
        resume: a folder that each finished window is written to; an interrupted quantization continues from there,
            emits the finished windows' metrics again, and gives the same bytes. A path is checked against all
            arguments, for which the whole model is hashed; a ``KeyedFolder`` is not checked.

    Returns:
        the same model. The experts of a mixture become linears of their own (:mod:`ptq161.models.experts`).

    Raises:
        UserError: the model is unsupported, already quantized or has NaN weights; the tokens do not fit the model; the
            masks do not fit model or method; an activation or a loss is not finite; the folder to resume from belongs
            to another quantization, or cannot be written.
    """
    check_quantizable(model)
    check_method(method)
    tokens = checked_tokens(model, tokens)
    target = working_device(device, model.device)
    on_metric = on_metric or ignore_metric
    split_experts(model)
    try:
        check_masks(model, method, salient_masks)
        if isinstance(resume, Path | str):
            found = fingerprint(model, tokens, method, seed=seed, device=target, salient_masks=salient_masks)
            resume = claim(Path(resume).expanduser(), found, ADVICE)
        elif resume is not None:
            with writing(resume.path, ADVICE):
                resume.path.mkdir(parents=True, exist_ok=True)
        with evaluation_mode(model):
            job = Quantization(model, tokens, method, seed, target, salient_masks)
            quantize_blocks(job, resume, on_metric, progress)
    finally:
        if packed_linears(model):  # some of them, where it was cut off
            own_methods(model)
        else:
            fuse_experts(model)
    return model


@dataclasses.dataclass(frozen=True)
class Quantization:
    """What is the same for all windows.

    Attributes:
        model: and the others down to ``salient_masks`` are the arguments of :func:`quantize`.
        resident: has the weights of a window's blocks in memory inside its context.
    """

    model: PreTrainedModel
    tokens: Tensor
    method: Method
    seed: int
    device: torch.device
    salient_masks: Mapping[str, Tensor] | None
    resident: Callable[[range], AbstractContextManager[None]] = lambda blocks: nullcontext()

    @property
    def windows(self) -> list[range]:
        """The blocks of each window."""
        n_blocks, size = len(decoder_blocks(self.model)), self.method.block_size
        return [range(start, min(start + size, n_blocks)) for start in range(0, n_blocks, size)]


def quantize_blocks(job: Quantization, folder: KeyedFolder | None, on_metric: OnMetric, progress: bool) -> None:
    """Quantize every window and put it into the model and the folder, or take it from there."""
    windows = job.windows
    finished = set() if folder is None else finished_windows(folder, [blocks[0] for blocks in windows])
    if folder is not None and len(finished) == len(windows):
        for start in sorted(finished):
            window = load_window(folder, start)
            install(job.model, window.packed)
            _emit(window.measured, on_metric)
        return
    inputs, arguments = capture_inputs(job.model, job.tokens, job.method.batch_size)
    inputs = full_inputs = quant_inputs = inputs.cpu()
    plan = _plan(job, folder, arguments, inputs, progress)
    unit = "window" if job.method.block_size > 1 else "block"
    with tqdm(windows, desc="quantize", unit=unit, disable=not progress) as bar:
        for blocks in windows:
            start = blocks[0]
            stored = load_window(folder, start) if folder is not None and start in finished else None
            with job.resident(blocks):
                window, full_inputs, quant_inputs = _advance(
                    job, start, arguments, plan, full_inputs, quant_inputs, stored, _with_bar(on_metric, bar)
                )
            if folder is not None and stored is None:
                save_window(folder, start, window)
            bar.update()


def _plan(
    job: Quantization,
    folder: KeyedFolder | None,
    arguments: list[BlockArguments],
    inputs: Tensor,
    progress: bool,
) -> dict[str, Tensor] | None:
    """Return what the method decides for the whole model, from the folder where it was decided before."""
    method = job.method
    if not isinstance(method, PlanningMethod) or not method.needs_plan:
        return None
    if folder is not None and (stored := load_plan(folder)) is not None:
        return stored
    statistics = plan_statistics(
        job.model, job.tokens, method, arguments, inputs, seed=job.seed, device=job.device, progress=progress
    )
    plan = method.plan(statistics)
    if folder is not None:
        save_plan(folder, plan)
    return plan


def _advance(
    job: Quantization,
    start: int,
    arguments: list[BlockArguments],
    plan: Mapping[str, Tensor] | None,
    full_inputs: Tensor,
    quant_inputs: Tensor,
    finished: FinishedWindow | None,
    on_metric: OnMetric,
) -> tuple[FinishedWindow, Tensor, Tensor]:
    """Quantize a window, or load the finished one, and propagate both chains through it."""
    began = time.perf_counter()
    measured: Measured = []

    def record(name: str, value: float, /, **where: int | str) -> None:
        measured.append((name, float(value), where))
        on_metric(name, value, **where)

    window = open_window(
        job.model,
        start,
        job.method.block_size,
        job.method,
        arguments,
        quant_inputs,
        masks=job.salient_masks,
        plan=plan,
        seed=job.seed,
        device=job.device,
        on_metric=record,
    )
    if job.method.needs_full_chain:
        run_full_chain(window, job.method, full_inputs)
    if finished is None:
        report_experts(window, job.method)
        packed = _in_own_memory(job.method.quantize_window(window))
        report_linears(window, packed, job.method)
        packed = restore_scale(window, packed)
    else:
        packed = {name: moved(weight, job.device) for name, weight in finished.packed.items()}
        _emit(finished.measured, on_metric)
    if window.full_outputs is not None:
        full_inputs = window.full_outputs
    quant_inputs = close_window(job.model, window, packed, job.method)
    if finished is None:
        record("seconds", time.perf_counter() - began, block=start)
    return FinishedWindow(packed, measured), full_inputs, quant_inputs


def _emit(measured: Measured, on_metric: OnMetric) -> None:
    for name, value, where in measured:
        on_metric(name, value, **where)


def _in_own_memory(packed: dict[str, PackedWeight]) -> dict[str, PackedWeight]:
    """Copy each tensor into memory of its own, as if it had been read from a file.

    Layout and alignment can change the order of sums, and a resumed quantization must give the same bytes.
    """
    return {
        name: weight.with_tensors(
            {key: t.clone(memory_format=torch.contiguous_format) for key, t in weight.tensors().items()}
        )
        for name, weight in packed.items()
    }


def _with_bar(on_metric: OnMetric, bar: Any) -> OnMetric:
    """Return an ``on_metric`` that also shows the loss beside the progress bar."""

    def emit(name: str, value: float, /, **where: int | str) -> None:
        if name == "loss":
            bar.set_postfix_str(f"loss {value:.4f}", refresh=True)
        on_metric(name, value, **where)

    return emit


def check_method(method: object) -> None:
    """Check that an object is a method.

    Raises:
        UserError: it is not.
    """
    if isinstance(method, type) or not callable(getattr(method, "quantize_window", None)):
        given = f"the class {method.__name__}" if isinstance(method, type) else repr(method)
        raise UserError(f"{given} is no method: pass an instance, such as ptq161.RTN(bits=4).")


def check_masks(model: PreTrainedModel, method: Method, salient_masks: Mapping[str, Tensor] | None) -> None:
    """Check that a method takes salient masks, and that they are this model's; None is always right.

    Raises:
        UserError: one of both is wrong.
    """
    if salient_masks is None:
        return
    if not method.takes_salient_masks:
        raise UserError(
            f"salient_masks: {type(method).__name__} has no salient channels; use PTQ161, or leave the masks out."
        )
    check_salient_masks(model, salient_masks)


def checked_tokens(model: PreTrainedModel, given: object) -> Tensor:
    """Return calibration tokens ``[n_samples, seq_len]`` that fit a model.

    Raises:
        UserError: they do not fit.
    """
    tokens = as_tokens(model, given, "calibration", "[n_samples, seq_len]")
    check_seq_len("calib.seq_len", tokens.shape[1], max_seq_len(model.config))
    return tokens
