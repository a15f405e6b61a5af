"""Quant-dLLM: sums of binary planes with row and column scales, fitted by importance (arXiv 2510.03274).

Follows ``BRAGPTQ.fasterquant`` of ZTA2785/Quant-dLLM with its ``arb-rc`` binarization. The parts of the paper, as
numbered in the code below:

1. Adaptive Blockwise Mixed Precision: the least important blocks get one plane less, as many of the most important
   one more, :func:`allocate_orders`;
2. the entries of a block that count three times in the fit, :func:`salient_entries`;
3. the Data-aware Any-order Quantizer on a block, :func:`fit_block`;
4. the block's loss is passed on to the blocks to the right, by :mod:`ptq161.methods.compensation`.

The paper's Masked Calibration Simulation is a property of the calibration tokens: ``calib.masking`` in
:mod:`ptq161.data.masking`.
"""

from __future__ import annotations

import dataclasses
import itertools
from typing import ClassVar, NamedTuple

import torch
from torch import Tensor

from ptq161.checks import check_choice
from ptq161.errors import UserError
from ptq161.methods.base import Window
from ptq161.methods.compensation import CompensatedMethod, InverseFactor, compensate_blocks
from ptq161.methods.layerwise import quantize_sequentially
from ptq161.packed.row_column_binary import ORDERS, RowColumnBinaryWeight
from ptq161.packed.weight import PackedWeight, check_magnitude, stored_scale

_ALLOCATIONS = ("blocks", "columns")
_MIXED_ORDER = 2
_MIXED_RATIO = 0.05
# As released: alternations, the weight of the squared error of a salient entry, and from which z-score on it is one.
_ROUNDS = 15
_SALIENT_WEIGHT = 3.0
_SALIENT_DEVIATIONS = 2.0


@dataclasses.dataclass(frozen=True)
class QuantDLLM(CompensatedMethod):
    """Quant-dLLM; the columns of a block of the compensation share a row's scales.

    Attributes:
        order: sign planes per weight: 1, 2 or 3.
        mixed_ratio: share of the blocks that get a plane less, and of those that get one more, in [0, 0.5], around
            order 2; 0 gives all the same. None is the released 0.05 for order 2, and 0 for the others.
        allocation: what gets more or fewer planes: ``blocks`` (as released), or ``columns``, of which a ratio moves
            some even where there are few blocks; the mean order is then exact, with a short last block too.
        true_sequential: quantize the linears of a decoder block one input after another, each on the statistics that
            the quantized ones before it leave (as released); otherwise all of them at once.

    Example:
        >>> QuantDLLM().nominal_bits(), QuantDLLM(order=1).nominal_bits()
        (2.0, 1.0)
        >>> QuantDLLM(order=1, mixed_ratio=0.1)
        Traceback (most recent call last):
            ...
        ptq161.errors.UserError: method.mixed_ratio=0.1: orders are mixed around method.order=2 only; use 0 here.
    """

    format: ClassVar[str] = "row_column_binary"

    order: int = 2
    mixed_ratio: float | None = None
    allocation: str = "blocks"
    true_sequential: bool = True

    def __post_init__(self) -> None:
        """Reject values out of range."""
        super().__post_init__()
        if self.order not in ORDERS:
            raise UserError(f"method.order={self.order}: use one of {', '.join(map(str, ORDERS))}.")
        check_choice("method.allocation", self.allocation, _ALLOCATIONS)
        if self.mixed_ratio is None:
            return
        if not 0 <= self.mixed_ratio <= 0.5:
            raise UserError(f"method.mixed_ratio={self.mixed_ratio}: use a value in [0, 0.5], such as 0.05.")
        if self.mixed_ratio and self.order != _MIXED_ORDER:
            raise UserError(
                f"method.mixed_ratio={self.mixed_ratio}: orders are mixed around method.order={_MIXED_ORDER} only; "
                "use 0 here."
            )

    def nominal_bits(self) -> float:
        """Mean order: the paper counts signs alone."""
        return float(self.order)

    def quantize_window(self, window: Window) -> dict[str, PackedWeight]:
        """Quantize the linears of a decoder block, one input after another if ``true_sequential``."""
        return quantize_sequentially(self, window) if self.true_sequential else super().quantize_window(window)

    def quantize_linear(self, weight: Tensor, factor: InverseFactor) -> RowColumnBinaryWeight:
        """Quantize one weight ``[out, in]`` with the factor of its inputs' hessian (:meth:`factorize`).

        Raises:
            UserError: the shapes do not match, a weight is not finite, or ``mixed_ratio`` moves nothing.
        """
        check_magnitude(weight, self.scale_dtype)
        weight = weight.float().masked_fill(factor.dead, 0.0)
        pivots = factor.upper.diagonal()
        orders = self.orders_of(importance(weight, pivots))  # 1
        fits: list[BlockFit] = []

        def quantize_block(block: Tensor, start: int) -> Tensor:
            own = slice(start, start + block.shape[1])
            salient = salient_entries(importance(block, pivots[own]))  # 2
            fits.append(fit_block(block, salient, orders[own], self.scale_dtype))  # 3
            return fits[-1].values()

        compensate_blocks(weight, factor, quantize_block, self.column_block)  # 4
        terms = int(orders.max())
        filled = [fit.filled(terms) for fit in fits]
        return RowColumnBinaryWeight.pack(
            orders=orders,
            signs=torch.cat([fit.signs for fit in filled], dim=2),
            row_scales=torch.cat([fit.row_scales for fit in filled], dim=2),
            column_scales=torch.cat([fit.column_scales for fit in filled], dim=2).squeeze(1),
            column_block=self.column_block,
            scale_dtype=self.scale_dtype,
        )

    def orders_of(self, scores: Tensor) -> Tensor:
        """Return the order of each column, ``[in]``, from the importance ``[out, in]`` of the original weights."""
        in_features = scores.shape[1]
        ratio = _MIXED_RATIO if self.mixed_ratio is None else self.mixed_ratio
        if self.order != _MIXED_ORDER or not ratio:
            return torch.full((in_features,), self.order, device=scores.device)
        width = self.column_block if self.allocation == "blocks" else 1
        totals = torch.stack([part.sum() for part in scores.sum(0).split(width)])
        if int(ratio * totals.numel()) == 0:
            parts = f"blocks of {width} columns" if self.allocation == "blocks" else "columns"
            helps = "method.allocation=columns, a smaller method.column_block, or " if width > 1 else ""
            raise UserError(
                f"method.mixed_ratio={ratio} moves none of the {totals.numel()} {parts}: "
                f"use {helps}a ratio of 0 or of at least {1 / totals.numel():.3g}."
            )
        return allocate_orders(totals, ratio).repeat_interleave(width)[:in_features]


