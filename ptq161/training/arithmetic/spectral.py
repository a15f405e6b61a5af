"""The spectral split of Metis: a few large singular values and the rest are quantized apart (arXiv 2509.00404).

A few large singular values stretch the range of a matrix, and the scales of its blocks then leave nothing of the small
ones. So ``M = U S V^T + R`` becomes ``M' = Q(U) S Q(V)^T + Q(R)``, with S in float. All functions are of tensors; none
records gradients.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import NamedTuple

import torch
from torch import Tensor

from ptq161.checks import check_choice
from ptq161.errors import UserError

Rounding = Callable[[Tensor, Tensor | None], Tensor]
"""``rounding(x, uniform)`` returns what a format holds of ``x``; ``uniform`` is of its shape, or None for nearest."""

FACTORS = ("format", "float")
"""What becomes of U and V: rounded to the format, as released, or left as they are."""

SCHEDULES = ("none", "ysche", "amplified")
"""Changes of a gradient's singular values; see :func:`quantize_spectral`."""

_KEPT = 5  # the largest singular values, which no schedule changes
_SINGULAR_FACTOR, _RESIDUAL_FACTOR = 1.5, 2.0

_TINY = torch.finfo(torch.float32).tiny


class Spectrum(NamedTuple):
    """The low-rank part ``U S V^T`` of a matrix ``[m, n]``.

    Attributes:
        left: U, ``[m, rank]``.
        values: S, ``[rank]``.
        right: V, ``[n, rank]``.
    """

    left: Tensor
    values: Tensor
    right: Tensor

    def matrix(self) -> Tensor:
        """Return ``U S V^T``: ``[m, n]``."""
        return (self.left * self.values) @ self.right.T


class Uniforms(NamedTuple):
    """Random numbers in [0, 1) for the rounding of a spectral product; None rounds to nearest.

    Attributes:
        left: ``[rank, m]``: factors are rounded transposed, so that blocks run along the singular vectors.
        right: ``[rank, n]``.
        residual: ``[m, n]``.
    """

    left: Tensor | None = None
    right: Tensor | None = None
    residual: Tensor | None = None


NEAREST = Uniforms()
"""Everything is rounded to nearest."""


@torch.no_grad()
def truncated_svd(matrix: Tensor, rank: int) -> Spectrum:
    """Return the largest singular values of ``[m, n]`` with their vectors, exactly.

    Raises:
        UserError: the rank is below 1 or above that of the matrix.

    Example:
        >>> truncated_svd(torch.diag(torch.tensor([1.0, 3.0])), 1).matrix().abs().round().tolist()
        [[0.0, 0.0], [0.0, 3.0]]
    """
    check_rank(rank, matrix)
    left, values, right = torch.linalg.svd(matrix, full_matrices=False)
    return Spectrum(left[:, :rank], values[:rank], right[:rank].T)


@torch.no_grad()
def subspace_iteration(matrix: Tensor, right: Tensor, iterations: int = 1) -> Spectrum:
    """Approximate the largest singular values from a subspace that is near those of their vectors.

    An iteration is ``U = qr(M V)``, ``Z = M^T U``, ``S = column norms of Z``, ``V = Z / S`` (``_power_iter_svd`` of
    sii-research/Metis); ``U S V^T`` is then M's projection ``U U^T M``.

    Args:
        matrix: ``[m, n]``.
        right: ``[n, rank]``, such as V of a step before, rank at most m.
        iterations: 0 takes the subspace as it is: M's projection ``M V V^T`` onto its orthonormal basis. (The released
            code crashes there.)

    Returns:
        ``rank`` singular values; they are in no order where they have not converged.

    Raises:
        UserError: the rank exceeds that of the matrix, or the number of iterations is negative.

    Example:
        >>> matrix = torch.diag(torch.tensor([1.0, 3.0]))
        >>> subspace_iteration(matrix, torch.tensor([[0.1], [1.0]]), iterations=3).values.round(decimals=3)
        tensor([3.])
    """
    check_rank(right.shape[1], matrix)
    if iterations < 0:
        raise UserError(f"iterations={iterations}: use at least 0.")
    if iterations == 0:
        return project(matrix, torch.linalg.qr(right).Q)
    for _ in range(iterations):
        left = torch.linalg.qr(matrix @ right).Q
        products = matrix.T @ left
        values = products.norm(dim=0)
        right = products / values.clamp(min=_TINY)
    return Spectrum(left, values, right)


