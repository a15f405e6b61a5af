"""Error compensation through the inverse hessian's Cholesky factor (GPTQ, arXiv 2210.17323, Algorithm 1).

Shared by GPTQ, PB-LLM, BiLLM and QuIP's LDLQ. Columns are quantized in order; what a column loses is made good in
the columns to its right. Within a block of columns that happens column by column, beyond it once per block.
The hessian is 2/n X^T X over n calibration sequences, before damping.

Algorithm 1 and where its lines are, with W the weight, B the columns per block and U the factor, which the paper calls
H^-1 from line 3 on. The numbers stand beside the code::

    1   Q = 0                                              values, a block at a time
    2   E = 0                                              losses, a block at a time
    3   U = Cholesky(inverse(H))^T                         inverse_factor, _inverse_cholesky
    4   for i = 0, B, 2B, ...:                             _compensate
    5       for j = i, ..., i + B - 1:                     compensate_columns
    6           Q[:, j] = quant(W[:, j])
    7           E[:, j - i] = (W[:, j] - Q[:, j]) / U[j, j]
    8           W[:, j : i + B] -= E[:, j - i] U[j, j : i + B]
    9       W[:, i + B :] -= E U[i : i + B, i + B :]       _compensate

Lines 6 to 8 are the update of one column (Eq. 2 and 3), whose inverse hessians line 3 computes all at once; line 9 is
the lazy update of a whole block. BiLLM leaves line 8 out (compensate_blocks).
"""

from __future__ import annotations

import dataclasses
import math
from abc import abstractmethod
from collections.abc import Callable, Mapping, Sequence

import torch
from torch import Tensor

from ptq161.errors import UserError
from ptq161.methods.base import Window, prefix_errors
from ptq161.methods.layerwise import InputStatistics, LayerwiseMethod
from ptq161.packed.weight import PackedWeight

_LARGEST_DAMPING = 1.0
# Columns between which line 8 runs column by column; the rest of the block follows in one product.
_STRIP = 16


@dataclasses.dataclass(frozen=True)
class InverseFactor:
    """The upper Cholesky factor of the damped hessian's inverse.

    Attributes:
        upper: ``[in, in]`` float32, ``upper.T @ upper = inverse(hessian + damping * mean(diagonal) * identity)``.
        dead: ``[in]`` bool, the columns whose input was always zero: their hessian diagonal counts as one, their
            weights as zero.
        damping: the share of the mean diagonal with which the factorization succeeded.
        order: ``[in]``, which original column stands at each place; None is the original order.
        diagonal: ``[in]`` float32, of the hessian before damping, in the factor's order: zero where a column is dead.

    Example:
        >>> factor = inverse_factor(torch.diag(torch.tensor([4.0, 1.0, 0.0])))
        >>> factor.upper.shape, factor.dead.tolist(), factor.damping, factor.diagonal.tolist()
        (torch.Size([3, 3]), [False, False, True], 0.01, [4.0, 1.0, 0.0])
    """

    upper: Tensor
    dead: Tensor
    damping: float
    diagonal: Tensor
    order: Tensor | None = None