def quantize_weight(
    weight: Tensor,
    hessian: Tensor,
    order: int = 2,
    column_block: int = 128,
    mixed_ratio: float = 0.0,
    scale_dtype: str = "float16",
    *,
    allocation: str = "blocks",
    damping: float = 0.01,
) -> RowColumnBinaryWeight:
    """Quantize a weight with Quant-dLLM.

    Args:
        weight: ``[out, in]``.
        hessian: ``[in, in]``, 2/n X^T X before damping.
        order: sign planes per weight: 1, 2 or 3.
        column_block: columns that share a row's scales; the last block may be shorter.
        mixed_ratio: share of the blocks that get a plane less, and of those that get one more, around order 2.
        scale_dtype: dtype of stored scales.
        allocation: ``blocks`` or ``columns``, which get more or fewer planes.
        damping: added to the hessian's diagonal, as a share of its mean; raised where the factorization fails.

    Raises:
        UserError: a setting is out of range, or ``mixed_ratio`` moves nothing, or weight or hessian is not finite, or
            the hessian is not positive definite.

    Example:
        >>> weight = torch.randn(128, 128, generator=torch.Generator().manual_seed(0))
        >>> for order in (1, 2, 3):
        ...     packed = quantize_weight(weight, torch.eye(128), order)
        ...     error = (packed.dequantize() - weight).norm() / weight.norm()
        ...     print(round(packed.bits_per_weight, 2), bool(error < 0.62**order))
        1.25 True
        2.5 True
        3.75 True
    """
    method = QuantDLLM(
        order=order,
        mixed_ratio=mixed_ratio,
        allocation=allocation,
        damping=damping,
        column_block=column_block,
        scale_dtype=scale_dtype,
    )
    return method.quantize_linear(weight, method.factorize(hessian))


