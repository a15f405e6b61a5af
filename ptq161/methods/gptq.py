"""GPTQ: round to nearest column by column, with the error made good in the columns to come (arXiv 2210.17323).

Follows ``GPTQ.fasterquant`` of IST-DASLab/gptq. Algorithm 1 of the paper is :mod:`ptq161.methods.compensation`; here is
the quantizer that it calls for each column, and the grids that belong to it.
"""

from __future__ import annotations

import dataclasses
from typing import ClassVar

import torch
from torch import Tensor

from ptq161.methods.compensation import CompensatedMethod, InverseFactor, compensate_columns, inverse_factor
from ptq161.methods.layerwise import UniformMethod
from ptq161.packed.uniform import UniformWeight, uniform_codes, uniform_nearest, uniform_parameters
from ptq161.packed.weight import check_magnitude


@dataclasses.dataclass(frozen=True)
class GPTQ(UniformMethod, CompensatedMethod):
    """GPTQ.

    The grid's settings are those of :class:`~ptq161.methods.layerwise.UniformMethod`, those of the compensation are
    those of :class:`~ptq161.methods.compensation.CompensatedMethod`.

    Attributes:
        symmetric: center the grid on zero and store no zero points.
        act_order: take the columns in the order of falling hessian diagonal.

    Example:
        >>> GPTQ(bits=2, group_size=128, act_order=True).nominal_bits()
        2.0
    """

    format: ClassVar[str] = "uniform"

    symmetric: bool = False
    act_order: bool = False

    def factorize(self, hessian: Tensor) -> InverseFactor:
        """Factorize the hessian with its columns in the order of quantization."""
        return inverse_factor(hessian, self.damping, act_order=self.act_order)

    def quantize_linear(self, weight: Tensor, factor: InverseFactor) -> UniformWeight:
        """Quantize one weight ``[out, in]`` with the factor of its inputs' hessian (:meth:`factorize`).

        Raises:
            UserError: the shapes do not match, or a weight is not finite.
        """
        check_magnitude(weight, self.scale_dtype)
        weight = weight.float()
        in_features = weight.shape[1]
        width = self.group_size or in_features
        ordered = weight if factor.order is None else weight[:, factor.order]
        # The grid that quant(.) of Algorithm 1's line 6 rounds to: per row, or per row and group.
        grids: list[tuple[Tensor, Tensor]] = []
        if self.group_size is None:
            # Without groups, the authors take the range before they set the weights of dead columns to zero.
            grids.append(self._grid(ordered))

        def quantize_column(column: Tensor, j: int, lagged: Tensor) -> Tensor:
            if j // width == len(grids):
                # The authors' range of a group: its weights before the compensation within the running block.
                grids.append(self._grid(lagged[:, j : j + width]))
            scale, zero_point = grids[-1]
            return uniform_nearest(column, scale[:, 0], zero_point[:, 0], self.bits)

        # Algorithm 1; its lines are numbered in the module of compensate_columns.
        values = compensate_columns(ordered, factor, quantize_column, self.column_block)
        scales, zero_points = (torch.cat(parameters, dim=1) for parameters in zip(*grids, strict=True))
        group_index = torch.arange(in_features, device=weight.device) // width
        # A value on the grid is nearest to its own code.
        codes = uniform_codes(values, scales[:, group_index], zero_points[:, group_index], self.bits)
        if factor.order is not None:
            original = torch.argsort(factor.order)
            codes, group_index = codes[:, original], group_index[original]
        return UniformWeight.pack(
            codes,
            scales,
            zero_points,
            self.bits,
            group_size=self.group_size,
            symmetric=self.symmetric,
            scale_dtype=self.scale_dtype,
            group_index=group_index if self.group_size and factor.order is not None else None,
        )

    def _grid(self, weight: Tensor) -> tuple[Tensor, Tensor]:
        return uniform_parameters(weight, self.bits, self.symmetric, scale_dtype=self.scale_dtype)


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

    Example:
        >>> from ptq161.methods import rtn
        >>> from ptq161.methods.compensation import weighted_error
        >>> generator = torch.Generator().manual_seed(0)
        >>> weight = torch.randn(8, 32, generator=generator)
        >>> inputs = torch.randn(64, 32, generator=generator).cumsum(dim=1)  # neighbors are correlated
        >>> hessian = 2 * inputs.T @ inputs
        >>> values = quantize_weight(weight, hessian, bits=3).dequantize()
        >>> nearest = rtn.quantize_weight(weight, bits=3).dequantize()
        >>> weighted_error(weight, values, hessian) < 0.5 * weighted_error(weight, nearest, hessian)
        True
    """
    method = GPTQ(
        bits=bits,
        group_size=group_size,
        symmetric=symmetric,
        act_order=act_order,
        damping=damping,
        column_block=column_block,
        scale_dtype=scale_dtype,
    )
    return method.quantize_linear(weight, method.factorize(hessian))
