"""Finished windows of decoder blocks on disk, from which a quantization that was cut off goes on.

A folder belongs to one quantization, which ``fingerprint.json`` describes by content::

    fingerprint.json
    block_00000.safetensors     the packed tensors of the window that begins with block 0; its metadata say which
    block_00001.safetensors     formats they have and what was measured while the window was quantized

Activations are not kept: both chains are computed again through the finished blocks, which takes a small part of the
time that quantizing them took and gives the same bytes.
"""

from __future__ import annotations

import dataclasses
import json
import logging
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import safetensors.torch
import torch
from safetensors import SafetensorError, safe_open
from torch import Tensor
from transformers import PreTrainedModel

from ptq161.files.atomic import write_atomically
from ptq161.files.fingerprints import SOURCES, claim, describe, device_name, key_of, versions
from ptq161.files.hashing import sha256_of_tensors
from ptq161.files.strict_json import decode_json, encode_json
from ptq161.methods.base import Method
from ptq161.packed.weight import PackedWeight, packed_weight_from

log = logging.getLogger(__name__)

ADVICE = "give quantize another folder to resume from (run.py: set PTQ161_STORE to a writable folder, or cache=false)"
METADATA = "window"  # a single key: safetensors writes several in random order

Measured = list[tuple[str, float, dict[str, int | str]]]
"""Name, value and place of every number that a window's quantization told, in their order."""


@dataclasses.dataclass(frozen=True)
class FinishedWindow:
    """A window as it was stored.

    Attributes:
        packed: a packed weight, in host memory, for each linear.
        measured: the numbers that quantizing it told.
    """

    packed: dict[str, PackedWeight]
    measured: Measured


@dataclasses.dataclass(frozen=True)
class ResumeFolder:
    """The finished windows of one quantization; made by :func:`open_folder`.

    Attributes:
        path: the folder.
        key: of the fingerprint that the folder belongs to.
    """

    path: Path
    key: str

    def load_all(self, starts: range) -> dict[int, FinishedWindow]:
        """Return the finished windows among those that begin with the blocks ``starts``."""
        found = {start: window for start in starts if (window := self.load(start)) is not None}
        if found:
            log.info("%d of %d windows of blocks are finished already", len(found), len(starts))
        return found

    def load(self, first_block: int) -> FinishedWindow | None:
        """Return the window that begins with a block; None where it is not finished, or its file is damaged."""
        file = self._file(first_block)
        if not file.exists():
            return None
        try:
            with safe_open(file, framework="pt") as opened:
                about = decode_json(opened.metadata()[METADATA])
                # Memory of torch's own, aligned as that of a tensor which was just computed: sums may depend on it.
                tensors = {name: opened.get_tensor(name).clone() for name in opened.keys()}  # noqa: SIM118  # no mapping
        except (OSError, SafetensorError, ValueError, KeyError, TypeError) as error:
            log.warning("%s is damaged (%s); its blocks are quantized again", file, error)
            return None
        if about["fingerprint"] != self.key:
            log.warning("%s belongs to another quantization; its blocks are quantized again", file)
            return None
        packed = {name: packed_weight_from(settings, _of(name, tensors)) for name, settings in about["linears"].items()}
        return FinishedWindow(packed, [(name, value, where) for name, value, where in about["measured"]])

    def save(self, first_block: int, window: FinishedWindow) -> None:
        """Write a window, whole or not at all.

        Raises:
            UserError: the disk is full, or the folder cannot be written.
        """
        tensors = {
            f"{name}.{field}": tensor.detach().cpu().contiguous().clone()
            for name, weight in window.packed.items()
            for field, tensor in weight.state_dict().items()
        }
        about = {
            "fingerprint": self.key,
            "linears": {name: weight.settings() for name, weight in window.packed.items()},
            "measured": window.measured,
        }
        content = safetensors.torch.save(tensors, {METADATA: encode_json(about)})
        write_atomically(self._file(first_block), content, ADVICE)

    def _file(self, first_block: int) -> Path:
        return self.path / f"block_{first_block:05}.safetensors"


def open_folder(path: Path, fingerprint: Mapping[str, Any]) -> ResumeFolder:
    """Make or take up the folder of a quantization.

    Args:
        path: empty, not there yet, or left by the same quantization.
        fingerprint: from :func:`fingerprint`.

    Raises:
        UserError: the folder belongs to another quantization (the sentence says what differs), holds something else,
            or cannot be written.
    """
    claim(path, fingerprint, ADVICE)
    return ResumeFolder(path, key_of(fingerprint))


def fingerprint(
    model: PreTrainedModel,
    tokens: Tensor,
    method: Method,
    *,
    seed: int,
    device: torch.device,
    salient_masks: Mapping[str, Tensor] | None = None,
) -> dict[str, Any]:
    """Describe a quantization by all that its bytes depend on.

    Args:
        model: in full precision, as it is quantized.
        tokens: ``[n_samples, seq_len]`` calibration tokens.
        method: hyperparameters.
        seed: of the methods' random numbers.
        device: where windows are worked on.
        salient_masks: as :func:`ptq161.quantize` takes them.

    Returns:
        JSON values.
    """
    return {
        "model": sha256_of_tensors(model.state_dict()),
        "config": key_of(_architecture(model)),
        "calibration": sha256_of_tensors({"tokens": tokens}),
        "method": describe(method),
        "salient_masks": None if salient_masks is None else sha256_of_tensors(salient_masks),
        "seed": seed,
        "device": device_name(device),
        # They change the order of sums, and so the last bits.
        "threads": torch.get_num_threads(),
        "versions": versions("torch", "transformers"),
        "sources": SOURCES,
    }


def _architecture(model: PreTrainedModel) -> dict[str, Any]:
    """Return the model's own config without what says where it was loaded from."""
    config: dict[str, Any] = json.loads(model.config.to_json_string(use_diff=False))
    named = {key: value for key, value in config.items() if not key.startswith("_")}
    return {**named, "attention": model.config._attn_implementation}


def _of(name: str, tensors: Mapping[str, Tensor]) -> dict[str, Tensor]:
    prefix = f"{name}."
    return {key.removeprefix(prefix): tensor for key, tensor in tensors.items() if key.startswith(prefix)}
