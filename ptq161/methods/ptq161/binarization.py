"""PTQ1.61 on one weight matrix: the initial scales, the quantized weight and the block loss.

Zhao et al., "PTQ1.61: Push the Real Limit of Extremely Low-Bit Post-Training Quantization Methods for Large
Language Models", ACL 2025 (arXiv 2502.13179). Equation numbers are those of the paper; where the released code
differs from it, the code is followed and the difference is named.
"""

from __future__ import annotations

import torch
from torch import Tensor

from ptq161.checks import check_choice
from ptq161.kernels.token_sums import token_sums
from ptq161.packed.structured_binary import StructuredBinaryWeight
from ptq161.packed.uniform import uniform_codes, uniform_parameters
from ptq161.packed.weight import check_magnitude

SALIENT_RANGES = ("row", "salient")
_EPSILON = 1e-8
"""Least length of an output in a cosine."""


def initial_scales(weight: Tensor, mask: Tensor) -> tuple[Tensor, Tensor]:
    """Row mean and row scale of the binary part (Eq. 2 and 3).

    Weights that are exactly zero count in neither, as in the released code; a row without any gives zero.

    Args:
        weight: ``[out, in]``.
        mask: ``[in]`` bool, True for salient channels.

    Returns:
        mean ``[out, 1]`` and scale ``[out, 1]`` (mean of |w|), float32.

    Example:
        >>> weight, mask = torch.tensor([[1.0, -3.0, 9.0, 2.0]]), torch.tensor([False, False, True, False])
        >>> initial_scales(weight, mask)
        (tensor([[0.]]), tensor([[2.]]))
    """
    # Eq. 2 and 3, over the binary channels alone: salient ones become zeros, which count in neither.
    binary = weight.float() * ~mask
    count = (binary != 0).sum(dim=1, keepdim=True).clamp(min=1)
    return binary.sum(dim=1, keepdim=True) / count, binary.abs().sum(dim=1, keepdim=True) / count


def quantize_salient(
    weight: Tensor, mask: Tensor, bits: int = 4, salient_range: str = "row", scale_dtype: str = "float32"
) -> tuple[Tensor, Tensor, Tensor]:
    """Asymmetric round-to-nearest of the salient channels, per output row.

    Args:
        weight: ``[out, in]``.
        mask: ``[in]`` bool, True for salient channels.
        bits: bits of a code.
        salient_range: ``row`` takes minimum and maximum (zero included) over the whole row, as the released code
            does; ``salient`` over the salient channels alone.
        scale_dtype: the codes are chosen against the scale as it is stored.

    Returns:
        codes ``[out, s]`` uint8, scale ``[out, 1]`` and zero point ``[out, 1]``, float32 (``[out, 0]`` if ``s = 0``).

    Raises:
        UserError: ``salient_range`` is unknown.

    Example:
        >>> weight, mask = torch.tensor([[-5.0, 10.0, 0.4]]), torch.tensor([False, True, True])
        >>> quantize_salient(weight, mask)  # the row's range: 15 steps of 1 from -5
        (tensor([[15,  5]], dtype=torch.uint8), tensor([[1.]]), tensor([[5.]]))
    """
    check_choice("method.salient_range", salient_range, SALIENT_RANGES)
    salient = weight[:, mask].float()
    if not salient.numel():  # a mask without salient channels stores no grid either
        return salient.to(torch.uint8), salient, salient
    ranged = weight if salient_range == "row" else salient
    scale, zero_point = uniform_parameters(ranged, bits, scale_dtype=scale_dtype)
    return uniform_codes(salient, scale, zero_point, bits), scale, zero_point


def nearest_codes(
    weight: Tensor,
    mask: Tensor,
    mean: Tensor,
    salient_bits: int = 4,
    salient_range: str = "row",
    scale_dtype: str = "float32",
) -> Tensor:
    """Return the codes of the released code: the sign of ``W - mean`` (Eq. 2), and the nearest salient codes.

    Args:
        weight: ``[out, in]``.
        mask: ``[in]`` bool, True for salient channels.
        mean: ``[out, 1]``.
        salient_bits: bits of a salient code.
        salient_range: see :func:`quantize_salient`.
        scale_dtype: the salient codes are chosen against the scale as it is stored.

    Returns:
        ``[out, in]`` uint8, 1 for +1 and 0 for -1 where not salient.

    Example:
        >>> weight, mask = torch.tensor([[1.0, -3.0, 9.0, 2.0]]), torch.tensor([False, False, True, False])
        >>> nearest_codes(weight, mask, torch.zeros(1, 1)).tolist()
        [[1, 0, 15, 1]]
    """
    codes = (weight.float() >= mean).to(torch.uint8)
    codes[:, mask] = quantize_salient(weight, mask, salient_bits, salient_range, scale_dtype)[0]
    return codes


