"""The arithmetic of Metis: NVFP4, MXFP4 or FP8 for all operands, split by their spectrum (arXiv 2509.00404).

Inputs, weights and output gradients are quantized once, in blocks along their last dimension, and what came out enters
both of their products, as in the released code. There the weight takes the format of the input whatever its own is;
here all three have one. With ``spectral_rank``, each of them is ``Q(U) S Q(V)^T + Q(R)``
(:mod:`~ptq161.training.arithmetic.spectral`). The subspace V is estimated from a hundredth of the rows every
``refresh_every`` steps and kept in between, when U and S are the projections on it. The released code keeps what it
remembers per class, for all linears alike; here each matrix has its own.
"""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from functools import partial
from typing import Any

import torch
from torch import Tensor

from ptq161.checks import check_at_least, check_choice
from ptq161.errors import UserError
from ptq161.training.arithmetic.base import Arithmetic, ArithmeticSettings, StatefulQuantizer
from ptq161.training.arithmetic.blockfloat import quantize
from ptq161.training.arithmetic.spectral import (
    FACTORS,
    SCHEDULES,
    Rounding,
    Uniforms,
    project,
    quantize_spectral,
    sampled_subspace,
)

FORMATS = {"nvfp4": "nvfp4e2m1b", "mxfp4": "mxfp4e2m1b", "fp8": "fp8e4m3"}
"""Values of the setting ``format`` -> formats of :mod:`~ptq161.training.arithmetic.blockfloat`."""

NAMES = ("metis", *FORMATS)
"""Names of this arithmetic: ``metis`` takes the format of the setting ``format``, the others are formats themselves."""


class SpectralQuantizer(StatefulQuantizer):
    """The spectral product of a matrix whose dominant subspace is remembered.

    Args:
        columns: of the matrix.
        rank: of the subspace, below ``columns``.
        rounding: of the format.
        every: backward passes between two estimates of the subspace.
        stochastic: round at random, with torch's global generator.
        factors: one of ``FACTORS``.
        schedule: one of ``SCHEDULES``.
    """

    basis: Tensor
    passes: Tensor

    def __init__(
        self,
        columns: int,
        rank: int,
        rounding: Rounding,
        every: int,
        *,
        stochastic: bool,
        factors: str = "format",
        schedule: str = "none",
    ) -> None:
        super().__init__()
        self.rounding, self.every, self.stochastic = rounding, every, stochastic
        self.factors, self.schedule = factors, schedule
        # The part in a subspace of zeros is zero, and all of the matrix is the residual.
        self.register_buffer("basis", torch.zeros(columns, rank))
        self.register_buffer("passes", torch.zeros((), dtype=torch.int64))

    def forward(self, matrix: Tensor, dim: int) -> Tensor:
        """Return what the format holds of ``[m, columns]``; the subspace is of its rows, whatever ``dim`` is."""
        matrix = matrix.detach().float()
        rows, rank = len(matrix), self.basis.shape[1]
        # A matrix of fewer rows has no such subspace, and one that is not finite none at all: a training ends there.
        is_due = int(self.passes) % self.every == 0 and rows > rank
        if is_due and bool(matrix.isfinite().all()):
            self.basis.copy_(sampled_subspace(matrix, rank))
        draw = partial(torch.rand, device=matrix.device)
        uniforms = Uniforms()
        if self.stochastic:
            uniforms = Uniforms(draw(rank, rows), draw(self.basis.T.shape), draw(matrix.shape))
        return quantize_spectral(
            matrix,
            project(matrix, self.basis),
            self.rounding,
            uniforms,
            factors=self.factors,
            schedule=self.schedule,
        )


class GradientQuantizer(SpectralQuantizer):
    """The spectral product of output gradients, of which each pass has one: it counts the passes of the others, too.

    So a forward pass that is repeated, or that has no backward pass, remembers what the first one did.
    """

    others: tuple[SpectralQuantizer, ...] = ()

    def forward(self, matrix: Tensor, dim: int) -> Tensor:
        """Return what the format holds of ``[m, columns]``."""
        values = super().forward(matrix, dim)
        for quantizer in (self, *self.others):
            quantizer.passes += 1
        return values


def arithmetic(settings: ArithmeticSettings, weight: Tensor) -> Arithmetic:
    """Return the arithmetic of Metis for the products with one weight ``[out, in]``.

    Raises:
        UserError: the rank is not below both dimensions of the weight.
    """
    format = FORMATS[settings.arithmetic if settings.arithmetic in FORMATS else settings.format]
    rank, stochastic = settings.spectral_rank, settings.stochastic_rounding
    if not rank:
        direct = partial(_direct, format=format, stochastic=stochastic)
        return Arithmetic(direct, direct, direct, quantizes_once=True)
    check_ranks(settings, [weight.shape])
    rounding = partial(_rounding, format=format)
    every = settings.refresh_every * settings.accumulation
    outputs, inputs = weight.shape
    options: dict[str, Any] = {"stochastic": stochastic, "factors": settings.spectral_factors}
    of_input, of_weight = (SpectralQuantizer(inputs, rank, rounding, every, **options) for _ in range(2))
    of_gradient = GradientQuantizer(outputs, rank, rounding, every, schedule=settings.spectral_schedule, **options)
    of_gradient.others = (of_input, of_weight)
    return Arithmetic(of_input, of_weight, of_gradient, quantizes_once=True)


def check_metis(group: str, settings: ArithmeticSettings) -> None:
    """Check the settings.

    Args:
        group: the configuration group, for the error.
        settings: of a training.

    Raises:
        UserError: a value is out of range.
    """
    check_choice(f"{group}.format", settings.format, FORMATS)
    check_choice(f"{group}.spectral_factors", settings.spectral_factors, FACTORS)
    check_choice(f"{group}.spectral_schedule", settings.spectral_schedule, SCHEDULES)
    check_at_least(f"{group}.spectral_rank", settings.spectral_rank, 0)
    check_at_least(f"{group}.refresh_every", settings.refresh_every, 1)
    if settings.spectral_schedule != "none" and not settings.spectral_rank:
        raise UserError(
            f"{group}.spectral_schedule={settings.spectral_schedule}: it changes singular values that are split off; "
            f"set {group}.spectral_rank to at least 1."
        )


def check_ranks(settings: ArithmeticSettings, sizes: Iterable[Sequence[int]]) -> None:
    """Check that each trained matrix has more singular values than are split off.

    Args:
        settings: of a training, in any arithmetic.
        sizes: of the matrices.

    Raises:
        UserError: one has not.
    """
    rank = settings.spectral_rank if settings.arithmetic in NAMES else 0
    least = min((min(of_one) for of_one in sizes), default=rank + 1)
    if rank and rank >= least:
        raise UserError(
            f"{settings.names.group}.spectral_rank={rank}: a trained matrix has only {least} rows or columns; use "
            "less, or 0."
        )


def _rounding(x: Tensor, uniform: Tensor | None, *, format: str) -> Tensor:
    # The stated formats: the released code trains with what its slips make of them.
    return quantize(x, format, uniform, as_released=False)


def _direct(matrix: Tensor, dim: int, *, format: str, stochastic: bool) -> Tensor:
    uniform = torch.rand(matrix.shape, device=matrix.device) if stochastic else None
    return _rounding(matrix.detach(), uniform, format=format)
