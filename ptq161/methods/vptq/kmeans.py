"""Weighted k-means, as a function of tensors alone: the same start gives the same codebook."""

from __future__ import annotations

import torch
from torch import Tensor

from ptq161.errors import UserError
from ptq161.kernels.codebook import cluster_sums, nearest


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
    # Only differences of the error matter, but they are compared with all of it.
    own = float(vectors.square().sum(1).double() @ weights)
    before, labels = float("inf"), None
    for _ in range(iterations):
        found = nearest(vectors, centroids)
        if labels is not None and torch.equal(found, labels):
            break
        labels, old = found, centroids.double()
        mass, sums = cluster_sums(vectors, weights, labels, len(old))
        mass = mass.unsqueeze(1)
        error = own + float(((mass * old - 2 * sums) * old).sum())
        if tolerance and before - error < tolerance * before:
            break
        before = error
        centroids = torch.where(mass > 0, sums / mass, old).float()
    return centroids


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
