"""PB-LLM: salient weights at 8 bits, the rest binarized, inside GPTQ's compensation (arXiv 2310.00034).

Follows ``LowHighGPT.fasterquant`` of hahnyuan/PB-LLM (``gptq_pb/gptq.py``) with its ``xnor`` binarization and one
group per row. Its steps, numbered as in the code below:

1. the grid of the salient weights, from the whole row;
2. the salient weights, by magnitude or hessian;
3. mean and scale of the binarized weights, from the others;
4. GPTQ's compensation (Algorithm 1 of arXiv 2210.17323), in which each weight is rounded in its own way.

Quirks of the released code are reproduced and named where they happen.
"""

from __future__ import annotations

import dataclasses
from typing import ClassVar

import torch
from torch import Tensor

from ptq161.checks import check_choice
from ptq161.errors import UserError
from ptq161.kernels.sorting import sorted_values
from ptq161.methods.compensation import CompensatedMethod, InverseFactor, compensate_columns
from ptq161.packed.pb_llm import PBLLMWeight, binary_levels, check_high_bit
from ptq161.packed.uniform import uniform_codes, uniform_nearest, uniform_parameters
from ptq161.packed.weight import check_magnitude, stored_scale

_SALIENCIES = ("magnitude", "hessian")


@dataclasses.dataclass(frozen=True)
class PBLLM(CompensatedMethod):
    """PB-LLM.

    Attributes:
        low_frac: share of the weights that are binarized.
        high_bit: bits of the others: 2, 3, 4 or 8.
        saliency: ``magnitude`` (the released default) or ``hessian``.

    Example:
        >>> round(PBLLM(low_frac=0.9, high_bit=8).nominal_bits(), 2)  # 0.9 + 0.1 * 8
        1.7
    """

    format: ClassVar[str] = "pb_llm"

    low_frac: float = 0.9
    high_bit: int = 8
    saliency: str = "magnitude"

    def __post_init__(self) -> None:
        """Reject values out of range."""
        super().__post_init__()
        if not 0 <= self.low_frac < 1:
            raise UserError(f"method.low_frac={self.low_frac}: use a value in [0, 1), the share of binarized weights.")
        check_high_bit(self.high_bit)
        check_choice("method.saliency", self.saliency, _SALIENCIES)

    def nominal_bits(self) -> float:
        """Bits of signs and codes as the paper counts them, without the mask: 1.7 by default."""
        return self.low_frac + (1 - self.low_frac) * self.high_bit

    def quantize_linear(self, weight: Tensor, factor: InverseFactor) -> PBLLMWeight:
        """Quantize one weight ``[out, in]`` with the factor of its inputs' hessian (:meth:`factorize`).

        Raises:
            UserError: the shapes do not match, or a weight is not finite.
        """
        check_magnitude(weight, self.scale_dtype)
        weight = weight.float()
        # 1. Quirk: the salient weights' grid spans the whole row, and dead columns still count.
        grid = uniform_parameters(weight, self.high_bit, scale_dtype=self.scale_dtype)
        weight = weight.masked_fill(factor.dead, 0.0)
        # 2. The highest scores of the whole linear, not of a row or block.
        salient = salient_weights(weight, factor, self.low_frac, self.saliency)
        # 3. Before any compensation: a row has the same two values in all blocks.
        mean, scale = binary_parameters(weight.masked_fill(salient, 0.0), self.scale_dtype)
        row_mean, row_scale = mean.squeeze(1), scale.squeeze(1)
        high_scale, high_zero_point = (parameter.squeeze(1) for parameter in grid)
        salient_columns = salient.T.contiguous()

        def quantize_column(column: Tensor, j: int, lagged: Tensor) -> Tensor:
            # The authors' sign of an exact zero is 0, which one bit cannot hold; it is that of the float here.
            binary = torch.copysign(row_scale, column - row_mean).add_(row_mean)
            nearest = uniform_nearest(column, high_scale, high_zero_point, self.high_bit)
            return torch.where(salient_columns[j], nearest, binary)

        # 4. Salient weights take part: they pass on their losses, and they are compensated.
        values = compensate_columns(weight, factor, quantize_column, self.column_block)
        high, _ = binary_levels(mean, scale)
        return PBLLMWeight.pack(
            salient,
            values == high,
            uniform_codes(values, *grid, self.high_bit),
            means=mean,
            scales=scale,
            high_scales=grid[0],
            high_zero_points=grid[1],
            high_bit=self.high_bit,
            scale_dtype=self.scale_dtype,
        )


