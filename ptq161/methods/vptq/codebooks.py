"""Codebooks, of one linear or of several, made in turn with the indices that use them: steps 4 to 6 of VPTQ."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import NamedTuple

import torch
from torch import Tensor
from torch.nn import functional as F

from ptq161.kernels.codebook import nearest
from ptq161.methods.compensation import InverseFactor, compensate_columns
from ptq161.methods.vptq.kmeans import draw_centroids, kmeans
from ptq161.packed.vector import look_up
from ptq161.packed.weight import stored_scale


class Sizes(NamedTuple):
    """The method's hyperparameters that codebooks depend on, with its names.

    Example:
        >>> Sizes(2, 4, 0, 2, 0, 100, 1e-5, 128, "float16").centroids
        4
    """

    vector_length: int
    centroids: int
    residual_centroids: int
    outlier_vector_length: int
    outlier_centroids: int
    iterations: int
    tolerance: float
    column_block: int
    scale_dtype: str


class Part(NamedTuple):
    """A linear that takes its vectors from codebooks.

    Attributes:
        weight: ``[out, in]`` float32, its columns in the order of quantization.
        factor: of the hessian of its inputs.
        columns: the outlier columns, then each group's, as places in that order.

    Example:
        >>> from ptq161.methods.compensation import inverse_factor
        >>> Part(torch.ones(2, 4), inverse_factor(torch.eye(4)), [slice(0, 0), slice(0, 4)]).weight.shape
        torch.Size([2, 4])
    """

    weight: Tensor
    factor: InverseFactor
    columns: Sequence[slice]


class Codebooks:
    """Codebooks, stage by stage, made in turn with the indices that use them.

    Attributes:
        stages: for the first codebooks and the residual ones a list of tensors ``[k, v]``, of which the first is the
            outliers' and the others are the groups'; an empty tensor where there are no such columns.

    Example:
        >>> from ptq161.methods.compensation import inverse_factor
        >>> books = Codebooks(Sizes(2, 2, 0, 2, 0, 100, 1e-5, 128, "float16"), torch.Generator().manual_seed(0), {})
        >>> weight = torch.tensor([[1.0, -1.0, 1.0, -1.0], [2.0, -2.0, 2.0, -2.0]])  # vectors of two kinds
        >>> ((_, indices),) = books.quantize([Part(weight, inverse_factor(torch.eye(4)), [slice(0, 0), slice(0, 4)])])
        >>> (books.stages[0][1][indices[0]].flatten().tolist() == weight.T.flatten().tolist())
        True
    """

    def __init__(self, method: Sizes, generator: torch.Generator, initial: Mapping[str, Tensor]) -> None:
        self.method = method
        self.generator = generator
        self.initial = initial
        self.stages: list[list[Tensor]] = []

    def quantize(self, parts: Sequence[Part]) -> list[list[Tensor]]:
        """Make the codebooks for linears that share them.

        Returns:
            for each linear the indices of the outliers, then those of each stage: ``[ceil(out / v), columns]`` int64.
        """
        method = self.method
        self._add(parts, [part.weight for part in parts], "init", method.centroids)  # 4
        done = [self._loop(part) for part in parts]  # 5
        if method.residual_centroids:  # 6
            self._add(parts, [missed for _, missed in done], "res_init", method.residual_centroids)
            done = [self._loop(part) for part in parts]
        return [indices for indices, _ in done]

    def _add(self, parts: Sequence[Part], values: Sequence[Tensor], name: str, count: int) -> None:
        """Make the codebooks of a stage for ``values``, of the shapes of the weights."""
        method, stage = self.method, []
        for i in range(len(parts[0].columns)):
            length, size = (method.vector_length, count) if i else (method.outlier_vector_length, self._outlier_size)
            cut = [
                weighted_vectors(each[:, part.columns[i]], part.factor.diagonal[part.columns[i]], length)
                for part, each in zip(parts, values, strict=True)
            ]
            vectors, weights = (torch.cat(tensors) for tensors in zip(*cut, strict=True))
            if not len(vectors) or not size:
                stage.append(vectors.new_zeros(0, length))
                continue
            given = self.initial.get(f"{name}_{i}")
            start = draw_centroids(vectors, weights, size, self.generator) if given is None else given.to(vectors)
            found = kmeans(vectors, weights, start, iterations=method.iterations, tolerance=method.tolerance)
            stage.append(stored_scale(found, method.scale_dtype).float())
        self.stages.append(stage)

    @property
    def _outlier_size(self) -> int:
        """Outliers have no residual codebook."""
        return 0 if self.stages else self.method.outlier_centroids

    def _loop(self, part: Part) -> tuple[list[Tensor], Tensor]:
        """Return a linear's indices, and what the codebooks miss of it as compensated: ``[out, in]``."""
        weight, columns = part.weight, part.columns
        out_features, in_features = weight.shape
        method, first = self.method, columns[0].stop
        width = columns[1].stop - columns[1].start
        rows, outlier_rows = (-(-out_features // v) for v in (method.vector_length, method.outlier_vector_length))
        shapes = [(outlier_rows, first), *((rows, in_features - first) for _ in self.stages)]
        indices = [torch.empty(shape, dtype=torch.int64, device=weight.device) for shape in shapes]
        missed = torch.empty_like(weight.T, memory_format=torch.contiguous_format)

        def quantize_column(column: Tensor, j: int, _: Tensor) -> Tensor:
            kind = 0 if j < first else 1 + (j - first) // width
            rest = column
            for i, stage in enumerate(self.stages):
                if not len(stage[kind]):
                    continue
                vectors = _in_vectors(rest, stage[kind].shape[1])
                found = nearest(vectors, stage[kind])
                indices[1 + i if kind else 0][:, j - first if kind else j] = found
                rest = rest - look_up(stage[kind], found.unsqueeze(1), out_features).flatten()
            missed[j] = rest
            return column - rest

        compensate_columns(weight, part.factor, quantize_column, method.column_block)
        return indices, missed.T


def weighted_vectors(values: Tensor, weights: Tensor, length: int) -> tuple[Tensor, Tensor]:
    """Cut columns into vectors and weigh them.

    Args:
        values: ``[out, in]``.
        weights: ``[in]``, of the columns.
        length: rows of a vector; zeros fill the last one of a column up.

    Returns:
        vectors ``[in * ceil(out / length), length]``, column by column, and their weights: the mean of those of their
        rows, zero for a row that was filled up.

    Example:
        >>> vectors, weights = weighted_vectors(torch.tensor([[1.0, 4.0], [2.0, 5.0], [3.0, 6.0]]), torch.ones(2), 2)
        >>> vectors.tolist(), weights.tolist()
        ([[1.0, 2.0], [3.0, 0.0], [4.0, 5.0], [6.0, 0.0]], [1.0, 0.5, 1.0, 0.5])
    """
    missing = -len(values) % length
    vectors = F.pad(values.T, (0, missing)).reshape(-1, length)
    share = F.pad(torch.ones(len(values), device=values.device), (0, missing)).view(-1, length).mean(1)
    return vectors, (weights.unsqueeze(1) * share).flatten()


def _in_vectors(column: Tensor, length: int) -> Tensor:
    missing = -len(column) % length
    return (F.pad(column, (0, missing)) if missing else column).view(-1, length)
