"""Checkpoints of restorative training: a killed run continues from them and ends with the same bytes.

A folder holds one training, which ``fingerprint.json`` in it describes by content. Each round has one file, replaced
atomically at each checkpoint: the trained parameters, the optimizer, the schedule, the random state and the metrics so
far. A finished round keeps only the trained parameters and the metrics, and is not trained again.
"""

from __future__ import annotations

import dataclasses
import os
import pickle
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn
from transformers import PreTrainedModel

from ptq161.driver.resume import fingerprint as quantization_fingerprint
from ptq161.errors import UserError
from ptq161.files import identity
from ptq161.files.atomic import writing
from ptq161.files.fingerprints import Fingerprint
from ptq161.files.hashing import sha256_of_tensors
from ptq161.methods.base import Method, OnMetric
from ptq161.preprocess.restoration import Restoration

ADVICE = "give restore another folder (run.py: set PTQ161_STORE to a writable folder, or cache=false)"


def fingerprint(
    model: PreTrainedModel,
    tokens: Tensor,
    calibration: Tensor,
    method: Method,
    restoration: Restoration,
    *,
    seed: int,
    device: torch.device,
) -> Fingerprint:
    """Describe a restoration by its arguments, those of :func:`restore`; this hashes the whole model."""
    return identity.restoration(
        quantization_fingerprint(model, calibration, method, seed=seed, device=device),
        training=sha256_of_tensors({"tokens": tokens}),
        settings=restoration,
    )


@dataclasses.dataclass
class StepLog:
    """The metrics of each step, kept so that a resumed run emits all of them again."""

    on_metric: OnMetric
    round: int
    rows: list[tuple[float, float, float]] = dataclasses.field(default_factory=list)

    def add(self, step: int, loss: float, lr: float, tokens_per_second: float) -> None:
        """Keep and emit the metrics of one step."""
        self.rows.append((loss, lr, tokens_per_second))
        for name, value in zip(("loss", "lr", "tokens_per_second"), self.rows[-1], strict=True):
            self.on_metric(f"preprocess_{name}", value, round=self.round, step=step)


class TrainingCheckpoint:
    """The file of one round.

    Args:
        file: beside the fingerprint.
        restoration: its ``steps`` and ``checkpoint_every`` decide when the file is written.
        device: its random state is kept beside the CPU's.
    """

    def __init__(self, file: Path, restoration: Restoration, device: torch.device) -> None:
        self.file = file
        self._steps, self._every = restoration.steps, restoration.checkpoint_every
        self._device = device

    def is_due(self, done: int) -> bool:
        """Return whether the file is written after ``done`` steps."""
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
        with writing(self.file, ADVICE):
            try:
                torch.save(state, fresh)
            except RuntimeError as error:  # what torch raises where the operating system cannot write
                raise OSError(str(error).splitlines()[0]) from error
            os.replace(fresh, self.file)

    def restore(
        self,
        parameters: Mapping[str, nn.Parameter],
        optimizer: torch.optim.Optimizer,
        schedule: torch.optim.lr_scheduler.LRScheduler,
        log: StepLog,
    ) -> int:
        """Load the state from the file, if there is one, and emit its metrics again.

        Returns:
            the number of steps that are done.

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
