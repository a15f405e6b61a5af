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
        found = nearest(vectors, centroids)
        if labels is not None and torch.equal(found, labels):
            break
        labels, old = found, centroids.double()
        mass = weights.new_zeros(len(old)).index_add_(0, labels, weights).unsqueeze(1)
        sums = weighted.new_zeros(old.shape).index_add_(0, labels, weighted)
        error = own + float(((mass * old - 2 * sums) * old).sum())
        if tolerance and before - error < tolerance * before:
            break
        before = error
        centroids = torch.where(mass > 0, sums / mass, old).float()
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
    table, half = centroids.T.contiguous(), centroids.square().sum(1) / -2
    rows = max(1, _CHUNK // len(centroids))
    closeness = vectors.new_empty(min(rows, len(vectors)), len(centroids))  # x c - c^2 / 2, largest for the nearest c
    found = torch.empty(len(vectors), dtype=torch.int64, device=vectors.device)
    for part, place in zip(vectors.split(rows), found.split(rows), strict=True):
        place.copy_(_largest(torch.addmm(half, part, table, out=closeness[: len(part)])))
    return found


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


def _largest(rows: Tensor) -> Tensor:
    """Return the place of the first largest value of each row; numpy's search takes an eighth of torch's on the CPU."""
    return torch.from_numpy(rows.numpy().argmax(1)) if rows.device.type == "cpu" else rows.argmax(1)
