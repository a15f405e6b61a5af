"""Vectors of weights as indices into codebooks: the format of VPTQ.

A vector is ``v`` consecutive output rows of one input column; rows that are missing at the end are not stored. Its
index has exactly as many bits as the codebook's size needs. A residual codebook adds a second vector to each, outlier
columns have a codebook and a vector length of their own, and columns may be split into groups with a codebook each.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Sequence
from typing import ClassVar, NamedTuple, Self

import torch
from torch import Tensor
from torch.nn import functional as F

from ptq161.errors import UserError
from ptq161.kernels import codebook
from ptq161.kernels.packed_rows import Operands
from ptq161.packed.bits import INDEX_BITS, index_bits, merge_columns, pack_indices, unpack_indices
from ptq161.packed.weight import PackedWeight, stored_scale


class Coded(NamedTuple):
    """Columns of a weight as vectors of codebooks.

    Attributes:
        centroids: ``[groups, k, v]``.
        indices: ``[ceil(out / v), columns]``, any integer dtype, each below k.

    Example:
        >>> coded = Coded(torch.zeros(1, 4, 2), torch.zeros(3, 8, dtype=torch.int64))
        >>> coded.centroids.shape, coded.indices.shape
        (torch.Size([1, 4, 2]), torch.Size([3, 8]))
    """

    centroids: Tensor
    indices: Tensor


class Norm(NamedTuple):
    """What is multiplied and added outside the codebooks; None where there is no such factor.

    Attributes:
        column_scale: ``[in]``, range of each column.
        column_offset: ``[in]``, least value of each column.
        row_scale: ``[out, 1]``, root mean square of each row.

    Example:
        >>> Norm(row_scale=torch.ones(2, 1)).column_scale is None
        True
    """

    column_scale: Tensor | None = None
    column_offset: Tensor | None = None
    row_scale: Tensor | None = None

    def stored(self, scale_dtype: str) -> Norm:
        """Return the factors rounded to the dtype in which they are stored."""
        return Norm(*(None if part is None else stored_scale(part, scale_dtype) for part in self))


@dataclasses.dataclass(frozen=True, eq=False)
class VectorWeight(PackedWeight):
    """``W = row_scale * (column_scale * vectors + column_offset)``, with the columns' labels for codebooks.

    With v the vector length, k centroids, g groups, and ``n`` columns that are no outliers:

    Attributes:
        outliers: number of outlier columns.
        centroids: ``[g, k, v]`` in ``scale_dtype``.
        indices: uint8, ``ceil(out / v) * n`` indices of ``ceil(log2 k)`` bits, row by row.
        residual_centroids: ``[g, k2, v]`` in ``scale_dtype``; None without a residual codebook, as below.
        residual_indices: uint8, as many indices of ``ceil(log2 k2)`` bits.
        outlier_centroids: ``[1, k0, v0]`` in ``scale_dtype``.
        outlier_indices: uint8, ``ceil(out / v0) * outliers`` indices of ``ceil(log2 k0)`` bits.
        labels: uint8, each column's group, or g for an outlier, in as few bits as there are kinds of columns; None
            where outliers come first and the groups follow from left to right.
        column_scale: ``[in]`` in ``scale_dtype``.
        column_offset: ``[in]`` in ``scale_dtype``.
        row_scale: ``[out, 1]`` in ``scale_dtype``.

    Example:
        >>> centroids = torch.tensor([[[1.0, 2.0], [-1.0, 0.5]]])
        >>> packed = VectorWeight.pack(Coded(centroids, torch.tensor([[0, 1, 0], [1, 1, 0]])), (3, 3))
        >>> packed.dequantize().tolist()  # the last row of vectors has one row of weights
        [[1.0, -1.0, 1.0], [2.0, 0.5, 2.0], [-1.0, -1.0, 1.0]]
        >>> packed.nbytes  # 4 values in float16, 6 indices of one bit
        9
    """

    format: ClassVar[str] = "vector"
    offsets: ClassVar[tuple[str, ...]] = ("centroids", "residual_centroids", "outlier_centroids", "column_offset")
    shared: ClassVar[tuple[str, ...]] = ("centroids", "residual_centroids", "outlier_centroids")

    outliers: int
    centroids: Tensor
    indices: Tensor
    residual_centroids: Tensor | None = None
    residual_indices: Tensor | None = None
    outlier_centroids: Tensor | None = None
    outlier_indices: Tensor | None = None
    labels: Tensor | None = None
    column_scale: Tensor | None = None
    column_offset: Tensor | None = None
    row_scale: Tensor | None = None

    @classmethod
    def pack(
        cls,
        main: Coded,
        shape: Sequence[int],
        *,
        residual: Coded | None = None,
        outlier: Coded | None = None,
        labels: Tensor | None = None,
        norm: Norm | None = None,
        scale_dtype: str = "float16",
    ) -> Self:
        """Store codebooks, indices and what is multiplied outside them.

        Args:
            main: of the columns that are no outliers, in their order in the weight.
            shape: ``(out, in)`` of the weight.
            residual: of the same columns, added to ``main``.
            outlier: of the outlier columns, in their order in the weight, with one codebook.
            labels: ``[in]`` integers, each column's group, or the number of groups for an outlier; None where the
                outliers come first and the groups follow, equally large, from left to right.
            norm: factors of rows and columns.
            scale_dtype: ``float16`` or ``float32``, of everything that is not an index.

        Raises:
            UserError: a centroid or a factor leaves the range of ``scale_dtype``, or a codebook has a size that no
                index reaches.
        """
        groups, outliers = main.centroids.shape[0], 0 if outlier is None else outlier.indices.shape[1]
        for coded in (main, residual, outlier):
            if coded is not None:
                check_codebook("the codebook", coded.centroids.shape[1])
        default = _consecutive(shape[1], groups, outliers, main.indices.device)
        plain = labels is None or torch.equal(labels.long(), default)
        centroids, indices = _stored(main, scale_dtype)
        residual_centroids, residual_indices = _stored(residual, scale_dtype)
        outlier_centroids, outlier_indices = _stored(outlier, scale_dtype)
        column_scale, column_offset, row_scale = (norm or Norm()).stored(scale_dtype)
        assert centroids is not None and indices is not None, "the main codebook is given"
        return cls(
            out_features=shape[0],
            in_features=shape[1],
            outliers=outliers,
            centroids=centroids,
            indices=indices,
            residual_centroids=residual_centroids,
            residual_indices=residual_indices,
            outlier_centroids=outlier_centroids,
            outlier_indices=outlier_indices,
            labels=None if plain or labels is None else pack_indices(labels, index_bits(groups + (outliers > 0))),
            column_scale=column_scale,
            column_offset=column_offset,
            row_scale=row_scale,
        )

    def column_labels(self) -> Tensor:
        """Return the group of each column, or the number of groups for an outlier: ``[in]`` int64."""
        groups = self.centroids.shape[0]
        if self.labels is None:
            return _consecutive(self.in_features, groups, self.outliers, self.centroids.device)
        return unpack_indices(self.labels, self.in_features, index_bits(groups + (self.outliers > 0)))

    def unpacked_indices(self) -> Tensor:
        """Return the indices of the columns that are no outliers, in their order: ``[ceil(out / v), n]`` int64."""
        return self._unpack(self.indices, self.centroids, self.in_features - self.outliers)

    def values(self) -> Tensor:
        """Return the weight: ``[out, in]`` float32."""
        labels = self.column_labels()
        is_outlier = labels == self.centroids.shape[0]
        groups = labels[~is_outlier]
        if self.residual_centroids is None and self.outlier_centroids is None and self.column_scale is None:
            return self._vectors(self.centroids, self.indices, groups, self.row_scale)
        weight = self._vectors(self.centroids, self.indices, groups)
        if self.residual_centroids is not None and self.residual_indices is not None:
            weight = weight + self._vectors(self.residual_centroids, self.residual_indices, groups)
        if self.outlier_centroids is not None and self.outlier_indices is not None:
            zeros = torch.zeros(self.outliers, dtype=torch.int64, device=labels.device)
            outliers = self._vectors(self.outlier_centroids, self.outlier_indices, zeros)
            weight = merge_columns([(weight, ~is_outlier), (outliers, is_outlier)])
        if self.column_scale is not None and self.column_offset is not None:
            weight = weight * self.column_scale.float() + self.column_offset.float()
        return weight if self.row_scale is None else weight * self.row_scale.float()

    def operands(self) -> Operands | None:
        """Return the weight as compiled operators take it."""
        books = (self.centroids, self.indices, self.residual_centroids, self.residual_indices)
        outliers = (self.outlier_centroids, self.outlier_indices, self.labels)
        norm = (self.column_scale, self.column_offset, self.row_scale)
        settings = (self.out_features, self.in_features, self.outliers)
        return Operands(self.format, (*books, *outliers, *norm), settings, 2.0**self.exponent, "codebook_rows")

    def _vectors(self, centroids: Tensor, packed: Tensor, groups: Tensor, row_scale: Tensor | None = None) -> Tensor:
        """Look columns up in the codebook of each one's group, and scale the rows: ``[out, columns]`` float32."""
        table, size, columns = centroids.float().flatten(0, 1), centroids.shape[1], len(groups)
        scale = None if row_scale is None else row_scale.float()
        if codebook.usable(table, packed):
            labels = groups if centroids.shape[0] > 1 else None
            return codebook.codebook_weight(
                table, packed, labels, scale, size=size, out_features=self.out_features, columns=columns
            )
        indices = self._unpack(packed, centroids, columns)
        weight = look_up(table, indices + size * groups, self.out_features)
        return weight if scale is None else weight * scale

    def _unpack(self, packed: Tensor, centroids: Tensor, columns: int) -> Tensor:
        rows = -(-self.out_features // centroids.shape[2])
        return unpack_indices(packed, rows * columns, index_bits(centroids.shape[1])).view(rows, columns)


def look_up(centroids: Tensor, indices: Tensor, out_features: int) -> Tensor:
    """Put the centroids of a codebook in the places of their indices.

    Args:
        centroids: ``[k, v]``.
        indices: ``[ceil(out / v), columns]`` int64.
        out_features: rows that are kept.

    Returns:
        ``[out, columns]``, differentiable in the centroids.

    Example:
        >>> look_up(torch.tensor([[1.0, 2.0], [3.0, 4.0]]), torch.tensor([[0, 1], [1, 0]]), out_features=3).tolist()
        [[1.0, 3.0], [2.0, 4.0], [3.0, 1.0]]
    """
    rows, columns = indices.shape
    vectors = F.embedding(indices, centroids)
    return vectors.transpose(1, 2).reshape(rows * centroids.shape[1], columns)[:out_features]


def check_codebook(setting: str, count: int) -> None:
    """Check the number of centroids of a codebook.

    Raises:
        UserError: it is not from 2 to 65536.

    Example:
        >>> check_codebook("method.centroids", 256)
        >>> check_codebook("method.centroids", 1)
        Traceback (most recent call last):
            ...
        ptq161.errors.UserError: method.centroids=1: use 2 to 65536 centroids, which an index of 1 to 16 bits reaches.
    """
    if not 2 <= count <= 2**INDEX_BITS:
        raise UserError(
            f"{setting}={count}: use 2 to {2**INDEX_BITS} centroids, which an index of 1 to {INDEX_BITS} bits reaches."
        )


def _stored(coded: Coded | None, scale_dtype: str) -> tuple[Tensor | None, Tensor | None]:
    if coded is None:
        return None, None
    bits = index_bits(coded.centroids.shape[1])
    return stored_scale(coded.centroids, scale_dtype), pack_indices(coded.indices, bits)


def _consecutive(in_features: int, groups: int, outliers: int, device: torch.device) -> Tensor:
    """Return the labels of columns of which the outliers come first, then the groups."""
    width = max(1, (in_features - outliers) // groups)
    labels = ((torch.arange(in_features, device=device) - outliers) // width).clamp(max=groups - 1)
    labels[:outliers] = groups
    return labels
