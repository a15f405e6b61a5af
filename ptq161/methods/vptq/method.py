"""VPTQ on one linear: codebooks by weighted k-means, then indices in GPTQ's loop over columns.

Follows microsoft/VPTQ, branch ``algorithm``: ``fast_vector_quant`` and ``vptq`` in ``vptq/vptq.py``,
``NPVectorQuantizer`` in ``vptq/quantizer.py``, ``utils/hessian.py``. The steps (Algorithms 1 and 2 of the paper),
numbered as in the code below:

1. the hessian over its mean diagonal plus a ridge of 0.01, then factorized with a damping of 0.01;
2. outlier columns and groups of columns, in the order of falling diagonal where the columns are permuted;
3. optional: each column less its minimum and over its range;
4. a codebook for each group, by k-means over its vectors weighted by the hessian's diagonal (Section 3.2.1);
5. column by column, each vector takes the nearest centroid in plain distance, as a column's loss has one factor for
   all of its rows (Section 3.1); the loss is made good in the columns to the right;
6. optional: a residual codebook, by k-means on what the columns missed, and the loop again with both codebooks;
7. optional: the codebooks of a block are trained against its full-precision output
   (:mod:`ptq161.methods.vptq.refit`). The released code has no such step; the paper describes it in Section 4.

Linears of one input, or of one block, may share their codebooks, which the paper and the released code do not do: then
steps 4 and 6 take the vectors of all of them, and the first one stores what is shared.

Differences: k-means is deterministic, from a start drawn with the run's seed; codebooks are rounded to the stored dtype
before step 5, so that indices are chosen against what is stored. This project's own: step 3 with the hessian scaled to
match, and rows divided by their root mean square.
"""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Mapping, Sequence
from typing import ClassVar, NamedTuple

import torch
from torch import Tensor

from ptq161.checks import check_at_least, check_choice
from ptq161.errors import UserError
from ptq161.methods.base import Window, check_rate, prefix_errors
from ptq161.methods.blockwise import check_input_drop
from ptq161.methods.compensation import (
    CompensatedMethod,
    InverseFactor,
    check_hessian,
    inverse_factor,
)
from ptq161.methods.layerwise import collect_statistics
from ptq161.methods.vptq.codebooks import Codebooks, Part, Sizes
from ptq161.methods.vptq.refit import refit
from ptq161.packed.vector import Coded, Norm, VectorWeight, check_codebook
from ptq161.packed.weight import PackedWeight, check_magnitude, stored_scale

CODEBOOK_PER = ("linear", "input", "block")
_RIDGE = 1e-2