@torch.no_grad()
def project(matrix: Tensor, basis: Tensor) -> Spectrum:
    """Return the part of ``[m, n]`` that lies in the span of orthonormal columns ``[n, rank]``.

    Example:
        >>> project(torch.tensor([[3.0, 1.0], [4.0, 1.0]]), torch.tensor([[1.0], [0.0]])).values
        tensor([5.])
    """
    products = matrix @ basis
    values = products.norm(dim=0)
    return Spectrum(products / values.clamp(min=_TINY), values, basis)


@torch.no_grad()
def sampled_subspace(matrix: Tensor, rank: int, share: float = 0.01) -> Tensor:
    """Return an orthonormal basis near the largest right singular vectors, from a random share of the rows.

    The right singular vectors of the sampled rows, and one iteration over all rows (Rayleigh-Ritz). Random numbers come
    from torch's global generator.

    Args:
        matrix: ``[m, n]``, finite.
        rank: below m and n.
        share: of the rows, at least twice as many as the rank.

    Returns:
        ``[n, rank]`` float32, that of the largest singular value first.

    Example:
        >>> basis = sampled_subspace(torch.ones(8, 2), rank=1)
        >>> basis.abs()
        tensor([[0.7071],
                [0.7071]])
    """
    rows = min(max(2 * rank, round(share * len(matrix))), len(matrix))
    sample = matrix[torch.randperm(len(matrix), device=matrix.device)[:rows]]
    right = torch.linalg.svd(sample, full_matrices=False).Vh[:rank].T
    left = torch.linalg.qr(matrix @ right).Q
    basis: Tensor = torch.linalg.svd(matrix.T @ left, full_matrices=False).U
    return basis


@torch.no_grad()
def split(weight: Tensor, rank: int) -> tuple[Tensor, Spectrum]:
    """Split a weight in a residual and a low-rank part, whose sum it is (``BitLinear.split`` of sii-research/Metis).

    In the first release the residual is subtracted where the low-rank part is meant: its layer starts as twice the
    low-rank part, and what else a trained weight holds is lost. That is not done here.

    Args:
        weight: ``[out, in]``.
        rank: of the low-rank part.

    Returns:
        the residual ``[out, in]``, and the low-rank part.

    Example:
        >>> weight = torch.tensor([[2.0, 0.0], [0.0, 1.0]])
        >>> residual, spectrum = split(weight, 1)
        >>> torch.allclose(residual + spectrum.matrix(), weight)
        True
    """
    spectrum = truncated_svd(weight, rank)
    return weight - spectrum.matrix(), spectrum


@torch.no_grad()
def split_linear(
    x: Tensor, residual: Tensor, spectrum: Spectrum, rounding: Rounding, bias: Tensor | None = None
) -> Tensor:
    """Return ``Q(X) Q(R)^T + X V S U^T``: a split weight's residual in a format, its low-rank part in float.

    Args:
        x: ``[..., in]``.
        residual: ``[out, in]``.
        spectrum: of the weight.
        rounding: of the format, to nearest.
        bias: ``[out]``.

    Returns:
        ``[..., out]``.

    Example:
        >>> residual, spectrum = split(torch.tensor([[2.0, 0.0], [0.0, 1.0]]), 1)
        >>> split_linear(torch.ones(1, 2), residual, spectrum, lambda x, uniform: x).round(decimals=4)
        tensor([[2., 1.]])
    """
    flat = x.flatten(0, -2)
    y = rounding(flat, None) @ rounding(residual, None).T
    y = y + (flat @ spectrum.right * spectrum.values) @ spectrum.left.T
    y = y.view(*x.shape[:-1], -1)
    return y if bias is None else y + bias


