"""Quantization of a model that is never in memory as a whole: from a Hugging Face folder to a packed checkpoint.

The driver is that of :func:`ptq161.quantize`. The weights of a window's blocks are read from the shards while the
window is worked on; its packed weights go to a file of their own, and at the end tensor by tensor into the checkpoint.
What stays in memory are the activations of both chains, and, mapped from the shards, what is not quantized.
"""

from __future__ import annotations

import shutil
from collections.abc import Mapping
from pathlib import Path

import torch
from torch import Tensor
from transformers import AutoTokenizer, PreTrainedTokenizerBase

from ptq161.checks import check_choice
from ptq161.driver.quantization import Quantization, check_masks, check_method, checked_tokens, quantize_blocks
from ptq161.driver.resume import ADVICE, fingerprint, load_window, open_tensor
from ptq161.driver.windows import install
from ptq161.errors import UserError
from ptq161.files.atomic import writing
from ptq161.files.fingerprints import KeyedFolder, claim
from ptq161.files.reading import reading
from ptq161.methods.base import Method, OnMetric, PlanningMethod, ignore_metric
from ptq161.methods.embeddings import quantize_embeddings
from ptq161.models.architectures import blocks_path
from ptq161.models.checks import evaluation_mode
from ptq161.models.settings import EMBEDDING_BITS, ModelConfig
from ptq161.models.stored import StoredModel
from ptq161.numerics import plain_torch, working_device
from ptq161.packed.layout import TENSOR_METADATA, WEIGHTS_FILE, checkpoint_folder, write_around
from ptq161.packed.model import cast_rest, packed_linears, stored_tensors
from ptq161.packed.tensor_file import write_tensors

_WINDOWS = "windows"
_TOKENIZER_FILES = ("tokenizer_config.json", "tokenizer.json", "tokenizer.model")


@plain_torch()
def quantize_folder(
    folder: str | Path,
    tokens: object,
    method: Method,
    out: str | Path,
    *,
    on_metric: OnMetric | None = None,
    seed: int = 0,
    device: torch.device | str | None = None,
    progress: bool = False,
    salient_masks: Mapping[str, Tensor] | None = None,
    resume: Path | str | KeyedFolder | None = None,
    nominal_bits: float | None = None,
    embedding_bits: int = 16,
    overwrite: bool = False,
) -> Path:
    """Quantize the model in a folder into a packed checkpoint, with a few decoder blocks in memory at a time.

    The checkpoint has the bytes that :func:`ptq161.quantize` and :func:`ptq161.save` give for the loaded model. Until
    it is whole, the packed weights take twice their room beside ``out``.

    Args:
        folder: of a Hugging Face model with safetensors: one file, or shards and their index.
        tokens: ``[n_samples, seq_len]`` integer calibration tokens, as for :func:`ptq161.quantize`.
        method: hyperparameters; one that plans for the whole model (waterfill's ``level="model"``) is refused.
        out: folder of the checkpoint: absent or empty, and there with all of its files or left as it was. The folder's
            tokenizer is saved in it, where the folder has one.
        on_metric: as for :func:`ptq161.quantize`.
        seed: the methods' random numbers follow from it.
        device: where windows are worked on; None is the CPU.
        progress: show a progress bar over the blocks.
        salient_masks: as for :func:`ptq161.quantize`.
        resume: a folder that keeps each finished window, as for :func:`ptq161.quantize`, with which it is
            interchangeable; to check a path, the whole model is read once more. None keeps them inside of ``out`` until
            the checkpoint is whole.
        nominal_bits: as for :func:`ptq161.save`.
        embedding_bits: as for :func:`ptq161.quantize_embeddings`, which 8 or 4 call.
        overwrite: replace a checkpoint that this project wrote.

    Returns:
        the checkpoint's safetensors file.

    Raises:
        UserError: the folder has no such model, or a shard or a tensor of it is missing; the method plans for the whole
            model; ``out`` holds files or cannot be written; the disk is full; see also :func:`ptq161.quantize`.
    """
    check_method(method)
    check_no_plan(method)
    return quantize_stored(
        StoredModel(ModelConfig(name=Path(folder).name, path=str(folder))),
        tokens,
        method,
        out,
        tokenizer=_tokenizer(Path(folder).expanduser()),
        on_metric=on_metric,
        seed=seed,
        device=device,
        progress=progress,
        salient_masks=salient_masks,
        resume=resume,
        nominal_bits=nominal_bits,
        embedding_bits=embedding_bits,
        overwrite=overwrite,
    )


