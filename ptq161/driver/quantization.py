"""The driver of all methods: capture block inputs, run a method window by window, propagate both chains.

The full-precision chain passes each full-precision block's output to the next block, the quantized chain each packed
block's output. Blocks are replayed with the arguments that the model passed to them. The model stays on its device;
only one window of blocks and one batch are on the device of the quantization.
"""

from __future__ import annotations

import copy
import dataclasses
import time
from collections.abc import Mapping
from functools import partial
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn
from tqdm.auto import tqdm
from transformers import PreTrainedModel

from ptq161.driver.capture import BlockArguments, capture_inputs
from ptq161.driver.resume import ADVICE, FinishedWindow, Measured, fingerprint, load_windows, save_window
from ptq161.errors import UserError
from ptq161.files.atomic import writing
from ptq161.files.fingerprints import KeyedFolder, claim
from ptq161.methods.base import ActivationScale, Method, OnMetric, Window, ignore_metric
from ptq161.models.architectures import architecture_of, check_quantizable, check_tokens, decoder_blocks, max_seq_len
from ptq161.numerics import COMPUTE_DTYPES
from ptq161.packed.checkpoint import own_save
from ptq161.packed.linear import PackedLinear, dense_cache
from ptq161.packed.masks import check_salient_masks
from ptq161.packed.model import packed_linears
from ptq161.packed.weight import PackedWeight
from ptq161.seeding import stage_generator