def importance(weight: Tensor, pivots: Tensor) -> Tensor:
    """Return ``(w / d)^2``: ``[out, columns]``.

    Args:
        weight: ``[out, columns]``.
        pivots: ``[columns]``, the diagonal d of the upper Cholesky factor of the hessian's inverse.

    Example:
        >>> importance(torch.tensor([[1.0, -3.0]]), torch.tensor([0.5, 1.0])).tolist()
        [[4.0, 9.0]]
    """
    return weight.square() / pivots.square()


def allocate_orders(scores: Tensor, ratio: float) -> Tensor:
    """Give order 1 to the least important parts, order 3 to as many of the most important ones, 2 to the others.

    Args:
        scores: ``[parts]``, importance of each.
        ratio: share of the parts that get order 1, rounded down, in [0, 0.5].

    Returns:
        ``[parts]`` int64.

    Example:
        >>> allocate_orders(torch.tensor([5.0, 1.0, 9.0, 4.0]), ratio=0.25).tolist()
        [2, 1, 3, 2]
    """
    moved = int(ratio * scores.numel())
    ranked = scores.argsort(stable=True)
    orders = torch.full_like(ranked, _MIXED_ORDER)
    orders[ranked[:moved]] = _MIXED_ORDER - 1
    orders[ranked[scores.numel() - moved :]] = _MIXED_ORDER + 1
    return orders


def salient_entries(scores: Tensor) -> Tensor:
    """Return which entries of a block count more than others in the fit: ``[out, columns]`` bool.

    As released, these are the entries whose importance lies more than two deviations from the block's mean, on either
    side, and all that reach the smallest of them (the paper has three deviations).

    Args:
        scores: ``[out, columns]``, importance.

    Example:
        >>> salient_entries(torch.tensor([[1.0, 1.0, 1.0, 1.0, 1.0, 1.0, 1.0, 9.0]])).int().tolist()
        [[0, 0, 0, 0, 0, 0, 0, 1]]
    """
    if scores.numel() < 2:  # no deviation
        return torch.zeros_like(scores, dtype=torch.bool)
    far = ((scores - scores.mean()) / scores.std()).abs() > _SALIENT_DEVIATIONS
    if not bool(far.any()):
        return far
    return scores >= scores[far].min()


class BlockFit(NamedTuple):
    """The terms of one block, of which a column has as many as its order.

    Attributes:
        signs: ``[terms, out, columns]`` bool, True for +1.
        row_scales: ``[terms, out, 1]`` float32, as stored.
        column_scales: ``[terms, 1, columns]`` float32, as stored; zero beyond a column's order.

    Example:
        >>> signs = torch.tensor([[[True, False]]])
        >>> BlockFit(signs, row_scales=torch.full((1, 1, 1), 3.0), column_scales=torch.ones(1, 1, 2)).values().tolist()
        [[3.0, -3.0]]
    """

    signs: Tensor
    row_scales: Tensor
    column_scales: Tensor

    def values(self) -> Tensor:
        """Return what the terms sum up to: ``[out, columns]`` float32."""
        terms = self.row_scales * self.column_scales
        total = torch.zeros_like(terms[0])
        for signs, term in zip(self.signs, terms, strict=True):
            total = total + torch.where(signs, term, -term)
        return total

    def filled(self, terms: int) -> BlockFit:
        """Return the same values with more terms, all zero."""
        return BlockFit(
            *(torch.cat([part, part.new_zeros(terms - len(part), *part.shape[1:])]) for part in self),
        )


