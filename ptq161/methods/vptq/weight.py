"""VPTQ of one weight as a function of tensors, as comparisons with other implementations need it."""

from __future__ import annotations

from collections.abc import Mapping

import torch
from torch import Tensor

from ptq161.methods.compensation import inverse_factor
from ptq161.methods.vptq.method import VPTQ
from ptq161.packed.vector import VectorWeight

# Enough for k-means to come to rest, which comparisons with other implementations need.
_TO_THE_END = 10_000


def quantize_weight(
    weight: Tensor,
    hessian: Tensor,
    *,
    vector_length: int,
    n_centroids: int,
    residual_centroids: int = 0,
    outlier_share: float = 0.0,
    outlier_vector_length: int = 4,
    outlier_centroids: int = 0,
    groups: int = 1,
    permute: bool = False,
    normalize: bool = False,
    damping: float = 0.01,
    column_block: int = 128,
    initial_centroids: Mapping[str, Tensor] | None = None,
    scale_dtype: str = "float16",
    generator: torch.Generator | None = None,
    match_hessian: bool = False,
    row_scales: bool = False,
) -> VectorWeight:
    """Quantize a weight with VPTQ; k-means runs until it comes to rest.

    Args:
        weight: ``[out, in]``.
        hessian: ``[in, in]``, of usual scale and regularized:
            :func:`ptq161.methods.vptq.method.regularized` of 2/n X^T X.
        vector_length: output rows of a vector.
        n_centroids: vectors in each codebook, 2 to 65536.
        residual_centroids: vectors in each residual codebook; 0 for none.
        outlier_share: share of the columns, rounded up, that have a codebook of their own.
        outlier_vector_length: output rows of an outlier's vector.
        outlier_centroids: vectors in the outliers' codebook, which also takes the columns that do not fall into equal
            groups; 0 for none.
        groups: groups of columns with a codebook each.
        permute: take the columns in the order of falling hessian diagonal.
        normalize: subtract each column's minimum and divide it by its range.
        damping: added to the hessian's diagonal, as a share of its mean; raised where the factorization fails.
        column_block: columns per block of the compensation.
        initial_centroids: starts ``[k, v]`` of the k-means: ``init_0`` of the outliers, ``init_1``, ``init_2``, ... of
            the groups, ``res_init_1``, ... of the residual codebooks; those that are missing are drawn.
        scale_dtype: dtype of stored centroids and scales.
        generator: on the CPU, for the starts that are drawn; None is that of seed 0.
        match_hessian: scale the hessian with a normalized column.
        row_scales: divide each row by its root mean square.

    Raises:
        UserError: a setting is out of range, the groups do not divide the columns, or weight or hessian is not finite.

    Example:
        >>> weight = torch.randn(8, 32, generator=torch.Generator().manual_seed(0))
        >>> packed = quantize_weight(weight, torch.eye(32), vector_length=2, n_centroids=16)
        >>> packed.nbytes  # 4 * 32 indices of 4 bits, 16 * 2 centroids of 16 bits
        128
        >>> float((packed.dequantize() - weight).norm() / weight.norm()) < 0.4
        True
    """
    method = VPTQ(
        vector_length=vector_length,
        centroids=n_centroids,
        residual_centroids=residual_centroids,
        outlier_share=outlier_share,
        outlier_vector_length=outlier_vector_length,
        outlier_centroids=outlier_centroids,
        groups=groups,
        permute=permute,
        normalize=normalize,
        damping=damping,
        column_block=column_block,
        scale_dtype=scale_dtype,
        match_hessian=match_hessian,
        row_scales=row_scales,
        iterations=_TO_THE_END,
        tolerance=0.0,
    )
    factor = inverse_factor(hessian, damping, act_order=permute)
    return method.quantize_linear(weight, factor, generator=generator, initial_centroids=initial_centroids)
