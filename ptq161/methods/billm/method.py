"""BiLLM: salient columns binarized twice, the rest split in two and binarized once (arXiv 2402.04291).

Follows ``BRAGPTQ.fasterquant`` of Aaronhuang-778/BiLLM (``bigptq.py``) with its ``braq`` binarization. The loop over
column blocks is the paper's Algorithm 1, with the functions of Algorithm 2 for each block:

1. ``salient``: which columns are salient (Section 3.2), :func:`~ptq161.methods.billm.search.salient_columns`;
2. ``seg_search``: where the other weights are split (Section 3.3), :func:`~ptq161.methods.billm.search.best_split`;
3. ``binary``: the concentrated and the sparse group, each by mean and scale;
4. ``res_approximation``: the salient columns, binarized and their residual binarized again;
5. the block's loss is passed on to the blocks to the right.

Quirks of the released code are reproduced and named where they happen.
"""

from __future__ import annotations

import dataclasses
from typing import ClassVar

import torch
from torch import Tensor

from ptq161.checks import check_choice
from ptq161.kernels.where import fast_where
from ptq161.methods.billm.search import best_split, salient_columns
from ptq161.methods.compensation import CompensatedMethod, InverseFactor, compensate_blocks
from ptq161.packed.billm import BiLLMWeight, BinaryGrid, BinaryPlanes, binary_values
from ptq161.packed.weight import check_magnitude, stored_scale

_SALIENCIES = ("magnitude", "hessian")
# What the paper prints for LLaMA-2-7B: signs and second signs, without masks, scales and means.
_PAPER_BITS = 1.08


@dataclasses.dataclass(frozen=True)
class BiLLM(CompensatedMethod):
    """BiLLM; the columns of a block of the compensation share scales.

    Attributes:
        saliency: ``magnitude`` (the released default) or ``hessian``.

    Example:
        >>> BiLLM(saliency="hessian", column_block=64).nominal_bits()
        1.08
    """

    format: ClassVar[str] = "billm"

    saliency: str = "magnitude"

    def __post_init__(self) -> None:
        """Reject values out of range."""
        super().__post_init__()
        check_choice("method.saliency", self.saliency, _SALIENCIES)

    def nominal_bits(self) -> float:
        """Bits that the paper prints; what is stored is about 2.9."""
        return _PAPER_BITS

    def quantize_linear(self, weight: Tensor, factor: InverseFactor) -> BiLLMWeight:
        """Quantize one weight ``[out, in]`` with the factor of its inputs' hessian (:meth:`factorize`).

        Raises:
            UserError: the shapes do not match, or a weight is not finite.
        """
        check_magnitude(weight, self.scale_dtype)
        planes: list[BinaryPlanes] = []
        grids: list[BinaryGrid] = []
        pivots = factor.upper.diagonal()

        def quantize_block(block: Tensor, start: int) -> Tensor:
            # Quirks: the magnitude score keeps its sign in the search, and the hessian score (w / d)^2 has d from the
            # inverse's Cholesky factor, where the paper has the inverse's own diagonal.
            score = block if self.saliency == "magnitude" else block**2 / pivots[start : start + block.shape[1]] ** 2
            salient = salient_columns(score)  # 1
            # 2. Large scores are the sparse group, the tails of the bell.
            sparse = (score.abs() >= best_split(score, salient)) & ~salient
            block_planes, grid = binarize(block, salient, sparse, self.scale_dtype)  # 3 and 4
            planes.append(block_planes)
            grids.append(grid)
            return binary_values(block_planes, grid)

        # 5. Quirk: the released loop over a block's columns computes their losses, but passes none on within the block.
        compensate_blocks(weight, factor, quantize_block, self.column_block)
        whole = BinaryPlanes(*(torch.cat(plane, dim=-1) for plane in zip(*planes, strict=True)))
        grid = BinaryGrid(*(torch.cat(parameter, dim=-1) for parameter in zip(*grids, strict=True)))
        return BiLLMWeight.pack(whole, grid, self.column_block, scale_dtype=self.scale_dtype)