@dataclasses.dataclass(frozen=True)
class CompensatedMethod(LayerwiseMethod):
    """A layer-wise method inside the compensation; linears of one input share one factorization.

    Attributes:
        damping: added to the hessian's diagonal, as a share of its mean; raised where the factorization fails.
        column_block: columns per block of the compensation.

    Example:
        >>> from ptq161.methods.gptq import GPTQ
        >>> method = GPTQ(bits=2, damping=0.05)
        >>> factor = method.factorize(torch.eye(4))  # once for the linears of one input
        >>> [method.quantize_linear(torch.ones(rows, 4), factor).dequantize().shape[0] for rows in (6, 2, 2)]
        [6, 2, 2]
    """

    damping: float = 0.01
    column_block: int = 128

    def __post_init__(self) -> None:
        """Reject values out of range."""
        super().__post_init__()
        check_damping(self.damping)
        _check_column_block(self.column_block)

    def factorize(self, hessian: Tensor) -> InverseFactor:
        """Factorize the ``[in, in]`` hessian that linears share."""
        return inverse_factor(hessian, self.damping)

    @abstractmethod
    def quantize_linear(self, weight: Tensor, factor: InverseFactor) -> PackedWeight:
        """Quantize one weight ``[out, in]`` with the factor of its inputs' hessian."""

    def quantize_group(
        self, weights: Mapping[str, Tensor], statistics: InputStatistics | None, window: Window
    ) -> dict[str, PackedWeight]:
        """Factorize once, then quantize each linear."""
        return self.quantize_factorized(weights, self.factorize_group(list(weights), statistics, window), window)

    def factorize_group(
        self, names: Sequence[str], statistics: InputStatistics | None, window: Window
    ) -> InverseFactor:
        """Factorize the hessian that linears share, and emit ``raised_damping`` where the damping had to be raised."""
        assert statistics is not None, "a method with needs_statistics gets them from the driver"
        with prefix_errors(", ".join(names)):
            factor = self.factorize(statistics.hessian)
        if factor.damping != self.damping:
            window.on_metric("raised_damping", factor.damping, block=window.first_block, linear=names[0])
        return factor

    def quantize_factorized(
        self, weights: Mapping[str, Tensor], factor: InverseFactor, window: Window
    ) -> dict[str, PackedWeight]:
        """Quantize the linears of one input; a method whose linears share more than the factor has its own way."""
        packed: dict[str, PackedWeight] = {}
        for name, weight in weights.items():
            with prefix_errors(name):
                packed[name] = self.quantize_linear(weight, factor)
        return packed


def inverse_factor(hessian: Tensor, damping: float = 0.01, *, act_order: bool = False) -> InverseFactor:
    """Factorize a hessian, raising the damping tenfold each time that it fails.

    Args:
        hessian: ``[in, in]``, left as it is.
        damping: added to the diagonal, as a share of its mean.
        act_order: take the columns in the order of falling diagonal.

    Raises:
        UserError: the hessian is not square, not finite, or not positive definite with a damping of 1; or ``damping``
            is out of range.

    Example:
        >>> inverse_factor(torch.diag(torch.tensor([4.0, 1.0])), damping=0.0).upper.diagonal()
        tensor([0.5000, 1.0000])
        >>> inverse_factor(torch.diag(torch.tensor([1.0, 4.0])), act_order=True).order
        tensor([1, 0])
    """
    check_damping(damping)
    check_hessian(hessian)
    hessian = hessian.to(torch.float32, copy=True)
    diagonal = hessian.diagonal()
    # As released: an input that is always zero would make the hessian singular.
    dead = diagonal == 0
    diagonal[dead] = 1.0
    order = None
    if act_order:  # an option of the released code; the paper quantizes in the given order (its Step 1)
        order = torch.argsort(diagonal, descending=True)
        hessian, dead = hessian[order][:, order], dead[order]
    kept = hessian.diagonal().masked_fill(dead, 0.0)
    # Line 3. The authors add 1 % of the mean diagonal (Step 3) and fail where that is too little; here it rises.
    for share in _dampings(damping):
        upper = _inverse_cholesky(hessian, share)
        if upper is not None:
            return InverseFactor(upper, dead, share, kept, order)
    raise UserError(
        f"the hessian is not positive definite, even with method.damping={_LARGEST_DAMPING:g}; "
        "it has to be 2/n X^T X of the calibration inputs X."
    )