def pack_weight(
    weight: Tensor,
    mask: Tensor,
    mean: Tensor,
    scale: Tensor,
    row_angle: Tensor,
    column_angle: Tensor,
    salient_bits: int = 4,
    salient_range: str = "row",
    scale_dtype: str = "float16",
    codes: Tensor | None = None,
) -> StructuredBinaryWeight:
    """Quantize and pack a weight with given scales and angular factors (Eq. 2 and 5).

    Args:
        weight: ``[out, in]``, the full-precision weight.
        mask: ``[in]`` bool, True for salient channels.
        mean: ``[out, 1]``.
        scale: ``[out, 1]``.
        row_angle: ``[out, 1]``, angular factor r1.
        column_angle: ``[1, in]``, angular factor r2; only its binary channels are used.
        salient_bits: bits of a salient code.
        salient_range: see :func:`quantize_salient`.
        scale_dtype: dtype in which scales, means, angles and zero points are stored.
        codes: ``[out, in]`` in place of the nearest ones: 0 or 1 for a sign, and those of the salient channels.

    Raises:
        UserError: a scale does not fit ``scale_dtype``.

    Example:
        >>> weight, mask = torch.ones(512, 1280), torch.arange(1280) < 256  # 20 % salient channels
        >>> mean, scale = initial_scales(weight, mask)
        >>> packed = pack_weight(weight, mask, mean, scale, torch.ones(512, 1), torch.ones(1, 1280))
        >>> round(packed.bits_per_weight, 3)  # 0.8 + 0.2 * 4, and the mask, scales, means, angles and zero points
        1.677
    """
    # Section 3.2: what the mask names keeps salient_bits.
    check_magnitude(weight, scale_dtype)
    _, salient_scale, zero_point = quantize_salient(weight, mask, salient_bits, salient_range, scale_dtype)
    if codes is None:
        codes = nearest_codes(weight, mask, mean, salient_bits, salient_range, scale_dtype)
    return StructuredBinaryWeight.pack(
        mask=mask,
        sign=codes[:, ~mask] > 0,
        # Eq. 5 multiplies it by r1 and r2; r1 is the row's own, like scale and mean, and is stored in them.
        scale=scale * row_angle,
        mean=mean * row_angle,
        column_angle=column_angle.flatten()[~mask],
        codes=codes[:, mask].to(torch.uint8),
        salient_scale=salient_scale,
        salient_zero_point=zero_point,
        salient_bits=salient_bits,
        scale_dtype=scale_dtype,
    )


def dequantized_weight(
    weight: Tensor,
    mask: Tensor,
    mean: Tensor,
    scale: Tensor,
    row_angle: Tensor,
    column_angle: Tensor,
    salient_bits: int = 4,
    salient_range: str = "row",
) -> Tensor:
    """Return the weight that the packed form stands for, with scales in float32: ``[out, in]``.

    Arguments are those of :func:`pack_weight`. Binary channels are ``(r1 x r2) * (scale * sign(W - mean) + mean)``;
    the sign of zero is +1 (the paper's Eq. 2; ``torch.sign`` in the released code gives 0).

    Example:
        >>> weight, mask = torch.tensor([[1.0, -3.0, 2.0]]), torch.zeros(3, dtype=torch.bool)
        >>> mean, scale = initial_scales(weight, mask)  # 0 and 2
        >>> column_angle = torch.tensor([[1.0, 1.0, 0.5]])
        >>> dequantized_weight(weight, mask, mean, scale, torch.ones(1, 1), column_angle).tolist()
        [[2.0, -2.0, 1.0]]
    """
    return pack_weight(
        weight, mask, mean, scale, row_angle, column_angle, salient_bits, salient_range, "float32"
    ).dequantize()


def block_loss(y_quant: Tensor, y_full: Tensor, y_homologous: Tensor, cosine: bool = True) -> Tensor:
    """Two-branch objective of the block-wise optimization (Section 3.3).

    ``MSE(Yq, Yf) + MSE(Yq, Yh) - log|mean cos(Yq, Yf)| - log|mean cos(Yq, Yh)|``

    Args:
        y_quant: ``[batch, seq, hidden]``, the quantized block on the quantized chain's input.
        y_full: the full-precision block on the full-precision chain's input, same shape.
        y_homologous: the full-precision block on the quantized chain's input, same shape.
        cosine: include the two cosine terms.

    Returns:
        a float32 scalar.

    Example:
        >>> output, target = torch.tensor([[[1.0, 0.0]]]), torch.tensor([[[3.0, 0.0]]])
        >>> round(float(block_loss(output, target, target)), 4)  # twice an error of 2; the direction is right
        4.0
    """
    sums = token_sums(y_quant, (y_full, y_homologous))
    loss = sums.errors.sum() / y_quant.numel()
    if cosine:  # zero where every token's output has the right direction, whatever its length
        length, target_lengths = (x.clamp(min=_EPSILON**2).sqrt() for x in (sums.size, sums.target_sizes))
        loss = loss - (sums.products / (length * target_lengths)).mean(1).abs().log().sum()
    return loss