@plain_torch()
def quantize_stored(
    stored: StoredModel,
    tokens: object,
    method: Method,
    out: str | Path,
    *,
    tokenizer: PreTrainedTokenizerBase | None = None,
    dtype: torch.dtype | None = None,
    on_metric: OnMetric | None = None,
    seed: int = 0,
    device: torch.device | str | None = None,
    progress: bool = False,
    salient_masks: Mapping[str, Tensor] | None = None,
    resume: Path | str | KeyedFolder | None = None,
    nominal_bits: float | None = None,
    embedding_bits: int = 16,
    overwrite: bool = False,
) -> Path:
    """Quantize a model that is in a folder; the arguments that :func:`quantize_folder` has are as there.

    Args:
        stored: the model, which is used up: what it keeps in memory is changed.
        tokens: as there.
        method: as there, and so are the arguments that follow, but for:
        out: as there.
        tokenizer: saved in the checkpoint; None saves none.
        dtype: of everything but the packed weights; None leaves it as it is.
        on_metric: as there.
        seed: as there.
        device: as there.
        progress: as there.
        salient_masks: as there.
        resume: as there.
        nominal_bits: as there.
        embedding_bits: as there.
        overwrite: as there.

    Returns:
        the checkpoint's safetensors file.

    Raises:
        UserError: as there.
    """
    check_choice("model.embedding_bits", embedding_bits, EMBEDDING_BITS)
    model = stored.model
    tokens = checked_tokens(model, tokens)
    check_masks(model, method, salient_masks)
    target = working_device(device, torch.device("cpu"))
    with checkpoint_folder(out, overwrite=overwrite) as scratch:
        if isinstance(resume, Path | str):
            with stored.tensors() as tensors:
                described = fingerprint(
                    model, tokens, method, seed=seed, device=target, salient_masks=salient_masks, tensors=tensors
                )
            resume = claim(Path(resume).expanduser(), described, ADVICE)
        windows = KeyedFolder(scratch / _WINDOWS, "") if resume is None else resume
        with writing(windows.path, ADVICE):
            windows.path.mkdir(parents=True, exist_ok=True)
        job = Quantization(model, tokens, method, seed, target, salient_masks, stored.resident)
        with evaluation_mode(model):
            quantize_blocks(job, windows, on_metric or ignore_metric, progress)
        _write_checkpoint(job, windows, scratch, dtype, embedding_bits)
        shutil.rmtree(scratch / _WINDOWS, ignore_errors=True)
        write_around(model, tokenizer, scratch, nominal_bits)
    return Path(out).expanduser() / WEIGHTS_FILE


def check_no_plan(method: Method) -> None:
    """Check that a method does not plan for the whole model.

    Raises:
        UserError: it does.
    """
    if isinstance(method, PlanningMethod) and method.needs_plan:
        raise UserError(
            f"{type(method).__name__} plans for the whole model, which is not in memory: use method.level=linear, or "
            "ptq161.quantize (run.py: model.stream=false)."
        )


def _write_checkpoint(
    job: Quantization, windows: KeyedFolder, folder: Path, dtype: torch.dtype | None, embedding_bits: int
) -> None:
    """Put packed linears without values into the model, and write the tensors of the windows and of the model."""
    model = job.model
    first_blocks = {block: blocks[0] for blocks in job.windows for block in blocks}
    if not packed_linears(model):  # they are there if every window was finished before
        for blocks in job.windows:
            install(model, load_window(windows, blocks[0]).packed)
    quantize_embeddings(model, embedding_bits)
    if dtype is not None:
        cast_rest(model, dtype)
    layouts = stored_tensors(model)
    prefix = f"{blocks_path(model)}."

    def read(name: str) -> Tensor:
        if not layouts[name].is_meta:
            return layouts[name]
        inside = name.removeprefix(prefix)
        return open_tensor(windows, first_blocks[int(inside.partition(".")[0])], inside)

    write_tensors(folder / WEIGHTS_FILE, layouts, read, TENSOR_METADATA)


def _tokenizer(folder: Path) -> PreTrainedTokenizerBase | None:
    if not any((folder / name).is_file() for name in _TOKENIZER_FILES):
        return None
    with reading(folder, "save the tokenizer again"):
        tokenizer: PreTrainedTokenizerBase = AutoTokenizer.from_pretrained(folder, trust_remote_code=False)
        return tokenizer
