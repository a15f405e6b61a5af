"""Finished windows of decoder blocks on disk, from which an interrupted quantization continues.

A folder holds the windows of one quantization::

    fingerprint.json            describes it by content (:func:`ptq161.files.identity.quantization`)
    block_00000.safetensors     the packed tensors of the window that begins with block 0; its metadata hold their
    block_00001.safetensors     formats, the metrics of the window and a checksum of all of this
    plan.safetensors            what the method has decided for the whole model, where it does so

Activations are not kept: both chains are computed again through the finished blocks, which takes a small part of the
time that quantizing them took and gives the same bytes.
"""

from __future__ import annotations

import dataclasses
import hashlib
import logging
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import safetensors.torch
import torch
from safetensors import safe_open
from torch import Tensor
from transformers import PreTrainedModel

from ptq161.errors import UserError
from ptq161.files import identity
from ptq161.files.atomic import write_atomically
from ptq161.files.fingerprints import Fingerprint, KeyedFolder
from ptq161.files.hashing import sha256_of_tensors
from ptq161.files.reading import reading
from ptq161.files.strict_json import decode_json, encode_json
from ptq161.methods.base import Method
from ptq161.models.architectures import config_key
from ptq161.packed.lenders import packed_weights_from
from ptq161.packed.weight import PackedWeight

log = logging.getLogger(__name__)

ADVICE = "give quantize another folder to resume from (run.py: set PTQ161_STORE to a writable folder, or cache=false)"
_PLAN = "plan.safetensors"
_METADATA = "window"  # a single key: safetensors writes several in random order

Measured = list[tuple[str, float, dict[str, int | str]]]
"""The metrics of a window in the order in which they were emitted: name, value, and to what it belongs."""


@dataclasses.dataclass(frozen=True)
class FinishedWindow:
    """A window as it was stored.

    Attributes:
        packed: a packed weight, in host memory, for each linear.
        measured: the metrics that quantizing it emitted.
    """

    packed: dict[str, PackedWeight]
    measured: Measured


def finished_windows(folder: KeyedFolder, starts: Sequence[int]) -> set[int]:
    """Return which of the windows that begin with the blocks ``starts`` are finished, and their files intact."""
    found = {start for start in starts if _load(folder, start) is not None}
    if found:
        log.info("%d of %d windows of blocks are finished already", len(found), len(starts))
    return found


def load_window(folder: KeyedFolder, first_block: int) -> FinishedWindow:
    """Read a finished window.

    Raises:
        UserError: its file has been damaged since it was written.
    """
    window = _load(folder, first_block)
    if window is None:
        raise UserError(f"{_file(folder, first_block)} was damaged meanwhile; run again.")
    return window


def open_tensor(folder: KeyedFolder, first_block: int, name: str) -> Tensor:
    """Return one tensor of a finished window, memory-mapped: ``"{block}.{path}.{field}"``."""
    with safe_open(_file(folder, first_block), framework="pt") as opened:
        tensor: Tensor = opened.get_tensor(name)
        return tensor


def save_window(folder: KeyedFolder, first_block: int, window: FinishedWindow) -> None:
    """Write a window, whole or not at all.

    Raises:
        UserError: the disk is full, or the folder cannot be written.
    """
    tensors = {
        f"{name}.{field}": tensor.detach().cpu().contiguous().clone()
        for name, weight in window.packed.items()
        for field, tensor in weight.state_dict().items()
    }
    content: dict[str, Any] = {
        "fingerprint": folder.key,
        "first_block": first_block,
        "linears": {name: weight.settings() for name, weight in window.packed.items()},
        "measured": window.measured,
    }
    _write(_file(folder, first_block), content, tensors)


def save_plan(folder: KeyedFolder, plan: Mapping[str, Tensor]) -> None:
    """Write what a method has decided for the whole model, whole or not at all.

    Raises:
        UserError: the disk is full, or the folder cannot be written.
    """
    tensors = {name: tensor.detach().cpu().contiguous().clone() for name, tensor in plan.items()}
    _write(folder.path / _PLAN, {"fingerprint": folder.key}, tensors)


def load_plan(folder: KeyedFolder) -> dict[str, Tensor] | None:
    """Return the plan that was stored; None where there is none, or its file is damaged."""
    found = _read(folder.path / _PLAN, "the plan is made again")
    if found is None:
        return None
    content, tensors = found
    if content["fingerprint"] != folder.key:
        log.warning("%s belongs to another quantization; the plan is made again", folder.path / _PLAN)
        return None
    return tensors


def fingerprint(
    model: PreTrainedModel,
    tokens: Tensor,
    method: Method,
    *,
    seed: int,
    device: torch.device,
    salient_masks: Mapping[str, Tensor] | None = None,
    tensors: Mapping[str, Tensor] | None = None,
) -> Fingerprint:
    """Describe a quantization by its arguments, those of :func:`ptq161.quantize`; this hashes the whole model.

    ``tensors`` is the state dict of a model that is not in memory.
    """
    return identity.quantization(
        weights=sha256_of_tensors(model.state_dict() if tensors is None else tensors),
        config=config_key(model),
        calibration=sha256_of_tensors({"tokens": tokens}),
        method=method,
        salient_masks=None if salient_masks is None else sha256_of_tensors(salient_masks),
        seed=seed,
        device=device,
    )


def _load(folder: KeyedFolder, first_block: int) -> FinishedWindow | None:
    """Return the window that begins with a block; None where it is not finished, or its file is damaged."""
    file = _file(folder, first_block)
    found = _read(file, "its blocks are quantized again")
    if found is None:
        return None
    content, tensors = found
    if (content["fingerprint"], content["first_block"]) != (folder.key, first_block):
        log.warning("%s belongs to another quantization or window; its blocks are quantized again", file)
        return None
    linears = content["linears"]
    packed = packed_weights_from(linears, {name: _linear_tensors(name, tensors) for name in linears})
    return FinishedWindow(packed, [(name, value, where) for name, value, where in content["measured"]])


def _write(file: Path, content: dict[str, Any], tensors: Mapping[str, Tensor]) -> None:
    checked = {**content, "sha256": _checksum(content, tensors)}
    write_atomically(file, safetensors.torch.save(dict(tensors), {_METADATA: encode_json(checked)}), ADVICE)


def _read(file: Path, otherwise: str) -> tuple[dict[str, Any], dict[str, Tensor]] | None:
    if not file.exists():
        return None
    try:
        with reading(file, otherwise), safe_open(file, framework="pt") as opened:
            content = decode_json(opened.metadata()[_METADATA])
            # Copied into torch's own memory: sums may depend on a tensor's alignment.
            tensors = {name: opened.get_tensor(name).clone() for name in opened.keys()}  # noqa: SIM118  # no mapping
            if content.pop("sha256") != _checksum(content, tensors):
                raise ValueError("its checksum is another")
    except UserError as error:
        log.warning("%s", error)
        return None
    return content, tensors


def _checksum(content: Mapping[str, Any], tensors: Mapping[str, Tensor]) -> str:
    """Hash a window's metadata and its tensors."""
    return hashlib.sha256(f"{encode_json(content)}\0{sha256_of_tensors(tensors)}".encode()).hexdigest()


def _file(folder: KeyedFolder, first_block: int) -> Path:
    return folder.path / f"block_{first_block:05}.safetensors"


def _linear_tensors(name: str, tensors: Mapping[str, Tensor]) -> dict[str, Tensor]:
    prefix = f"{name}."
    return {key.removeprefix(prefix): tensor for key, tensor in tensors.items() if key.startswith(prefix)}
