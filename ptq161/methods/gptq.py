"""GPTQ: round to nearest column by column, with the error made good in the columns to come (arXiv 2210.17323).

Follows ``GPTQ.fasterquant`` of IST-DASLab/gptq.
"""

from __future__ import annotations

import dataclasses

import torch
from torch import Tensor

from ptq161.methods.compensation import CompensatedMethod, InverseFactor, compensate_columns, inverse_factor
from ptq161.packed.uniform import UniformWeight, check_uniform, uniform_codes, uniform_nearest, uniform_parameters


@dataclasses.dataclass(frozen=True)
class GPTQ(CompensatedMethod):
    """GPTQ.

    Attributes:
        bits: 2, 3, 4 or 8.
        group_size: columns that share a scale; None is one scale per output channel.
        symmetric: center the grid on zero and store no zero points.
        act_order: take the columns in the order of falling hessian diagonal.
    """

    bits: int = 4
    group_size: int | None = None
    symmetric: bool = False
    act_order: bool = False

    def __post_init__(self) -> None:
        """Reject values out of range."""
        super().__post_init__()
        check_uniform(self.bits, self.group_size)

    def nominal_bits(self) -> float:
        """Bits of a code; scales and zero points are not counted."""
        return float(self.bits)

    def factorize(self, hessian: Tensor) -> InverseFactor:
        """Factorize the hessian with its columns in the order of quantization."""
        return inverse_factor(hessian, self.damping, act_order=self.act_order)

    def quantize_linear(self, weight: Tensor, factor: InverseFactor) -> UniformWeight:
        """Quantize one weight."""
        return quantize_with_factor(
            weight,
            factor,
            self.bits,
            group_size=self.group_size,
            symmetric=self.symmetric,
            column_block=self.column_block,
            scale_dtype=self.scale_dtype,
        )


def quantize_weight(
    weight: Tensor,
    hessian: Tensor,
    bits: int,
    *,
    group_size: int | None = None,
    symmetric: bool = False,
    act_order: bool = False,
    damping: float = 0.01,
    column_block: int = 128,
    scale_dtype: str = "float16",
) -> UniformWeight:
    """Quantize a weight with GPTQ.

    Args:
        weight: ``[out, in]``.
        hessian: ``[in, in]``, 2/n X^T X before damping.
        bits: 2, 3, 4 or 8.
        group_size: columns (in the order of quantization) that share a scale; None is one scale per output channel.
        symmetric: center the grid on zero.
        act_order: take the columns in the order of falling hessian diagonal.
        damping: added to the hessian's diagonal, as a share of its mean; raised where the factorization fails.
        column_block: columns per block; with ``group_size`` it decides how far the weights are compensated that give
            a group its range.
        scale_dtype: dtype of stored scales and zero points.

    Raises:
        UserError: a setting is out of range, or weight or hessian is not finite, or the hessian is not positive
            definite.
    """
    factor = inverse_factor(hessian, damping, act_order=act_order)
    return quantize_with_factor(
        weight,
        factor,
        bits,
        group_size=group_size,
        symmetric=symmetric,
        column_block=column_block,
        scale_dtype=scale_dtype,
    )


def quantize_with_factor(
    weight: Tensor,
    factor: InverseFactor,
    bits: int,
    *,
    group_size: int | None = None,
    symmetric: bool = False,
    column_block: int = 128,
    scale_dtype: str = "float16",
) -> UniformWeight:
    """Quantize a weight with GPTQ, given the factor that linears of one input share (see :func:`quantize_weight`)."""
    check_uniform(bits, group_size)
    weight = weight.float()
    in_features = weight.shape[1]
    width = group_size or in_features
    ordered = weight if factor.order is None else weight[:, factor.order]
    # Without groups, the authors take the range before they set the weights of dead columns to zero.
    grids = [] if group_size else [uniform_parameters(ordered, bits, symmetric, scale_dtype=scale_dtype)]

    def quantize_column(column: Tensor, j: int, lagged: Tensor) -> Tensor:
        if j // width == len(grids):
            # The authors' range of a group: its weights before the compensation within the running block.
            grids.append(uniform_parameters(lagged[:, j : j + width], bits, symmetric, scale_dtype=scale_dtype))
        scale, zero_point = grids[-1]
        return uniform_nearest(column, scale[:, 0], zero_point[:, 0], bits)

    values = compensate_columns(ordered, factor, quantize_column, column_block)
    scales, zero_points = (torch.cat(parameters, dim=1) for parameters in zip(*grids, strict=True))
    group_index = torch.arange(in_features, device=weight.device) // width
    # A value on the grid is nearest to its own code.
    codes = uniform_codes(values, scales[:, group_index], zero_points[:, group_index], bits)
    if factor.order is not None:
        original = torch.argsort(factor.order)
        codes, group_index = codes[:, original], group_index[original]
    return UniformWeight.pack(
        codes,
        scales,
        zero_points,
        bits,
        group_size=group_size,
        symmetric=symmetric,
        scale_dtype=scale_dtype,
        group_index=group_index if group_size and factor.order is not None else None,
    )