def quantize(
    model: PreTrainedModel,
    tokens: Tensor,
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
        model: a supported transformers model in full precision.
        tokens: ``[n_samples, seq_len]`` integer calibration tokens.
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
        the same model.

    Raises:
        UserError: the model is unsupported, already quantized or has NaN weights; the tokens do not fit the model; the
            masks do not fit model or method; an activation or a loss is not finite; the folder to resume from belongs
            to another quantization, or cannot be written.
    """
    check_quantizable(model)
    _check_tokens(model, tokens)
    if salient_masks is not None:
        _check_takes_masks(method)
        check_salient_masks(model, salient_masks)
    on_metric = on_metric or ignore_metric
    target = torch.device(device) if device is not None else model.device
    if isinstance(resume, Path | str):
        found = fingerprint(model, tokens, method, seed=seed, device=target, salient_masks=salient_masks)
        resume = claim(Path(resume), found, ADVICE)
    elif resume is not None:
        with writing(resume.path, ADVICE):
            resume.path.mkdir(parents=True, exist_ok=True)
    training = model.training
    model.eval()
    try:
        _quantize_blocks(_Quantization(model, tokens, method, seed, target, salient_masks), resume, on_metric, progress)
    finally:
        model.train(training)
        if packed_linears(model):  # some of them, where it was cut off
            own_save(model)
    return model


@dataclasses.dataclass(frozen=True)
class _Quantization:
    """What is the same for all windows; the fields are the arguments of :func:`quantize`."""

    model: PreTrainedModel
    tokens: Tensor
    method: Method
    seed: int
    device: torch.device
    salient_masks: Mapping[str, Tensor] | None


def _quantize_blocks(job: _Quantization, folder: KeyedFolder | None, on_metric: OnMetric, progress: bool) -> None:
    starts = range(0, len(decoder_blocks(job.model)), job.method.block_size)
    finished = {} if folder is None else load_windows(folder, starts)
    if len(finished) == len(starts):
        for window in finished.values():
            _install(job.model, window.packed)
            _emit(window.measured, on_metric)
        return
    inputs, arguments = capture_inputs(job.model, job.tokens, job.method.batch_size)
    full_inputs = quant_inputs = inputs.cpu()
    unit = "window" if job.method.block_size > 1 else "block"
    with tqdm(starts, desc="quantize", unit=unit, disable=not progress) as bar:
        for start in starts:
            window, full_inputs, quant_inputs = _advance(
                job, start, arguments, full_inputs, quant_inputs, finished.get(start), _with_bar(on_metric, bar)
            )
            if folder is not None and start not in finished:
                save_window(folder, start, window)
            bar.update()


def _advance(
    job: _Quantization,
    start: int,
    arguments: list[BlockArguments],
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

    window = _open_window(job, start, arguments, full_inputs, quant_inputs, record)
    if finished is None:
        packed = _in_own_memory(job.method.quantize_window(window))
        _report_linears(window, packed, job.method)
    else:
        packed = {name: _moved(weight, job.device) for name, weight in finished.packed.items()}
        _emit(finished.measured, on_metric)
    if window.full_outputs is not None:
        full_inputs = window.full_outputs
    quant_inputs = _close_window(job, window, packed)
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
            {key: t.clone(memory_format=torch.contiguous_format) for key, t in weight.state_dict().items()}
        )
        for name, weight in packed.items()
    }


def _moved(weight: PackedWeight, device: torch.device) -> PackedWeight:
    return weight.with_tensors({key: tensor.to(device) for key, tensor in weight.state_dict().items()})


def _open_window(
    job: _Quantization,
    start: int,
    arguments: list[BlockArguments],
    full_inputs: Tensor,
    quant_inputs: Tensor,
    on_metric: OnMetric,
) -> Window:
    row, masks = architecture_of(job.model), job.salient_masks
    blocks = list(decoder_blocks(job.model))[start : start + job.method.block_size]
    # Methods work in float32, which holds half-precision checkpoints exactly.
    replicas = [copy.deepcopy(block).to(job.device, torch.float32) for block in blocks]
    groups = [[f"{start + i}.{path}" for path in group] for i in range(len(blocks)) for group in row.linears]
    names = [name for group in groups for name in group]
    calls = [arguments[start + i].to(job.device) for i in range(len(blocks))]
    window = Window(
        first_block=start,
        blocks=replicas,
        input_groups=groups,
        linears={name: _linear(replicas, start, name) for name in names},
        quant_inputs=quant_inputs,
        full_outputs=None,
        activations={},
        salient_masks=None if masks is None else {name: masks[name].to(job.device) for name in names},
        run_block=lambda i, hidden: calls[i].call(replicas[i], hidden),
        generator=lambda stage: stage_generator(job.seed, stage, start),
        on_metric=on_metric,
        device=job.device,
    )
    if job.method.needs_full_chain:
        window.activations, window.full_outputs = _run_full_chain(window, job.method, full_inputs)
    return window


def _linear(blocks: list[nn.Module], start: int, name: str) -> nn.Linear:
    index, path = name.split(".", 1)
    module = blocks[int(index) - start].get_submodule(path)
    assert isinstance(module, nn.Linear)
    return module


def _run_full_chain(window: Window, method: Method, full_inputs: Tensor) -> tuple[dict[str, ActivationScale], Tensor]:
    """Run the full-precision chain through the window, and measure the activation scales of each linear's input."""
    seen: dict[str, tuple[Tensor, Tensor, Tensor]] = {}

    def measure(name: str, _: nn.Module, args: tuple[Tensor, ...]) -> None:
        absolute = args[0].detach().flatten(0, -2).abs().float()
        maximum, total, squares = absolute.amax(0), absolute.sum(0), absolute.square().sum(0)
        if name in seen:
            maximum = torch.maximum(seen[name][0], maximum)
            total, squares = seen[name][1] + total, seen[name][2] + squares
        seen[name] = maximum, total, squares

    leaders = [group[0] for group in window.input_groups]  # the others of a group have the same input
    hooks = [window.linears[name].register_forward_pre_hook(partial(measure, name)) for name in leaders]
    try:
        outputs = window.run_all(full_inputs, method.batch_size, method.compute_dtype)
    finally:
        for hook in hooks:
            hook.remove()
    n = full_inputs.shape[0] * full_inputs.shape[1]
    return {name: ActivationScale(top, total / n, squares / n) for name, (top, total, squares) in seen.items()}, outputs


def _report_linears(window: Window, packed: dict[str, PackedWeight], method: Method) -> None:
    """Emit each linear's size and its relative output error on the first calibration sequence."""
    errors: dict[str, float] = {}
    n_tokens = window.quant_inputs.shape[1]

    def compare(name: str, linear: nn.Module, args: tuple[Tensor, ...]) -> None:
        assert isinstance(linear, nn.Linear)
        x = args[0].detach().flatten(0, -2)[:n_tokens]
        difference = packed[name].dequantize() - linear.weight
        error, size = ((x @ w.T.to(x.dtype)).float().square().sum() for w in (difference, linear.weight))
        errors[name] = float(error / size.clamp(min=torch.finfo(torch.float32).tiny))

    hooks = [linear.register_forward_pre_hook(partial(compare, name)) for name, linear in window.linears.items()]
    try:
        with torch.no_grad(), window.autocast(method.compute_dtype):
            window.run(window.to_device(window.quant_inputs[: method.batch_size]))
    finally:
        for hook in hooks:
            hook.remove()
    for name, weight in packed.items():
        window.on_metric("output_error", errors[name], linear=name)
        window.on_metric("nbytes", weight.nbytes, linear=name)
        window.on_metric("bits_per_weight", weight.bits_per_weight, linear=name)


def _close_window(job: _Quantization, window: Window, packed: dict[str, PackedWeight]) -> Tensor:
    """Put the packed linears into the model and return the quantized chain's outputs.

    Nothing reads those of the last window, so they are not computed.
    """
    for name, weight in packed.items():
        window.replace(name, PackedLinear(weight, window.linears[name].bias))
    _install(job.model, packed)
    if window.first_block + len(window.blocks) == len(decoder_blocks(job.model)):
        return window.quant_inputs
    with dense_cache(nn.ModuleList(window.blocks), COMPUTE_DTYPES[job.method.compute_dtype]):
        return window.run_all(window.quant_inputs, job.method.batch_size, job.method.compute_dtype)


def _install(model: PreTrainedModel, packed: dict[str, PackedWeight]) -> None:
    """Replace linears of the model by packed ones on the same devices."""
    blocks = decoder_blocks(model)
    for name, weight in packed.items():
        index, path = name.split(".", 1)
        original = blocks[int(index)].get_submodule(path)
        assert isinstance(original, nn.Linear)
        blocks[int(index)].set_submodule(path, PackedLinear(_moved(weight, original.weight.device), original.bias))


def _with_bar(on_metric: OnMetric, bar: Any) -> OnMetric:
    """Return an ``on_metric`` that also shows the loss beside the progress bar."""

    def emit(name: str, value: float, /, **where: int | str) -> None:
        if name == "loss":
            bar.set_postfix_str(f"loss {value:.4f}", refresh=True)
        on_metric(name, value, **where)

    return emit


def _check_takes_masks(method: Method) -> None:
    if not method.takes_salient_masks:
        raise UserError(
            f"salient_masks: {type(method).__name__} has no salient channels; use PTQ161, or leave the masks out."
        )


def _check_tokens(model: PreTrainedModel, tokens: Tensor) -> None:
    check_tokens(model, tokens, "calibration", "[n_samples, seq_len]")
    longest = max_seq_len(model.config)
    if tokens.shape[1] > longest:
        raise UserError(
            f"calib.seq_len={tokens.shape[1]}: the model takes at most {longest} tokens; "
            f"set calib.seq_len to at most {longest}."
        )