@torch.no_grad()
def quantize_spectral(
    matrix: Tensor,
    spectrum: Spectrum,
    rounding: Rounding,
    uniforms: Uniforms = NEAREST,
    *,
    factors: str = "format",
    schedule: str = "none",
) -> Tensor:
    """Return ``M' = Q(U) S Q(V)^T + Q(R)`` with ``R = M - U S V^T`` (``svd_quant`` of typename-yyf/Metis-quantization).

    A schedule, the paper's adaptive spectral learning rate, is for gradients: the singular values from the sixth on
    take 1.5 times their size and the residual twice its. ``ysche`` is the released code, which subtracts the enlarged
    low-rank part before it doubles the rest, so that these singular values come out at 0.5 of their size in place of
    1.5; ``amplified`` subtracts the plain one.

    Rounding both factors loses more along the large singular values than rounding the matrix does: sqrt(2) times a
    rounding's relative error, of the largest part of the matrix. ``factors="float"``, which is this project's own,
    rounds the residual alone.

    Args:
        matrix: ``[m, n]``.
        spectrum: of the matrix; any low-rank part will do.
        rounding: of the format.
        uniforms: random numbers for each part.
        factors: one of ``FACTORS``.
        schedule: one of ``SCHEDULES``.

    Returns:
        ``[m, n]``.

    Raises:
        UserError: a choice is unknown.

    Example:
        >>> matrix = torch.tensor([[40.0, 0.0], [0.0, 1.0]])
        >>> quantize_spectral(matrix, truncated_svd(matrix, 1), lambda x, uniform: x.round()).abs()
        tensor([[40.,  0.],
                [ 0.,  1.]])
    """
    check_choice("factors", factors, FACTORS)
    check_choice("schedule", schedule, SCHEDULES)
    values = spectrum.values
    if schedule != "none":
        enlarged = torch.arange(values.numel(), device=values.device) >= _KEPT
        values = torch.where(enlarged, values * _SINGULAR_FACTOR, values)
    subtracted = spectrum._replace(values=values) if schedule == "ysche" else spectrum
    residual = rounding(matrix - subtracted.matrix(), uniforms.residual)
    left, right = spectrum.left, spectrum.right
    if factors == "format":
        left, right = rounding(left.T, uniforms.left).T, rounding(right.T, uniforms.right).T
    rest = residual if schedule == "none" else residual * _RESIDUAL_FACTOR
    return Spectrum(left, values, right).matrix() + rest


def dual_range(weight: Tensor, alpha1: float = 1.0, alpha2: float = 1.0, strength: float = 1.0) -> Tensor:
    """Return the dual-range regulariser of a weight: ``strength / numel * sum(a1 w^2 + a2 (w + 1e-6)^-2)``.

    It keeps numbers away from a format's largest, and from zero (``dp_main.py`` of typename-yyf/Metis-quantization,
    where its strength is 0 in every script). The second term is not bounded: at ``w = -1e-6`` it is infinite, and its
    gradient outgrows all others near zero unless ``alpha2`` is far below 1. Differentiable.

    Args:
        weight: any shape.
        alpha1: weight of large numbers.
        alpha2: weight of small numbers.
        strength: lambda.

    Returns:
        a scalar.

    Example:
        >>> float(dual_range(torch.tensor([2.0, -2.0]), alpha2=0.0, strength=0.5))
        2.0
    """
    return strength * (alpha1 * weight.square() + alpha2 * (weight + 1e-6).pow(-2)).mean()


def check_rank(rank: int, matrix: Tensor) -> None:
    """Check the rank of a low-rank part.

    Raises:
        UserError: it is below 1, or above that of the matrix.

    Example:
        >>> check_rank(3, torch.ones(2, 4))
        Traceback (most recent call last):
            ...
        ptq161.errors.UserError: rank=3: use 1 to 2 for a matrix of [2, 4].
    """
    if not 1 <= rank <= min(matrix.shape):
        raise UserError(f"rank={rank}: use 1 to {min(matrix.shape)} for a matrix of {list(matrix.shape)}.")