def compensate_columns(
    weight: Tensor,
    factor: InverseFactor,
    quantize_column: Callable[[Tensor, int, Tensor], Tensor],
    column_block: int = 128,
) -> Tensor:
    """Quantize column by column, each loss made good in all columns to the right.

    Args:
        weight: ``[out, in]``, its columns in the factor's order.
        factor: from :func:`inverse_factor`.
        quantize_column: ``quantize_column(column, j, lagged)`` returns the stored values ``[out]`` for the compensated
            column ``[out]`` at place ``j``; ``lagged [out, in]`` is the weight as compensated up to the last finished
            block, from which authors take a group's range.
        column_block: columns per block; changes rounding errors and ``lagged`` only.

    Returns:
        the quantized weight ``[out, in]`` float32, in the factor's order.

    Raises:
        UserError: ``column_block`` is below 1, the shapes do not match, or a weight is not finite.

    Example:
        >>> hessian = torch.tensor([[1.0, 0.9], [0.9, 1.0]])  # two inputs that are nearly the same
        >>> weight = torch.tensor([[0.4, 0.4]])  # 0.8 in all: rounding each to 0 loses it
        >>> compensate_columns(weight, inverse_factor(hessian), lambda column, j, lagged: column.round())
        tensor([[0., 1.]])
    """

    def quantize(block: Tensor, start: int, upper: Tensor, lagged: Tensor) -> tuple[Tensor, Tensor]:
        values, losses = torch.empty_like(block), torch.empty_like(block)
        pivots = upper.diagonal().tolist()
        for first in range(0, len(pivots), _STRIP):
            last = min(first + _STRIP, len(pivots))
            for i in range(first, last):  # line 5
                values[i] = quantize_column(block[i], start + i, lagged.T)  # line 6
                losses[i] = (block[i] - values[i]) / pivots[i]  # line 7
                block[i + 1 : last].addr_(upper[i, i + 1 : last], losses[i], alpha=-1)  # line 8, within the strip
            block[last:].addmm_(upper[first:last, last:].T, losses[first:last], alpha=-1)  # line 8, right of the strip
        return values, losses

    return _compensate(weight, factor, quantize, column_block)


def compensate_blocks(
    weight: Tensor,
    factor: InverseFactor,
    quantize_block: Callable[[Tensor, int], Tensor],
    column_block: int = 128,
) -> Tensor:
    """Quantize whole blocks, each loss made good in the blocks to the right but not within the block.

    Args:
        weight: ``[out, in]``, its columns in the factor's order.
        factor: from :func:`inverse_factor`.
        quantize_block: ``quantize_block(block, start)`` returns the stored values of the compensated columns
            ``block [out, columns]`` that begin at ``start``.
        column_block: columns per block; the last one may be shorter.

    Returns:
        the quantized weight ``[out, in]`` float32.

    Raises:
        UserError: ``column_block`` is below 1, the shapes do not match, or a weight is not finite.

    Example:
        >>> factor = inverse_factor(torch.tensor([[1.0, 0.9], [0.9, 1.0]]))
        >>> weight = torch.tensor([[0.4, 0.4]])
        >>> [compensate_blocks(weight, factor, lambda block, start: block.round(), n).tolist() for n in (1, 2)]
        [[[0.0, 1.0]], [[0.0, 0.0]]]
    """

    def quantize(block: Tensor, start: int, upper: Tensor, lagged: Tensor) -> tuple[Tensor, Tensor]:
        # Lines 6 and 7 for all columns of the block together; there is no line 8.
        values = quantize_block(block.T.contiguous(), start).T
        return values, (block - values) / upper.diagonal().unsqueeze(1)

    return _compensate(weight, factor, quantize, column_block)


def weighted_error(weight: Tensor, quantized: Tensor, hessian: Tensor) -> float:
    """Return ``trace(D H D^T)`` of the difference ``D [out, in]``: 2/n times the squared error of the outputs.

    Example:
        >>> hessian = torch.diag(torch.tensor([4.0, 1.0]))
        >>> weighted_error(torch.tensor([[1.0, 3.0]]), torch.tensor([[0.0, 1.0]]), hessian)  # 4 * 1 + 1 * 4
        8.0
    """
    difference = (weight - quantized).double()
    return float(((difference @ hessian.double()) * difference).sum())


