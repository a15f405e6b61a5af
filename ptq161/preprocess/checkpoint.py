"""Checkpoints of restorative training: a killed run goes on from them, and ends in the same bytes.

A folder belongs to one training, which ``fingerprint.json`` in it describes by content. Each round has one file, whole
or not at all, that the next one replaces: what is trained, the optimiser, the schedule, the random state and the
numbers so far. A finished round keeps the trained weights alone, and is not trained again.
"""

from __future__ import annotations

import dataclasses
import hashlib
import json
import os
import pickle
from collections.abc import Mapping
from importlib.metadata import version
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor, nn
from transformers import PreTrainedModel

from ptq161.errors import UserError
from ptq161.methods.base import Method
from ptq161.preprocess.restoration import Restoration
from ptq161.tracking.files import write_atomically, writing
from ptq161.tracking.hashing import sha256_of_sources, sha256_of_tensors

if TYPE_CHECKING:
    from ptq161.preprocess.training import StepLog

FINGERPRINT = "fingerprint.json"
LIBRARIES = ("torch", "transformers", "peft")

# They change nothing in the restored weights.
_INDIFFERENT = ("checkpoint_every", "save_merged", "score_merged", "text_file")


def fingerprint(
    model: PreTrainedModel, tokens: Tensor, calibration: Tensor, method: Method, restoration: Restoration, seed: int
) -> dict[str, str]:
    """Describe a training by everything that its result depends on; small enough to be read."""
    settings = {k: v for k, v in dataclasses.asdict(restoration).items() if k not in _INDIFFERENT}
    return {
        "model": sha256_of_tensors(model.state_dict()),
        "training tokens": sha256_of_tensors({"tokens": tokens}),
        "calibration tokens": sha256_of_tensors({"tokens": calibration}),
        "method": repr(method),
        **{f"preprocess.{key}": json.dumps(value) for key, value in settings.items()},
        "seed": str(seed),
        "threads": str(torch.get_num_threads()),
        "sources": sha256_of_sources(),
        **{name: version(name) for name in LIBRARIES},
    }


def sha256_of_fingerprint(found: Mapping[str, str]) -> str:
    """Name a training by its content: 64 hexadecimal digits."""
    return hashlib.sha256(json.dumps(dict(found), sort_keys=True).encode()).hexdigest()


def claim(folder: Path, mine: Mapping[str, str]) -> None:
    """Make a folder the one of a training.

    Raises:
        UserError: it belongs to another one, or cannot be written.
    """
    file = folder / FINGERPRINT
    if not file.exists():
        with writing(folder):
            folder.mkdir(parents=True, exist_ok=True)
        write_atomically(file, json.dumps(dict(mine), indent=1) + "\n")
        return
    try:
        theirs = dict(json.loads(file.read_text(encoding="utf-8")))
    except (OSError, ValueError) as error:
        raise UserError(f"{file} cannot be read ({error}): delete the folder to train anew.") from error
    differing = [key for key in {**theirs, **mine} if theirs.get(key) != mine.get(key)]
    if differing:
        key = differing[0]
        raise UserError(
            f"the checkpoints in {folder} are of another training: {key} was {theirs.get(key)} and is "
            f"{mine.get(key)}; use another folder, or delete it to train anew."
        )


class TrainingCheckpoint:
    """The file of one round.

    Args:
        file: beside the fingerprint.
        restoration: says how often it is written and when training ends.
        device: whose random state counts beside the CPU's.
    """

    def __init__(self, file: Path, restoration: Restoration, device: torch.device) -> None:
        """See the class."""
        self.file = file
        self._steps, self._every = restoration.steps, restoration.checkpoint_every
        self._device = device

    def is_due(self, done: int) -> bool:
        """Whether to write after ``done`` steps."""
        return done == self._steps or done % self._every == 0

    def write(
        self,
        done: int,
        parameters: Mapping[str, nn.Parameter],
        optimizer: torch.optim.Optimizer,
        schedule: torch.optim.lr_scheduler.LRScheduler,
        log: StepLog,
    ) -> None:
        """Replace the file by the state after ``done`` steps.

        Raises:
            UserError: the disk is full, or the folder cannot be written.
        """
        state: dict[str, Any] = {"done": done, "rows": log.rows, "trained": dict(parameters)}
        if done < self._steps:
            state |= {"optimizer": optimizer.state_dict(), "schedule": schedule.state_dict(), "random": self._random()}
        fresh = self.file.with_suffix(".tmp")
        with writing(self.file):
            try:
                torch.save(state, fresh)
            except RuntimeError as error:  # torch's writer hides the operating system's reason
                raise OSError(str(error).splitlines()[0]) from error
            os.replace(fresh, self.file)

    def restore(
        self,
        parameters: Mapping[str, nn.Parameter],
        optimizer: torch.optim.Optimizer,
        schedule: torch.optim.lr_scheduler.LRScheduler,
        log: StepLog,
    ) -> int:
        """Go on from the file, where there is one; its numbers are told again.

        Returns:
            the steps that are done.

        Raises:
            UserError: the file is damaged.
        """
        if not self.file.exists():
            return 0
        try:
            state = torch.load(self.file, map_location="cpu", weights_only=True)
            with torch.no_grad():
                for name, parameter in parameters.items():
                    parameter.copy_(state["trained"][name])
            if state["done"] < self._steps:
                optimizer.load_state_dict(state["optimizer"])
                schedule.load_state_dict(state["schedule"])
                self._set_random(state["random"])
            for step, row in enumerate(state["rows"]):
                log.add(step, *row)
            return int(state["done"])
        except (OSError, RuntimeError, KeyError, EOFError, pickle.UnpicklingError) as error:
            raise UserError(f"{self.file} is damaged: delete it to train this round anew.") from error

    def _random(self) -> list[Tensor]:
        cuda = [torch.cuda.get_rng_state(self._device)] if self._device.type == "cuda" else []
        return [torch.get_rng_state(), *cuda]

    def _set_random(self, states: list[Tensor]) -> None:
        torch.set_rng_state(states[0])
        if self._device.type == "cuda":
            torch.cuda.set_rng_state(states[1], self._device)