def quantize_weight(
    weight: Tensor,
    hessian: Tensor,
    low_frac: float,
    high_bit: int,
    saliency: str,
    column_block: int = 128,
    *,
    damping: float = 0.01,
    scale_dtype: str = "float16",
) -> PBLLMWeight:
    """Quantize a weight with PB-LLM.

    Args:
        weight: ``[out, in]``.
        hessian: ``[in, in]``, 2/n X^T X before damping.
        low_frac: share of the weights that are binarized, in [0, 1).
        high_bit: bits of the others: 2, 3, 4 or 8.
        saliency: ``magnitude`` or ``hessian``.
        column_block: columns per block of the compensation; the last one may be shorter.
        damping: added to the hessian's diagonal, as a share of its mean; raised where the factorization fails.
        scale_dtype: dtype of stored scales, means and zero points.

    Raises:
        UserError: a setting is out of range, or weight or hessian is not finite, or the hessian is not positive
            definite.

    Example:
        >>> weight = torch.tensor([[1.0, -1.0] * 9 + [0.0, 40.0]])
        >>> packed = quantize_weight(weight, torch.eye(20), low_frac=0.9, high_bit=8, saliency="magnitude")
        >>> packed.n_salient, round(float(packed.dequantize()[0, -1]), 1)
        (1, 40.0)
    """
    method = PBLLM(
        low_frac=low_frac,
        high_bit=high_bit,
        saliency=saliency,
        column_block=column_block,
        damping=damping,
        scale_dtype=scale_dtype,
    )
    return method.quantize_linear(weight, method.factorize(hessian))


def salient_weights(weight: Tensor, factor: InverseFactor, low_frac: float, saliency: str) -> Tensor:
    """Choose the weights that keep more bits: ``[out, in]`` bool.

    Args:
        weight: ``[out, in]``.
        factor: of the inputs' hessian.
        low_frac: share of the weights that are not salient.
        saliency: ``magnitude`` is |w|; ``hessian`` is (w / d)^2 with d the diagonal of the inverse's Cholesky factor
            (the paper has the inverse's own diagonal there).

    Example:
        >>> from ptq161.methods.compensation import inverse_factor
        >>> weight = torch.tensor([[1.0, -4.0, 2.0, 3.0]])
        >>> salient_weights(weight, inverse_factor(torch.eye(4)), low_frac=0.5, saliency="magnitude").tolist()
        [[False, True, False, False]]
    """
    score = weight.abs() if saliency == "magnitude" else weight**2 / factor.upper.diagonal() ** 2
    # Quirk: a score equal to the threshold is not salient, so one weight more than the share is binarized.
    place = int(score.numel() * low_frac)
    return score > sorted_values(score.flatten())[place]


def binary_parameters(weight: Tensor, scale_dtype: str) -> tuple[Tensor, Tensor]:
    """Return the mean and the scale ``[out, 1]`` between whose sums binarized weights choose, as they are stored.

    Args:
        weight: ``[out, in]`` with the salient weights set to zero. Quirk: those zeros count, both in the mean and,
            with their distance from it, in the scale.
        scale_dtype: dtype of stored means and scales.

    Example:
        >>> binary_parameters(torch.tensor([[2.0, 2.0, 0.0, 0.0]]), scale_dtype="float16")
        (tensor([[1.]]), tensor([[1.]]))
    """
    mean = stored_scale(weight.mean(1, keepdim=True), scale_dtype).float()
    scale = stored_scale((weight - mean).abs().mean(1, keepdim=True), scale_dtype).float()
    return mean, scale