@dataclasses.dataclass(frozen=True)
class VPTQ(CompensatedMethod):
    """VPTQ. The defaults are the paper's for 2 bits on models of 7B and 13B.

    Attributes:
        vector_length: output rows of a vector.
        centroids: vectors in a codebook.
        residual_centroids: vectors in the residual codebook; 0 for none.
        outlier_share: share of the input channels that are outliers.
        outlier_vector_length: output rows of an outlier's vector.
        outlier_centroids: vectors in the outliers' codebook; 0 for no outliers.
        groups: groups of columns with a codebook each.
        permute: take the columns in the order of falling hessian diagonal.
        normalize: subtract each column's minimum and divide it by its range.
        codebook_per: ``linear``, as released; or ``input`` or ``block``, for linears that share their codebooks
            (this project's own).
        match_hessian: scale the hessian and the weights of the k-means with a normalized column (this project's own).
        row_scales: divide each row by its root mean square (this project's own).
        iterations: of k-means, at most.
        tolerance: k-means ends when its error falls by less than this share of itself.
        refit_steps: steps in which the centroids and scales of a block are trained against the full-precision block; 0
            for none, as released.
        refit_lr: first learning rate of the centroids, in units of their root mean square; it falls linearly to zero.
        refit_scale_lr: learning rate of the scales, relative to them, and of the columns' offsets, in units of their
            root mean square; 0 leaves them as they are, None takes ``refit_lr``.
        input_drop: probability with which an element of the block's input comes from the full-precision chain, in each
            step of the refit (QDrop's regularizer); 0 draws nothing.

    Example:
        >>> VPTQ(vector_length=4, centroids=64).nominal_bits()
        1.5
        >>> VPTQ(vector_length=0)
        Traceback (most recent call last):
            ...
        ptq161.errors.UserError: method.vector_length=0: use at least 1.
    """

    format: ClassVar[str] = "vector"

    vector_length: int = 6
    centroids: int = 4096
    residual_centroids: int = 0
    outlier_share: float = 0.0
    outlier_vector_length: int = 4
    outlier_centroids: int = 0
    groups: int = 1
    permute: bool = False
    normalize: bool = False
    codebook_per: str = "linear"
    match_hessian: bool = False
    row_scales: bool = False
    iterations: int = 100
    tolerance: float = 1e-5
    refit_steps: int = 0
    refit_lr: float = 2e-2
    refit_scale_lr: float | None = None
    input_drop: float = 0.0

    def __post_init__(self) -> None:
        """Reject values out of range."""
        super().__post_init__()
        for name, least in (
            ("vector_length", 1),
            ("outlier_vector_length", 1),
            ("groups", 1),
            ("iterations", 0),
            ("tolerance", 0),
            ("refit_steps", 0),
        ):
            check_at_least(f"method.{name}", getattr(self, name), least)
        check_choice("method.codebook_per", self.codebook_per, CODEBOOK_PER)
        check_rate("method.refit_lr", self.refit_lr)
        check_rate("method.refit_scale_lr", self.refit_scale_lr or 0.0)
        check_input_drop(self.input_drop)
        check_codebook("method.centroids", self.centroids)
        for name in ("residual_centroids", "outlier_centroids"):
            if getattr(self, name):
                check_codebook(f"method.{name}", getattr(self, name))
        if not 0 <= self.outlier_share < 1:
            raise UserError(f"method.outlier_share={self.outlier_share}: use a share in [0, 1), such as 0.02.")
        if self.outlier_share and not self.outlier_centroids:
            raise UserError(
                f"method.outlier_share={self.outlier_share}: outliers need a codebook of their own; set "
                "method.outlier_centroids, or method.outlier_share=0."
            )
        if self.match_hessian and not self.normalize:
            raise UserError("method.match_hessian=true: there is nothing to match; set method.normalize=true.")

    @property
    def needs_full_chain(self) -> bool:
        """Whether the refit compares with the full-precision chain."""
        return self.refit_steps > 0

    def nominal_bits(self) -> float:
        """Bits of the indices of a weight that is no outlier; codebooks, scales and column labels are not counted."""
        residual = math.log2(self.residual_centroids) if self.residual_centroids else 0.0
        return (math.log2(self.centroids) + residual) / self.vector_length

    def factorize(self, hessian: Tensor) -> InverseFactor:
        """Factorize the regularized hessian, with its columns in the order of quantization."""
        return inverse_factor(regularized(hessian), self.damping, act_order=self.permute)

    def quantize_window(self, window: Window) -> dict[str, PackedWeight]:
        """Quantize every linear of the window, then refit the codebooks of all of them together.

        Raises:
            UserError: an input or a loss is not finite, or a linear cannot be quantized.
        """
        packed = self._quantize_block(window) if self.codebook_per == "block" else super().quantize_window(window)
        if not self.refit_steps:
            return packed
        return refit(  # 7
            window,
            packed,
            steps=self.refit_steps,
            lr=self.refit_lr,
            scale_lr=self.refit_scale_lr,
            batch_size=self.batch_size,
            compute_dtype=self.compute_dtype,
            input_drop=self.input_drop,
        )

    def quantize_factorized(
        self, weights: Mapping[str, Tensor], factor: InverseFactor, window: Window
    ) -> dict[str, PackedWeight]:
        """Quantize the linears of one input, each with the window's generator for the codebooks that it uses."""
        if self.codebook_per == "input":
            return self._quantize_together(weights, dict.fromkeys(weights, factor), window)
        packed: dict[str, PackedWeight] = {}
        for name, weight in weights.items():
            packed |= self._quantize_together({name: weight}, {name: factor}, window)
        return packed

    def lenders(self, input_groups: Sequence[Sequence[str]]) -> dict[str, str]:
        """Return, for linears that share another one's codebooks, which one that is.

        Args:
            input_groups: names of the linears of one block, by shared input.

        Example:
            >>> VPTQ(codebook_per="input").lenders([["0.q", "0.k"], ["0.o"]])
            {'0.k': '0.q'}
            >>> VPTQ(codebook_per="block").lenders([["0.q", "0.k"], ["0.o"]])
            {'0.k': '0.q', '0.o': '0.q'}
        """
        if self.codebook_per == "linear":
            return {}
        together = (
            [[name for group in input_groups for name in group]] if self.codebook_per == "block" else input_groups
        )
        return {name: names[0] for names in together for name in names[1:]}

    def _quantize_block(self, window: Window) -> dict[str, PackedWeight]:
        weights, factors = {}, {}
        statistics = collect_statistics(self, window)
        for group in window.input_groups:
            factor = self.factorize_group(group, statistics.pop(group[0]), window)
            for name in group:
                weights[name], factors[name] = window.linears[name].weight.detach().float(), factor
        return self._quantize_together(weights, factors, window)

    def _quantize_together(
        self, weights: Mapping[str, Tensor], factors: Mapping[str, InverseFactor], window: Window
    ) -> dict[str, PackedWeight]:
        """Quantize linears that share their codebooks, which the first one stores."""
        first = next(iter(weights))
        linears = []
        for name, weight in weights.items():
            with prefix_errors(name):
                linears.append(self._prepare(weight, factors[name]))
        with prefix_errors(", ".join(weights)):
            packed = self._quantize(linears, window.generator(f"vptq/{first}"), {})
        return {
            name: weight if name == first else dataclasses.replace(weight, lender=first)
            for name, weight in zip(weights, packed, strict=True)
        }

    def quantize_linear(
        self,
        weight: Tensor,
        factor: InverseFactor,
        *,
        generator: torch.Generator | None = None,
        initial_centroids: Mapping[str, Tensor] | None = None,
    ) -> VectorWeight:
        """Quantize one weight ``[out, in]`` with the factor of its inputs' hessian.

        Args:
            weight: ``[out, in]``.
            factor: from :meth:`factorize`.
            generator: for the start of the k-means; None is that of seed 0.
            initial_centroids: see :func:`ptq161.methods.vptq.quantize_weight`.

        Raises:
            UserError: the shapes do not match, the groups do not divide the columns, or a weight is not finite.
        """
        generator = generator or torch.Generator().manual_seed(0)
        (packed,) = self._quantize([self._prepare(weight, factor)], generator, initial_centroids or {})
        return packed

    def _prepare(self, weight: Tensor, factor: InverseFactor) -> _Linear:
        """Check a weight, normalize it and bring its columns into their order."""
        check_magnitude(weight, self.scale_dtype)
        check_hessian(factor.upper, weight.shape[1])
        weight = weight.float()
        if not bool(torch.isfinite(weight).all()):
            raise UserError("a weight is NaN or infinite; check the model's checkpoint.")
        columns = self.parts(weight.shape[1])
        norm, weight = self._normalized(weight)  # 3
        order = torch.arange(weight.shape[1], device=weight.device) if factor.order is None else factor.order
        if self.match_hessian and norm.column_scale is not None:
            factor = matched(factor, norm.column_scale.float()[order])
        return _Linear(Part(weight[:, order].masked_fill(factor.dead, 0.0), factor, columns), order, norm)

    def _quantize(
        self, linears: Sequence[_Linear], generator: torch.Generator, initial: Mapping[str, Tensor]
    ) -> list[VectorWeight]:
        sizes = Sizes(**{name: getattr(self, name) for name in Sizes._fields})
        books = Codebooks(sizes, generator, initial)
        indices = books.quantize([linear.part for linear in linears])
        return [self._pack(linear, books, found) for linear, found in zip(linears, indices, strict=True)]

    def parts(self, in_features: int) -> list[slice]:
        """2. Return the outlier columns, then the groups, as places in the order of quantization."""
        outliers = math.ceil(round(self.outlier_share * in_features, 6))
        rest = (in_features - outliers) % self.groups
        if (rest and not self.outlier_centroids) or in_features - outliers < self.groups:
            raise UserError(
                f"method.groups={self.groups}: {in_features - outliers} columns do not fall into as many equal groups; "
                "use a divisor, or set method.outlier_centroids, whose codebook takes what is left."
            )
        outliers += rest
        width = (in_features - outliers) // self.groups
        starts = [outliers + i * width for i in range(self.groups)]
        return [slice(0, outliers), *(slice(start, start + width) for start in starts)]

    def _normalized(self, weight: Tensor) -> tuple[Norm, Tensor]:
        row_scale = column_scale = column_offset = None
        if self.row_scales:
            row_scale = stored_scale(weight.square().mean(1, keepdim=True).sqrt(), self.scale_dtype)
            weight = weight / row_scale.float().masked_fill(row_scale == 0, 1.0)
        if self.normalize:
            least, largest = weight.amin(0), weight.amax(0)
            column_offset = stored_scale(least, self.scale_dtype)
            column_scale = stored_scale(largest - least, self.scale_dtype)
            column_scale = column_scale.masked_fill(column_scale == 0, 1.0)
            weight = (weight - column_offset.float()) / column_scale.float()
        return Norm(column_scale, column_offset, row_scale), weight

    def _pack(self, linear: _Linear, books: Codebooks, indices: Sequence[Tensor]) -> VectorWeight:
        """Bring the indices back to the columns of the weight."""
        order, parts = linear.order, linear.part.columns
        labels = torch.empty_like(order)
        for label, part in enumerate((*parts[1:], parts[0])):
            labels[order[part]] = label
        main = parts[0].stop
        places = torch.argsort(order)
        is_outlier = labels == self.groups
        inner, outer = places[~is_outlier] - main, places[is_outlier]
        coded = [
            Coded(torch.stack(stage[1:]), found[:, inner])
            for stage, found in zip(books.stages, indices[1:], strict=True)
        ]
        outlier = None
        if len(books.stages[0][0]):
            outlier = Coded(books.stages[0][0].unsqueeze(0), indices[0][:, outer])
        return VectorWeight.pack(
            coded[0],
            linear.part.weight.shape,
            residual=coded[1] if len(coded) > 1 else None,
            outlier=outlier,
            labels=labels,
            norm=linear.norm,
            scale_dtype=self.scale_dtype,
        )