def fit_block(block: Tensor, salient: Tensor, orders: Tensor, scale_dtype: str) -> BlockFit:
    """Fit the terms of one block: the Data-aware Any-order Quantizer.

    From a greedy start, each term's row and then column scales are set to their weighted least squares in turn; after
    each round, every entry takes the nearest of the values that its signs can give. That choice has no weights. Where
    no column has a second term, the signs stay those of the start.

    The released start keeps a zero for the sign of a weight that is zero, which one bit cannot hold: it takes no part
    in a fit of order 1, and its sign is +1 here.

    Args:
        block: ``[out, columns]`` float32.
        salient: ``[out, columns]`` bool, entries whose squared error counts three times.
        orders: ``[columns]``, the terms of each column.
        scale_dtype: dtype of stored scales; the last signs are chosen against the scales as they are stored.

    Raises:
        UserError: a scale leaves the range of ``scale_dtype``.

    Example:
        >>> block = torch.tensor([[3.0, -6.0], [1.0, 2.0]])  # of sizes (3, 1) by (1, 2)
        >>> fit = fit_block(block, torch.zeros(2, 2, dtype=torch.bool), torch.tensor([1, 1]), "float16")
        >>> fit.values().round(decimals=2).tolist()
        [[3.0, -6.0], [1.0, 2.0]]
    """
    n_terms = int(orders.max())
    takes_part = [(orders > k).float().unsqueeze(0) for k in range(n_terms)]
    signs, rows, columns = _greedy_start(block, takes_part)
    weights = salient.float().mul_(_SALIENT_WEIGHT - 1).add_(1)
    counted = [weights * sign.square() for sign in signs]  # without the zeros of the start
    aligned = (block * signs[0]).mul_(weights)
    for _ in range(_ROUNDS):
        for k in range(n_terms):
            if n_terms > 1:
                aligned = _without_others(block, k, signs, rows, columns).mul_(signs[k]).mul_(weights)
            rows[k] = (aligned @ columns[k].T) / (counted[k] @ columns[k].square().T + 1e-8)
            columns[k] = (rows[k].T @ aligned) / (rows[k].square().T @ counted[k] + 1e-8) * takes_part[k]
        if n_terms > 1:
            signs = _nearest_signs(block, _sizes(rows, columns))
            counted = [weights] * n_terms
    rows, columns = ([stored_scale(part, scale_dtype).float() for part in parts] for parts in (rows, columns))
    if n_terms > 1:
        signs = _nearest_signs(block, _sizes(rows, columns))
    return BlockFit(torch.stack(signs) >= 0, torch.stack(rows), torch.stack(columns))


def _sizes(rows: list[Tensor], columns: list[Tensor]) -> list[Tensor]:
    return [row * column for row, column in zip(rows, columns, strict=True)]


def _without_others(block: Tensor, k: int, signs: list[Tensor], rows: list[Tensor], columns: list[Tensor]) -> Tensor:
    """Return what is left of a block for term ``k`` of several: ``[out, columns]``."""
    rest = block
    for other in range(len(signs)):
        if other != k:
            rest = torch.addcmul(rest, rows[other] * columns[other], signs[other], value=-1)
    return rest


def _greedy_start(block: Tensor, takes_part: list[Tensor]) -> tuple[list[Tensor], list[Tensor], list[Tensor]]:
    """Return signs ``[out, columns]`` of -1, 0, 1, row scales ``[out, 1]`` and column scales ``[1, columns]``."""
    signs, rows, columns = [], [], []
    residual = block
    for own in takes_part:
        size = residual.abs() * own
        row = size.sum(1, keepdim=True) / own.sum()
        column = (size / (row + 1e-12)).mean(0, keepdim=True)
        signs.append(residual.sign())
        rows.append(row)
        columns.append(column)
        residual = residual - row * column * signs[-1]
    return signs, rows, columns


def _nearest_signs(block: Tensor, terms: list[Tensor]) -> list[Tensor]:
    """Return the signs whose sum of terms is nearest to each entry, by term: ``[out, columns]`` of -1 and 1.

    Equal distances take the first in the order - - -, - - +, - + -, and so on. The last sign follows from what the
    others leave, so that half of the combinations are tried.
    """
    *others, last = terms
    size = last.abs()
    plus = [torch.zeros_like(block, dtype=torch.bool) for _ in others]
    least = size
    for index, combination in enumerate(itertools.product((-1, 1), repeat=len(others))):
        rest = block
        for sign, term in zip(combination, others, strict=True):
            rest = torch.sub(rest, term, alpha=sign)
        error = rest.abs().sub_(size).abs_()
        if not index:
            least = error
            continue
        nearer = error < least
        least = torch.minimum(error, least)
        plus = [old | nearer if sign > 0 else old & ~nearer for old, sign in zip(plus, combination, strict=True)]
    signs = [plane.float().mul_(2).sub_(1) for plane in plus]
    rest = block
    for other, term in zip(signs, others, strict=True):
        rest = torch.addcmul(rest, other, term, value=-1)
    return [*signs, (rest * last > 0).float().mul_(2).sub_(1)]
