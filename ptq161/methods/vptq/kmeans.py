"""Weighted k-means, as a function of tensors alone: the same start gives the same codebook."""

from __future__ import annotations

import torch
from torch import Tensor

from ptq161.errors import UserError

# Distances that are held at once: what a core's cache holds.
_CHUNK = 1 << 18


def kmeans(
    vectors: Tensor, weights: Tensor, centroids: Tensor, *, iterations: int = 100, tolerance: float = 0.0
) -> Tensor:
    """Lower the weighted squared error of a codebook by Lloyd's algorithm, from given centroids.

    A centroid that keeps no weight stays where it is. The algorithm ends when no vector changes its centroid.

    Args:
        vectors: ``[n, v]``.
        weights: ``[n]``, not negative.
        centroids: ``[k, v]``, the start.
        iterations: at most so many.
        tolerance: end also when the error falls by less than this share of itself.

    Returns:
        ``[k, v]`` float32.

    Raises:
        UserError: the shapes do not match.

    Example:
        >>> vectors = torch.tensor([[0.0], [1.0], [10.0], [12.0]])
        >>> kmeans(vectors, torch.tensor([1.0, 3.0, 1.0, 1.0]), torch.tensor([[0.0], [1.0]])).flatten().tolist()
        [0.75, 11.0]
    """
    if vectors.ndim != 2 or weights.shape != vectors.shape[:1] or centroids.shape[1:] != vectors.shape[1:]:
        raise UserError(
            f"vectors {list(vectors.shape)}, weights {list(weights.shape)} and centroids {list(centroids.shape)} do "
            "not belong together; give [n, v], [n] and [k, v]."
        )
    vectors, centroids, weights = vectors.float(), centroids.float(), weights.double()
    used = weights > 0
    if not bool(used.all()):
        vectors, weights = vectors[used], weights[used]
    weighted = vectors.double() * weights.unsqueeze(1)
    # Only differences of the error matter, but they are compared with all of it.
    own = float((weighted * vectors).sum())
    before, labels = float("inf"), None
    for _ in range(iterations):
        found, closeness = _nearest(vectors, centroids)
        if labels is not None and torch.equal(found, labels):
            break
        labels = found
        error = own - 2 * float((weights * closeness).sum())
        if tolerance and before - error < tolerance * before:
            break
        before = error
        mass = weights.new_zeros(len(centroids)).index_add_(0, labels, weights)
        sums = weighted.new_zeros(centroids.shape).index_add_(0, labels, weighted)
        means = sums / mass.unsqueeze(1)
        centroids = torch.where(mass.unsqueeze(1) > 0, means, centroids.double()).float()
    return centroids


def nearest(vectors: Tensor, centroids: Tensor) -> Tensor:
    """Return the index of the nearest centroid in Euclidean distance, the first of equally near ones.

    Args:
        vectors: ``[n, v]``.
        centroids: ``[k, v]``.

    Returns:
        ``[n]`` int64.

    Example:
        >>> nearest(torch.tensor([[0.4], [0.6], [9.0]]), torch.tensor([[0.0], [1.0]])).tolist()
        [0, 1, 1]
    """
    return _nearest(vectors, centroids)[0]


def draw_centroids(vectors: Tensor, weights: Tensor, count: int, generator: torch.Generator) -> Tensor:
    """Draw the start of a codebook among the vectors of positive weight, each at most once while there are enough.

    Args:
        vectors: ``[n, v]``.
        weights: ``[n]``.
        count: centroids.
        generator: on the CPU.

    Returns:
        ``[count, v]``; zeros where no vector has weight.

    Example:
        >>> vectors, weights = torch.tensor([[1.0], [2.0], [3.0]]), torch.tensor([1.0, 0.0, 1.0])
        >>> sorted(draw_centroids(vectors, weights, 2, torch.Generator()).flatten().tolist())
        [1.0, 3.0]
    """
    candidates = (weights > 0).nonzero().flatten()
    if not len(candidates):
        return vectors.new_zeros(count, vectors.shape[1])
    drawn = torch.randperm(len(candidates), generator=generator)[:count].to(candidates.device)
    return vectors[candidates[drawn[torch.arange(count, device=drawn.device) % len(drawn)]]]


def _nearest(vectors: Tensor, centroids: Tensor) -> tuple[Tensor, Tensor]:
    """Return the nearest centroid of each vector, and ``x c - c^2 / 2`` with it, which is largest there."""
    half = centroids.square().sum(1) / -2
    found = [torch.addmm(half, part, centroids.T).max(1) for part in vectors.split(max(1, _CHUNK // len(centroids)))]
    if not found:
        return torch.zeros(0, dtype=torch.int64, device=vectors.device), vectors.new_zeros(0)
    return torch.cat([part.indices for part in found]), torch.cat([part.values for part in found])
