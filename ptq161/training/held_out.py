"""Sequences that a training never sees: the best state by the loss on them, and when to stop."""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor, nn

from ptq161.training.losses import LossOf


@dataclasses.dataclass
class HeldOut:
    """What is held out, and the best state so far.

    Attributes:
        tokens: ``[n, seq_len]`` int64, in host memory.
        every: steps between two measurements; one before the first step and one after the last are made anyway.
        patience: measurements in a row without a new best, after which the training ends; None never ends it early.
        batch_size: sequences per forward pass.
        least: the least loss so far.
        misses: measurements since then.
        best: the trained parameters that had it.
    """

    tokens: Tensor
    every: int
    patience: int | None
    batch_size: int
    least: float = math.inf
    misses: int = 0
    best: dict[str, Tensor] = dataclasses.field(default_factory=dict)

    def is_due(self, done: int) -> bool:
        """Return whether the loss is measured after ``done`` steps."""
        return done % self.every == 0

    def is_over(self) -> bool:
        """Return whether the training has not improved for too long."""
        return self.patience is not None and self.misses >= self.patience

    def measure(self, loss_of: LossOf, parameters: Mapping[str, nn.Parameter]) -> float:
        """Return the mean loss over the sequences, and keep the parameters where it is the least so far."""
        device = next(iter(parameters.values())).device
        total = 0.0
        with torch.no_grad():
            for batch in self.tokens.split(self.batch_size):
                total += float(loss_of(batch.to(device))) * len(batch)
        loss = total / len(self.tokens)
        if loss < self.least or not self.best:
            self.least, self.misses = loss, 0
            self.best = {name: parameter.detach().clone() for name, parameter in parameters.items()}
        else:
            self.misses += 1
        return loss

    def restore_best(self, parameters: Mapping[str, nn.Parameter]) -> None:
        """Give the parameters their best values."""
        with torch.no_grad():
            for name, parameter in parameters.items():
                parameter.copy_(self.best[name])

    def state(self) -> dict[str, Any]:
        """Return what a checkpoint keeps."""
        return {"least": self.least, "misses": self.misses, "best": self.best}

    def load(self, state: Mapping[str, Any]) -> None:
        """Take what a checkpoint kept."""
        self.least, self.misses, self.best = state["least"], state["misses"], dict(state["best"])
