"""Checkpoints of a training: a killed run continues from them and ends with the same bytes.

A folder holds one training, which ``fingerprint.json`` in it describes by content. Each part of it has one file,
replaced atomically at each checkpoint: the trained parameters, the optimizer, the schedule, the random state, the best
state on what is held out, and the metrics so far. A finished part keeps only the trained parameters and the metrics,
and is not trained again.
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

from ptq161.errors import UserError
from ptq161.files.atomic import writing
from ptq161.methods.base import OnMetric
from ptq161.training.held_out import HeldOut
from ptq161.training.settings import Training


@dataclasses.dataclass
class StepLog:
    """The metrics so far, kept so that a resumed run emits all of them again.

    Attributes:
        on_metric: receives each of them.
        group: their names begin with it.
        where: to what all of them belong, beside the step.
        rows: name, value and step, in the order in which they were emitted.
    """

    on_metric: OnMetric
    group: str
    where: Mapping[str, int]
    rows: list[tuple[str, float, int]] = dataclasses.field(default_factory=list)

    def add(self, step: int, **values: float) -> None:
        """Keep and emit metrics of one step."""
        for name, value in values.items():
            self.rows.append((name, value, step))
            self.on_metric(f"{self.group}_{name}", value, **self.where, step=step)


@dataclasses.dataclass
class TrainingState:
    """Everything that a training changes.

    Attributes:
        parameters: that are trained, by name.
        optimizer: of these.
        schedule: of its learning rates.
        log: the metrics.
        held_out: None where nothing is held out.
        kept: what quantizers of the arithmetic keep between steps, by name.
    """

    parameters: Mapping[str, nn.Parameter]
    optimizer: torch.optim.Optimizer
    schedule: torch.optim.lr_scheduler.LRScheduler
    log: StepLog
    held_out: HeldOut | None = None
    kept: Mapping[str, Tensor] = dataclasses.field(default_factory=dict)


class TrainingCheckpoint:
    """The file of one part of a training.

    Args:
        file: beside the fingerprint.
        training: its ``steps`` and ``checkpoint_every`` decide when the file is written, ``names`` what errors say.
        device: its random state is kept beside the CPU's.
    """

    def __init__(self, file: Path, training: Training, device: torch.device) -> None:
        self.file = file
        self._steps, self._every = training.steps, training.checkpoint_every
        self._device, self._advice = device, training.names.advice

    def is_due(self, done: int) -> bool:
        """Return whether the file is written after ``done`` steps."""
        return done == self._steps or done % self._every == 0

    def write(self, done: int, state: TrainingState, *, is_finished: bool) -> None:
        """Replace the file by the state after ``done`` steps.

        Raises:
            UserError: the disk is full, or the folder cannot be written.
        """
        content: dict[str, Any] = {"done": done, "rows": state.log.rows, "trained": dict(state.parameters)}
        if not is_finished:
            content |= {"optimizer": state.optimizer.state_dict(), "schedule": state.schedule.state_dict()}
            content |= {"random": self._random(), "kept": dict(state.kept)}
            if state.held_out is not None:
                content["held_out"] = state.held_out.state()
        fresh = self.file.with_suffix(".tmp")
        with writing(self.file, self._advice):
            try:
                torch.save(content, fresh)
            except RuntimeError as error:  # what torch raises where the operating system cannot write
                raise OSError(str(error).splitlines()[0]) from error
            os.replace(fresh, self.file)

    def restore(self, state: TrainingState) -> int:
        """Load the state from the file, if there is one, and emit its metrics again.

        Returns:
            the number of steps that are done; all of them where the training ended early.

        Raises:
            UserError: the file is damaged.
        """
        if not self.file.exists():
            return 0
        try:
            content = torch.load(self.file, map_location="cpu", weights_only=True)
            with torch.no_grad():
                for name, parameter in state.parameters.items():
                    parameter.copy_(content["trained"][name])
            is_finished = "optimizer" not in content
            if not is_finished:
                state.optimizer.load_state_dict(content["optimizer"])
                state.schedule.load_state_dict(content["schedule"])
                self._set_random(content["random"])
                for name, buffer in state.kept.items():
                    buffer.copy_(content["kept"][name])
                if state.held_out is not None:
                    state.held_out.load(content["held_out"])
            for name, value, step in content["rows"]:
                state.log.add(step, **{name: value})
            return self._steps if is_finished else int(content["done"])
        except (OSError, RuntimeError, KeyError, EOFError, pickle.UnpicklingError) as error:
            raise UserError(f"{self.file} is damaged: delete it to train anew.") from error

    def _random(self) -> list[Tensor]:
        cuda = [torch.cuda.get_rng_state(self._device)] if self._device.type == "cuda" else []
        return [torch.get_rng_state(), *cuda]

    def _set_random(self, states: list[Tensor]) -> None:
        torch.set_rng_state(states[0])
        if self._device.type == "cuda":
            torch.cuda.set_rng_state(states[1], self._device)
