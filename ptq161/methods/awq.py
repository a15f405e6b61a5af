"""AWQ: scale up the input channels that matter, clip the rest, round to nearest (Lin et al. 2023, arXiv 2306.00978).

Follows mit-han-lab/llm-awq:

1. channel scales: ``_search_module_scale`` in ``awq/quantize/auto_scale.py``, one scale per channel for all linears
   that share an input;
2. clipping: ``auto_clip_layer`` in ``awq/quantize/auto_clip.py``, per output channel or group, not for q and k;
3. rounding: ``pseudo_quantize_tensor`` in ``awq/quantize/quantizer.py``, asymmetric.

The output error of a linear over all calibration tokens is ``trace(D H D^T)`` with the hessian ``H`` and the weight's
change ``D``, so no inputs are kept. Differences:

- The released search compares outputs of the whole attention for q, k, v and of the whole MLP for gate and up; here
  the linears' own outputs are compared, summed over those that share the input. For o and down both are the same.
- It looks for clipping on 512 tokens, here on all.
- It folds the scales into the layer before the linear, so it skips o with grouped-query attention. Here they stay
  with the codes and every linear has them.
- A group's range includes zero here, which matters only where all of its weights have one sign.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Mapping, Sequence
from typing import ClassVar

import torch
from torch import Tensor

from ptq161.errors import UserError
from ptq161.kernels.matmul import linear
from ptq161.methods.base import Window, prefix_errors
from ptq161.methods.compensation import check_hessian
from ptq161.methods.layerwise import InputStatistics, UniformMethod
from ptq161.methods.rtn import quantize_weight as round_to_nearest
from ptq161.packed.awq import AWQWeight
from ptq161.packed.uniform import check_uniform, grouped, uniform_nearest, uniform_parameters
from ptq161.packed.weight import PackedWeight, stored_scale

_GRID = 20
_MAX_SHRINK = 0.5
_LEAST_SCALE = 1e-4


@dataclasses.dataclass(frozen=True)
class AWQ(UniformMethod):
    """AWQ. The defaults are those of the released examples.

    The grid's settings are those of :class:`~ptq161.methods.layerwise.UniformMethod`.

    Attributes:
        auto_scale: search the channel scales; without it they are one.
        auto_clip: search the clipping.

    Example:
        >>> method = AWQ(bits=3)
        >>> method.nominal_bits(), method.group_size
        (3.0, 128)
    """

    format: ClassVar[str] = "awq"

    group_size: int | None = 128
    auto_scale: bool = True
    auto_clip: bool = True

    def quantize_group(
        self, weights: Mapping[str, Tensor], statistics: InputStatistics | None, window: Window
    ) -> dict[str, PackedWeight]:
        """Search the channel scales that the linears share, then clip and round each."""
        assert statistics is not None, "a method with needs_statistics gets them from the driver"
        hessian = statistics.hessian
        scales = torch.ones_like(statistics.absolute_mean)
        if self.auto_scale:
            with prefix_errors(", ".join(weights)):
                scales = search_scales(
                    torch.cat(list(weights.values())),
                    hessian,
                    statistics.absolute_mean,
                    self.bits,
                    group_size=self.group_size,
                    scale_dtype=self.scale_dtype,
                )
        packed: dict[str, PackedWeight] = {}
        for name, weight in weights.items():
            # The product of queries and keys amplifies what clipping loses in either: the authors leave both alone.
            clip = self.auto_clip and not name.rpartition(".")[2].startswith(("q_", "k_"))
            with prefix_errors(name):
                packed[name] = _quantize_scaled(
                    weight,
                    hessian,
                    scales,
                    self.bits,
                    group_size=self.group_size,
                    clip=clip,
                    scale_dtype=self.scale_dtype,
                )
        return packed


def quantize_weight(
    weight: Tensor,
    hessian: Tensor,
    absolute_mean: Tensor,
    bits: int,
    *,
    group_size: int | None = None,
    clip: bool = True,
    scale_dtype: str = "float16",
) -> AWQWeight:
    """Quantize one linear with AWQ.

    Args:
        weight: ``[out, in]``.
        hessian: ``[in, in]``, 2/n X^T X; its scale does not matter.
        absolute_mean: ``[in]``, mean of |x| over all tokens.
        bits: 2, 3, 4 or 8.
        group_size: columns that share a scale; None is one scale per output channel. The last group may be shorter.
        clip: search the clipping.
        scale_dtype: dtype of stored scales, zero points and channel scales.

    Raises:
        UserError: a setting is out of range, or weight or hessian is not finite.

    Example:
        >>> from ptq161.methods import rtn
        >>> from ptq161.methods.compensation import weighted_error
        >>> generator = torch.Generator().manual_seed(0)
        >>> weight = torch.randn(8, 32, generator=generator)
        >>> inputs = torch.randn(64, 32, generator=generator)
        >>> inputs[:, 0] *= 20  # one channel matters more than the others
        >>> hessian = 2 * inputs.T @ inputs
        >>> values = quantize_weight(weight, hessian, inputs.abs().mean(0), bits=3).dequantize()
        >>> nearest = rtn.quantize_weight(weight, bits=3).dequantize()
        >>> weighted_error(weight, values, hessian) < 0.5 * weighted_error(weight, nearest, hessian)
        True
    """
    scales = search_scales(weight, hessian, absolute_mean, bits, group_size=group_size, scale_dtype=scale_dtype)
    return _quantize_scaled(weight, hessian, scales, bits, group_size=group_size, clip=clip, scale_dtype=scale_dtype)


def search_scales(
    weight: Tensor,
    hessian: Tensor,
    absolute_mean: Tensor,
    bits: int,
    *,
    group_size: int | None = None,
    scale_dtype: str = "float16",
) -> Tensor:
    """Search the exponent of the mean activation that makes the best channel scales (the paper's Eq. 5).

    Args:
        weight: ``[out, in]``; of linears that share an input, all rows.
        hessian: ``[in, in]``.
        absolute_mean: ``[in]``, mean of |x| over all tokens.
        bits: see :func:`quantize_weight`.
        group_size: see :func:`quantize_weight`.
        scale_dtype: the scales are rounded to this dtype before they are tried.

    Returns:
        ``[in]`` float32, positive. Exponent 0, all scales one, is the first that is tried: no scales are returned
        that are worse than none.

    Raises:
        UserError: weight or hessian is not finite.

    Example:
        >>> weight = torch.tensor([[1.0, -2.0, 0.7, 3.0], [0.9, 1.0, -0.3, -2.0]])
        >>> search_scales(weight, torch.eye(4), torch.full((4,), 0.5), bits=4)  # equal channels need no scales
        tensor([1., 1., 1., 1.])
        >>> sizes = torch.tensor([1.0, 1.0, 8.0, 1.0])
        >>> scales = search_scales(weight, torch.diag(sizes**2), sizes, bits=2)
        >>> int(scales.argmax()), bool(scales[2] > scales[0])
        (2, True)
    """
    check_uniform(bits, group_size)
    check_hessian(hessian, weight.shape[1])
    weight = weight.float()

    def scales_of(exponent: float) -> Tensor:
        # Eq. 5: s = s_X ** alpha, with s_X the mean |x| of each channel.
        scales = absolute_mean.float().pow(exponent).clamp(min=_LEAST_SCALE)
        # As released: the geometric middle of the scales is one.
        return stored_scale(scales / (scales.max() * scales.min()).sqrt(), scale_dtype).float()

    def error_of(scales: Tensor) -> Tensor:
        # Eq. 4: |Q(W diag(s)) (diag(s)^-1 X) - W X|^2, through the hessian instead of X.
        rounded = _rounded(grouped(weight * scales, group_size), bits, scale_dtype).flatten(1)
        difference = rounded[:, : weight.shape[1]] / scales - weight
        return _row_errors(difference, hessian).sum()

    # The minimum over alpha in [0, 1): a grid of 20 steps, as released.
    best, error = _best([scales_of(step / _GRID) for step in range(_GRID)], error_of)
    if not bool(torch.isfinite(error)):
        raise UserError("the output error is NaN or infinite for any channel scale; check the activations.")
    return best


def search_clip(
    weight: Tensor, hessian: Tensor, bits: int, *, group_size: int | None = None, scale_dtype: str = "float16"
) -> Tensor:
    """Search the largest magnitude that each output channel or group keeps, down to half of its own.

    Args:
        weight: ``[out, in]``, already scaled.
        hessian: ``[in, in]`` of the input that belongs to it. A group's error is that of its own columns.
        bits: see :func:`quantize_weight`.
        group_size: see :func:`quantize_weight`.
        scale_dtype: dtype in which the grid's scales will be stored.

    Returns:
        ``[out, groups]`` float32.

    Example:
        >>> weight = torch.tensor([[-1.0, 0.0, 1.0, 2.0] * 8 + [2.5]])
        >>> limit = search_clip(weight, torch.eye(33), bits=2)  # four codes: clipped, all but the last are exact
        >>> limit.shape, round(float(limit), 4)
        (torch.Size([1, 1]), 2.0)
    """
    groups = grouped(weight.float(), group_size)
    blocks = _diagonal_blocks(hessian, groups.shape[2])
    largest = groups.abs().amax(-1, keepdim=True)

    def error_of(limit: Tensor) -> Tensor:
        difference = _rounded(groups.clamp(-limit, limit), bits, scale_dtype) - groups
        errors = [_row_errors(difference[:, i], block) for i, block in enumerate(blocks)]
        return torch.stack(errors, dim=1).unsqueeze(-1)

    # auto_clip_layer: ten limits from the whole range down to just above half of it.
    best, _ = _best([largest * (1 - step / _GRID) for step in range(int(_MAX_SHRINK * _GRID))], error_of)
    return best.squeeze(-1)


def _quantize_scaled(
    weight: Tensor,
    hessian: Tensor,
    scales: Tensor,
    bits: int,
    *,
    group_size: int | None,
    clip: bool,
    scale_dtype: str,
) -> AWQWeight:
    """Scale a weight by ``scales [in]``, clip it and round it; ``hessian`` is that of the unscaled input."""
    # Eq. 2: the weight takes diag(s), its input diag(s)^-1, which turns H into diag(s)^-1 H diag(s)^-1.
    scaled = weight.float() * scales
    if clip:
        scaled_hessian = hessian / scales / scales.unsqueeze(1)
        limit = search_clip(scaled, scaled_hessian, bits, group_size=group_size, scale_dtype=scale_dtype)
        limit = limit.unsqueeze(-1)
        scaled = grouped(scaled, group_size).clamp(-limit, limit).flatten(1)[:, : weight.shape[1]]
    packed = round_to_nearest(scaled, bits, group_size=group_size, scale_dtype=scale_dtype)
    return AWQWeight.from_uniform(packed, scales, scale_dtype)


def _best(candidates: Sequence[Tensor], error_of: Callable[[Tensor], Tensor]) -> tuple[Tensor, Tensor]:
    """Return the candidate of least error, the first of equal ones, and that error.

    An error with several entries decides entry by entry.
    """
    best = candidates[0]
    least = error_of(best)
    for candidate in candidates[1:]:
        error = error_of(candidate)
        better = (error < least) | least.isnan()
        best = torch.where(better, candidate, best)
        least = torch.where(better, error, least)
    return best, least


def _rounded(groups: Tensor, bits: int, scale_dtype: str) -> Tensor:
    """Round each slice along the last axis to nearest on its own grid."""
    scale, zero_point = uniform_parameters(groups, bits, scale_dtype=scale_dtype)
    return uniform_nearest(groups, scale, zero_point, bits)


def _row_errors(difference: Tensor, hessian: Tensor) -> Tensor:
    """Return ``d H d^T`` of each row: ``[out, in]`` and ``[in, in]`` to ``[out]``."""
    return (linear(difference, hessian) * difference).sum(-1)


def _diagonal_blocks(hessian: Tensor, width: int) -> Tensor:
    """Cut the blocks ``[groups, width, width]`` on the diagonal out; a shorter last one is filled up with zeros."""
    blocks = hessian.new_zeros(-(-hessian.shape[0] // width), width, width)
    for i, block in enumerate(blocks):
        piece = hessian[i * width : (i + 1) * width, i * width : (i + 1) * width]
        block[: piece.shape[0], : piece.shape[0]] = piece
    return blocks