def quantize_weight(
    weight: Tensor,
    hessian: Tensor,
    saliency: str,
    column_block: int = 128,
    *,
    damping: float = 0.01,
    scale_dtype: str = "float16",
) -> BiLLMWeight:
    """Quantize a weight with BiLLM.

    Args:
        weight: ``[out, in]``.
        hessian: ``[in, in]``, 2/n X^T X before damping.
        saliency: ``magnitude`` or ``hessian``.
        column_block: columns that share scales; the last block may be shorter.
        damping: added to the hessian's diagonal, as a share of its mean; raised where the factorization fails.
        scale_dtype: dtype of stored scales and means.

    Raises:
        UserError: a setting is out of range, or weight or hessian is not finite, or the hessian is not positive
            definite.

    Example:
        >>> generator = torch.Generator().manual_seed(0)
        >>> weight = torch.randn(64, 256, generator=generator)
        >>> packed = quantize_weight(weight, torch.eye(256), saliency="magnitude")
        >>> round(packed.bits_per_weight, 1)  # the paper prints 1.08
        2.9
        >>> len(packed.dequantize()[0].unique()) <= 2 * (4 + 4)  # two blocks: 4 values in salient columns, 4 in others
        True
    """
    method = BiLLM(saliency=saliency, column_block=column_block, damping=damping, scale_dtype=scale_dtype)
    return method.quantize_linear(weight, method.factorize(hessian))


def binarize(block: Tensor, salient: Tensor, sparse: Tensor, scale_dtype: str) -> tuple[BinaryPlanes, BinaryGrid]:
    """Binarize one block of columns, each step against what the step before stores.

    The authors' sign of an exact zero is 0, which one bit cannot hold; it is +1 here.

    Args:
        block: ``[out, columns]``.
        salient: ``[columns]`` bool, binarized with a residual.
        sparse: ``[out, columns]`` bool, the weights of the other columns that form the group of large ones.
        scale_dtype: dtype of stored scales and means.

    Returns:
        the planes and the grid ``[4 or 3, out, 1]``.

    Example:
        >>> block = torch.tensor([[1.0, -1.0, 3.0, -3.0]])
        >>> salient = torch.zeros(4, dtype=torch.bool)
        >>> planes, grid = binarize(block, salient, sparse=block.abs() > 2, scale_dtype="float16")
        >>> binary_values(planes, grid).tolist()
        [[1.0, -1.0, 3.0, -3.0]]
    """
    # 3. binary(.) of both groups; the sign of a weight is that of its distance from its own group's mean.
    concentrated_mean, concentrated_scale = _binarize_once(block, ~sparse & ~salient, scale_dtype)
    sparse_mean, sparse_scale = _binarize_once(block, sparse, scale_dtype)
    signs = block >= fast_where(sparse, sparse_mean, concentrated_mean)

    # 4. res_approximation(.): alpha_o B_o + alpha_r B_r, here with a mean in each order.
    second_signs = torch.zeros_like(sparse)
    columns = block[:, salient]
    every = torch.ones_like(columns, dtype=torch.bool)
    first_mean = _mean(columns, every)
    distance = columns - first_mean
    first_scale = stored_scale(_mean(distance.abs(), every), scale_dtype).float()
    signs[:, salient] = distance >= 0
    residual = columns - fast_where(distance >= 0, first_scale, -first_scale)
    salient_mean = stored_scale(_mean(residual, every), scale_dtype).float()
    residual = residual - salient_mean
    second_scale = stored_scale(_mean(residual.abs(), every), scale_dtype).float()
    second_signs[:, salient] = residual >= 0
    grid = BinaryGrid(
        scales=torch.stack([concentrated_scale, sparse_scale, first_scale, second_scale]),
        means=torch.stack([concentrated_mean, sparse_mean, salient_mean]),
    )
    return BinaryPlanes(salient, sparse, signs, second_signs), grid


def _binarize_once(block: Tensor, mask: Tensor, scale_dtype: str) -> tuple[Tensor, Tensor]:
    """Return mean and scale ``[out, 1]`` of the masked weights of each row, as stored; zero where there are none."""
    mean = stored_scale(_mean(block, mask), scale_dtype).float()
    scale = stored_scale(_mean((block - mean).abs(), mask), scale_dtype).float()
    return mean, scale


def _mean(values: Tensor, mask: Tensor) -> Tensor:
    weight = mask.float()
    return (values * weight).sum(1, keepdim=True) / weight.sum(1, keepdim=True).clamp(min=1)
