"""One round's training of a restoration; it updates the student's parameters in place."""

from __future__ import annotations

import torch
from torch import Tensor
from transformers import PreTrainedModel

from ptq161.methods.base import OnMetric
from ptq161.preprocess.restoration import Restoration
from ptq161.training.arithmetic.spectral import dual_range
from ptq161.training.checkpoint import TrainingCheckpoint
from ptq161.training.loop import run_steps, trained_parameters
from ptq161.training.losses import LossOf


def train(
    student: PreTrainedModel,
    loss_of: LossOf,
    tokens: Tensor,
    restoration: Restoration,
    checkpoint: TrainingCheckpoint | None,
    *,
    on_metric: OnMetric,
    seed: int,
    round_: int,
    progress: bool,
) -> None:
    """Train the parameters that require a gradient, in place.

    ``on_metric`` receives ``preprocess_loss`` (mean over the step's sequences), ``preprocess_lr`` and
    ``preprocess_tokens_per_second`` with ``round`` and ``step``, both from 0. Dropout draws from torch's global
    generator, which the caller has seeded.

    Args:
        student: from :func:`ptq161.preprocess.student.make_student`.
        loss_of: from :func:`ptq161.training.losses.objective`.
        tokens: ``[n, seq_len]`` int64, in host memory.
        restoration: hyperparameters.
        checkpoint: to continue from and to write to; None keeps none.
        on_metric: receives every metric.
        seed: the order of the sequences follows from it.
        round_: from 0.
        progress: show a progress bar.

    Raises:
        UserError: a loss is not finite, or a checkpoint cannot be written.
    """
    optimizer = torch.optim.AdamW(trained_parameters(student).values(), lr=restoration.lr, weight_decay=0.0)
    run_steps(
        student,
        optimizer,
        regularised(loss_of, student, restoration),
        tokens,
        restoration,
        checkpoint,
        on_metric=on_metric,
        seed=seed,
        where={"round": round_},
        progress=progress,
    )


def regularised(loss_of: LossOf, student: PreTrainedModel, restoration: Restoration) -> LossOf:
    """Return a loss with the dual-range regulariser of all trained weights, if the settings ask for it."""
    if not restoration.regulariser:
        return loss_of
    weights = trained_parameters(student).values()
    arguments = (restoration.regulariser_alpha1, restoration.regulariser_alpha2, restoration.regulariser)

    def with_regulariser(tokens: Tensor) -> Tensor:
        return loss_of(tokens) + torch.stack([dual_range(weight, *arguments) for weight in weights]).sum()

    return with_regulariser
