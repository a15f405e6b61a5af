"""What the loop reads of a training's settings, and the checks that trainings share.

The settings themselves are a dataclass of the room that trains: :class:`ptq161.preprocess.Restoration`.
"""

from __future__ import annotations

import math
from collections.abc import Iterable
from typing import NamedTuple, Protocol

from ptq161.checks import check_choice
from ptq161.data.settings import CALIBRATION_SETS
from ptq161.errors import UserError

TRAINING_DTYPES = ("float32", "bfloat16")
"""Dtypes of the products; float16 would need loss scaling, which the loop does not have."""


class Names(NamedTuple):
    """What a training is called.

    Attributes:
        group: its configuration group, with which its metrics and the settings in errors begin.
        function: that the library's user calls.
        title: in sentences.
        bar: on the progress bar.
        stage: its random numbers belong to.
        rates: the settings of its learning rates, for the sentence of a loss that is not finite.
    """

    group: str
    function: str
    title: str
    bar: str
    stage: str
    rates: str

    @property
    def advice(self) -> str:
        """What to do where its folder cannot be written."""
        return f"give {self.function} another folder (run.py: set PTQ161_STORE to a writable folder, or cache=false)"


class Training(Protocol):
    """Settings of a training, as the loop reads them; a frozen dataclass."""

    @property
    def names(self) -> Names:
        """What it is called."""

    @property
    def objective(self) -> str:
        """``lm``, ``kl`` or ``kl_hidden``."""

    @property
    def hidden_weight(self) -> float:
        """Weight of the hidden states in ``kl_hidden``."""

    @property
    def warmup_share(self) -> float:
        """Share of the steps over which the rates rise; they fall to zero along a cosine."""

    @property
    def max_grad_norm(self) -> float:
        """Gradients are scaled down to this norm."""

    @property
    def steps(self) -> int:
        """Optimizer steps."""

    @property
    def batch_size(self) -> int:
        """Sequences per forward pass."""

    @property
    def accumulation(self) -> int:
        """Forward passes per step."""

    @property
    def seq_len(self) -> int:
        """Tokens per sequence."""

    @property
    def sequences(self) -> int:
        """Sequences that are taken from the text."""

    @property
    def corpora(self) -> list[str]:
        """Training text, each one of ``ptq161.data.settings.CALIBRATION_SETS``."""

    @property
    def corpora_read(self) -> list[str]:
        """Those of ``corpora`` that are read: none where the text is sampled."""

    @property
    def text_file(self) -> str | None:
        """The file of the corpus ``text_file``."""

    @property
    def compute_dtype(self) -> str:
        """Dtype of matrix products and frozen weights, one of ``TRAINING_DTYPES``."""

    @property
    def checkpoint_every(self) -> int:
        """Steps between two checkpoints."""


def check_training(training: Training) -> None:
    """Check what all trainings have.

    Raises:
        UserError: a value is out of range.
    """
    group = training.names.group
    check_choice(f"{group}.compute_dtype", training.compute_dtype, TRAINING_DTYPES)
    check_list(f"{group}.corpora", training.corpora, CALIBRATION_SETS)
    if "text_file" in training.corpora and not training.text_file:
        raise UserError(f"{group}.corpora=[text_file] needs a file: set {group}.text_file=FILE.")
    check_counts(training, ("steps", "batch_size", "accumulation", "checkpoint_every"))
    if training.seq_len < 2:
        raise UserError(f"{group}.seq_len={training.seq_len}: use at least 2.")
    check_positive(training, ("hidden_weight", "max_grad_norm"))
    check_share(training, "warmup_share")


def check_counts(training: Training, names: Iterable[str], least: int = 1) -> None:
    """Check that settings are at least ``least``.

    Raises:
        UserError: one is not.
    """
    for name in names:
        if getattr(training, name) < least:
            raise UserError(f"{training.names.group}.{name}={getattr(training, name)}: use at least {least}.")


def check_positive(training: Training, names: Iterable[str]) -> None:
    """Check that settings are finite and above zero.

    Raises:
        UserError: one is not.
    """
    for name in names:
        value = getattr(training, name)
        if not (value > 0 and math.isfinite(value)):
            raise UserError(f"{training.names.group}.{name}={value}: use a finite number above 0.")


def check_share(training: Training, name: str) -> None:
    """Check that a setting is a share in [0, 1).

    Raises:
        UserError: it is not.
    """
    if not 0 <= getattr(training, name) < 1:
        raise UserError(f"{training.names.group}.{name}={getattr(training, name)}: use a share in [0, 1).")


def check_list(setting: str, values: list[str], choices: tuple[str, ...]) -> None:
    """Check that a setting has one or more of its choices.

    Raises:
        UserError: it is empty, or a value is none of ``choices``.
    """
    if not values:
        raise UserError(f"{setting} is empty: use one or more of {', '.join(choices)}.")
    for value in values:
        check_choice(setting, value, choices)