class _Linear(NamedTuple):
    """A linear that is about to be quantized: ``order [in]`` says which column stands at each place of the part."""

    part: Part
    order: Tensor
    norm: Norm


def regularized(hessian: Tensor) -> Tensor:
    """1. Return a hessian over its mean diagonal, plus 0.01 on the diagonal (``utils/hessian.py``).

    Example:
        >>> regularized(torch.diag(torch.tensor([3.0, 1.0]))).diagonal()
        tensor([1.5100, 0.5100])
    """
    mean = hessian.diagonal().mean()
    scaled = hessian.float() / torch.where(mean > 0, mean, 1.0)
    scaled.diagonal().add_(_RIDGE)
    return scaled


def matched(factor: InverseFactor, scale: Tensor) -> InverseFactor:
    """Return the factor of ``S H S`` for the factor of H: that of weights whose columns are divided by ``scale [in]``.

    Example:
        >>> hessian, scale = torch.tensor([[2.0, 1.0], [1.0, 2.0]]), torch.tensor([3.0, 0.5])
        >>> expected = inverse_factor(scale * hessian * scale.unsqueeze(1), damping=0.0).upper
        >>> torch.allclose(matched(inverse_factor(hessian, damping=0.0), scale).upper, expected)
        True
    """
    return dataclasses.replace(factor, upper=factor.upper / scale, diagonal=factor.diagonal * scale.square())
