"""A codebook and its vectors: the nearest centroids, the sums of which centroids are means, and the weight of indices.

On the CPU the distances of a vector stay in registers, and a weight is read from its packed indices in one pass, as is
its gradient (``codebook.cpp``), where torch writes and reads all distances and indices of 64 bits.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from ptq161.kernels import native

# Distances that torch holds at once.
_CHUNK = 1 << 18


def nearest(vectors: Tensor, centroids: Tensor) -> Tensor:
    """Return the index of the nearest centroid in Euclidean distance, the first of equally near ones.

    Args:
        vectors: ``[n, v]`` float32.
        centroids: ``[k, v]`` float32.

    Returns:
        ``[n]`` int64.

    Example:
        >>> nearest(torch.tensor([[0.4], [0.6], [9.0]]), torch.tensor([[0.0], [1.0]])).tolist()
        [0, 1, 1]
    """
    if vectors.dtype == centroids.dtype == torch.float32 and native.usable("codebook", vectors, centroids):
        compiled: Tensor = torch.ops.ptq161.nearest(vectors.contiguous(), centroids.contiguous())
        return compiled
    table, half = centroids.T.contiguous(), centroids.square().sum(1) / -2
    # x c - c^2 / 2 is largest for the nearest c.
    parts = [_largest(torch.addmm(half, part, table)) for part in vectors.split(max(1, _CHUNK // len(centroids)))]
    return torch.cat(parts)


def cluster_sums(vectors: Tensor, weights: Tensor, labels: Tensor, count: int) -> tuple[Tensor, Tensor]:
    """Return the weight of each cluster and the weighted sum of its vectors.

    Args:
        vectors: ``[n, v]`` float32.
        weights: ``[n]`` float64.
        labels: ``[n]`` int64, the cluster of each vector.
        count: clusters.

    Returns:
        ``[count]`` and ``[count, v]`` float64.

    Example:
        >>> weights = torch.tensor([1.0, 3.0], dtype=torch.float64)
        >>> mass, sums = cluster_sums(torch.tensor([[1.0], [2.0]]), weights, torch.tensor([1, 1]), 2)
        >>> mass.tolist(), sums.tolist()
        ([0.0, 4.0], [[0.0], [7.0]])
    """
    dtypes = (vectors.dtype, weights.dtype, labels.dtype)
    if dtypes == (torch.float32, torch.float64, torch.int64) and native.usable("codebook", vectors, weights, labels):
        tensors = (vectors.contiguous(), weights.contiguous(), labels.contiguous())
        mass, sums = torch.ops.ptq161.cluster_sums(*tensors, count)
        return mass, sums
    weighted = vectors.double() * weights.unsqueeze(1)
    mass = weights.new_zeros(count).index_add_(0, labels, weights)
    return mass, weights.new_zeros(count, vectors.shape[1]).index_add_(0, labels, weighted)


def codebook_weight(
    table: Tensor,
    packed: Tensor,
    groups: Tensor | None,
    row_scale: Tensor | None,
    *,
    size: int,
    out_features: int,
    columns: int,
) -> Tensor:
    """Return the weight of packed indices, differentiable in centroids and row scales.

    There is no such function in torch beside it: :func:`usable` says where it serves.

    Args:
        table: ``[groups * size, v]`` float32 on the CPU, the centroids of all groups.
        packed: uint8, ``ceil(out / v) * columns`` indices (:func:`ptq161.packed.bits.pack_indices`).
        groups: ``[columns]`` int64, the group of each column; None where there is one.
        row_scale: ``[out_features, 1]`` float32; None for ones.
        size: centroids of a group.
        out_features: rows that are kept.
        columns: of the weight.

    Returns:
        ``[out_features, columns]`` float32.

    Raises:
        RuntimeError: an index is beyond its codebook.

    Example:
        >>> table, packed = torch.tensor([[1.0, 2.0], [3.0, 4.0]]), torch.tensor([0b0110], dtype=torch.uint8)
        >>> usable(table, packed)
        True
        >>> codebook_weight(table, packed, None, None, size=2, out_features=3, columns=2).tolist()  # 0, 1; 1, 0
        [[1.0, 3.0], [2.0, 4.0], [3.0, 1.0]]
    """
    # Function.apply has no annotations.
    weight: Tensor = _CodebookWeight.apply(  # type: ignore[no-untyped-call]  # torch leaves it untyped
        table.contiguous(), row_scale, packed, groups, size, out_features, columns
    )
    return weight


def usable(*tensors: Tensor) -> bool:
    """Whether :func:`codebook_weight` serves these tensors: on the CPU, and compiled.

    Example:
        >>> usable(torch.ones(1, device="meta"))
        False
    """
    return native.usable("codebook", *tensors)


class _CodebookWeight(torch.autograd.Function):
    @staticmethod
    def forward(
        ctx: Any,
        table: Tensor,
        row_scale: Tensor | None,
        packed: Tensor,
        groups: Tensor | None,
        size: int,
        out_features: int,
        columns: int,
    ) -> Tensor:
        ctx.save_for_backward(table, packed, groups, row_scale)
        ctx.size = size
        weight: Tensor = torch.ops.ptq161.codebook_weight(table, packed, groups, row_scale, size, out_features, columns)
        return weight

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor | None, ...]:
        of_table, of_rows = torch.ops.ptq161.codebook_gradients(grad.contiguous(), *ctx.saved_tensors, ctx.size)
        return of_table, of_rows if ctx.needs_input_grad[1] else None, None, None, None, None, None


def _largest(rows: Tensor) -> Tensor:
    """Return the place of the first largest value of each row; numpy's search takes an eighth of torch's on the CPU."""
    return torch.from_numpy(rows.numpy().argmax(1)) if rows.device.type == "cpu" else rows.argmax(1)