def check_hessian(hessian: Tensor, in_features: int | None = None) -> None:
    """Check the shape and the values of a hessian.

    Args:
        hessian: to be ``[in, in]``.
        in_features: columns of the weight that it has to belong to; None accepts any number.

    Raises:
        UserError: it is not square, not finite, or belongs to another number of inputs.

    Example:
        >>> check_hessian(torch.eye(4), in_features=4)
        >>> check_hessian(torch.ones(2, 3))
        Traceback (most recent call last):
            ...
        ptq161.errors.UserError: a hessian of shape [2, 3] is not [in_features, in_features].
    """
    if hessian.ndim != 2 or hessian.shape[0] != hessian.shape[1]:
        raise UserError(f"a hessian of shape {list(hessian.shape)} is not [in_features, in_features].")
    if in_features not in (None, hessian.shape[0]):
        raise UserError(
            f"a hessian of {hessian.shape[0]} inputs does not belong to a weight with {in_features} columns."
        )
    if not bool(torch.isfinite(hessian).all()):
        raise UserError(
            "the hessian of the inputs is NaN or infinite, which no damping mends; check the activations' range."
        )


def check_damping(damping: float) -> None:
    """Check the share of the mean diagonal that is added to the hessian.

    Raises:
        UserError: it is not in [0, 1].

    Example:
        >>> check_damping(0.01)
        >>> check_damping(-1)
        Traceback (most recent call last):
            ...
        ptq161.errors.UserError: method.damping=-1: use a value in [0, 1], such as 0.01.
    """
    if not 0 <= damping <= _LARGEST_DAMPING:
        raise UserError(f"method.damping={damping}: use a value in [0, {_LARGEST_DAMPING:g}], such as 0.01.")


def _check_column_block(column_block: int) -> None:
    """Check the number of columns per block.

    Raises:
        UserError: it is below 1.
    """
    if column_block < 1:
        raise UserError(f"method.column_block={column_block}: use at least 1, such as 128.")


def _compensate(
    weight: Tensor,
    factor: InverseFactor,
    quantize: Callable[[Tensor, int, Tensor, Tensor], tuple[Tensor, Tensor]],
    column_block: int,
) -> Tensor:
    _check_column_block(column_block)
    in_features = weight.shape[1]
    if factor.upper.shape[0] != in_features:
        raise UserError(
            f"a hessian of {factor.upper.shape[0]} inputs does not belong to a weight with {in_features} columns."
        )
    if not bool(torch.isfinite(weight).all()):
        raise UserError("a weight is NaN or infinite; check the model's checkpoint.")
    # Transposed: a column of the weight lies in one piece of memory, which the loop over columns lives on.
    work = weight.float().masked_fill(factor.dead, 0.0).T.contiguous()
    for start in range(0, in_features, column_block):  # line 4
        stop = min(start + column_block, in_features)
        block = work[start:stop].clone()
        values, losses = quantize(block, start, factor.upper[start:stop, start:stop], work)
        work[start:stop] = values
        work[stop:].addmm_(factor.upper[start:stop, stop:].T, losses, alpha=-1)  # line 9
    return work.T.contiguous()


def _dampings(first: float) -> list[float]:
    """Return the shares to try: the first, then tenfold, up to the largest."""
    shares = [first]
    while shares[-1] < _LARGEST_DAMPING:
        shares.append(min(max(10 * shares[-1], 1e-3), _LARGEST_DAMPING))
    return shares


def _inverse_cholesky(hessian: Tensor, damping: float) -> Tensor | None:
    """Return the upper factor of the damped hessian's inverse; None where a factorization fails."""
    damped = hessian.clone()
    damped.diagonal().add_(damping * damped.diagonal().mean())
    # The authors' own sequence (Cholesky, inverse, Cholesky): a shorter one exists, but rounds differently on
    # ill-conditioned hessians.
    lower, failed = torch.linalg.cholesky_ex(damped)
    if int(failed):
        return None
    upper: Tensor
    upper, failed = torch.linalg.cholesky_ex(torch.cholesky_inverse(lower), upper=True)
    if int(failed) or not math.isfinite(float(upper.sum())):
        return None
    return upper
