"""QuIP: rotate weight and hessian at random, then round with linear feedback (Chee et al. 2023, arXiv 2307.13304).

Follows Cornell-RelaxML/QuIP with ``--quant ldlq --incoh_processing``. The paper's Algorithm 3 is Algorithm 1, rounding,
Algorithm 2; its steps, numbered as in the code below:

1. incoherence pre-processing (Algorithm 1; ``QuantMethod.preproc`` in ``method.py``): a. rescaling of input channels,
   b. rotation of weight and hessian, c. one symmetric grid of 2.4 standard deviations per linear
   (``quantize_weight_vecbal`` with ``qfn='b'`` in ``vector_balance.py``);
2. LDLQ, from the last column to the first (``round_ldl`` there). It is the error compensation of GPTQ over reversed
   columns (Theorem 6), so that is what runs;
3. incoherence post-processing (Algorithm 2), which undoes c, b and a: :meth:`QuIPWeight.dequantize
   <ptq161.packed.quip.QuIPWeight.dequantize>`.

Greedy passes after LDLQ (``--npasses``) are off in the released code by default and not part of this module. It also
sets ``proj_extra=1`` (rotations without blocks), but reads ``pre_proj_extra``, which stays 0: blocked butterflies.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping
from typing import ClassVar

import torch
from torch import Tensor

from ptq161.checks import check_choice
from ptq161.methods.base import Window, prefix_errors
from ptq161.methods.compensation import check_damping, check_hessian, compensate_columns, inverse_factor
from ptq161.methods.layerwise import InputStatistics, LayerwiseMethod
from ptq161.packed.quip import ROTATIONS, QuIPWeight, Rotation, draw_rotations
from ptq161.packed.uniform import check_uniform
from ptq161.packed.weight import PackedWeight, check_magnitude, stored_scale

_GRID_DEVIATIONS = 2.4
_RIDGE = 1e-2
_LEAST = 1e-8


@dataclasses.dataclass(frozen=True)
class QuIP(LayerwiseMethod):
    """QuIP. The defaults are those of the released code at 2 bits.

    Attributes:
        bits: 2, 3, 4 or 8.
        rotation: ``butterfly`` (QuIP) or ``hadamard`` (as in QuIP#).
        rescale: rescale the input channels before the rotation.
        damping: added to the rotated hessian's diagonal, as a share of its mean.

    Example:
        >>> QuIP(bits=2, rotation="hadamard").nominal_bits()
        2.0
    """

    format: ClassVar[str] = "quip"

    bits: int = 2
    rotation: str = "butterfly"
    rescale: bool = True
    damping: float = 0.01

    def __post_init__(self) -> None:
        """Reject values out of range."""
        super().__post_init__()
        check_uniform(self.bits, None)
        check_choice("method.rotation", self.rotation, tuple(ROTATIONS))
        check_damping(self.damping)

    def nominal_bits(self) -> float:
        """Bits of a code; the grid, the seed and the channel scales are not counted."""
        return float(self.bits)

    def quantize_group(
        self, weights: Mapping[str, Tensor], statistics: InputStatistics | None, window: Window
    ) -> dict[str, PackedWeight]:
        """Quantize each linear with rotations of its own."""
        assert statistics is not None, "a method with needs_statistics gets them from the driver"
        packed: dict[str, PackedWeight] = {}
        for name, weight in weights.items():
            seed = int(torch.randint(2**62, (1,), generator=window.generator(f"quip/{name}")))
            with prefix_errors(name):
                packed[name] = quantize_weight(
                    weight,
                    statistics.hessian,
                    self.bits,
                    seed=seed,
                    rotation=self.rotation,
                    rescale=self.rescale,
                    damping=self.damping,
                    scale_dtype=self.scale_dtype,
                )
        return packed


def quantize_weight(
    weight: Tensor,
    hessian: Tensor,
    bits: int,
    *,
    seed: int = 0,
    rotation: str = "butterfly",
    rescale: bool = True,
    damping: float = 0.01,
    scale_dtype: str = "float16",
) -> QuIPWeight:
    """Quantize a weight with incoherence processing and LDLQ (the paper's Algorithm 3).

    Args:
        weight: ``[out, in]``.
        hessian: ``[in, in]``, 2/n X^T X before damping; its scale does not matter.
        bits: 2, 3, 4 or 8.
        seed: non-negative int64 from which the rotations are drawn.
        rotation: ``butterfly`` or ``hadamard``.
        rescale: rescale the input channels before the rotation.
        damping: added to the rotated hessian's diagonal, as a share of its mean; raised where the factorization fails.
        scale_dtype: dtype of the stored scale and channel scales.

    Raises:
        UserError: a setting is out of range, or weight or hessian is not finite.

    Example:
        >>> generator = torch.Generator().manual_seed(0)
        >>> weight = torch.randn(8, 32, generator=generator)
        >>> weight[0, 0] = 20.0  # an outlier, which rotations spread
        >>> packed = quantize_weight(weight, torch.eye(32), bits=4, rotation="hadamard", rescale=False)
        >>> float((packed.dequantize() - weight).norm() / weight.norm()) < 0.2
        True
        >>> packed.input_scales is None, packed.bits_per_weight  # 4, and 10 bytes of scale and seed
        (True, 4.3125)
    """
    check_uniform(bits, None)
    check_choice("method.rotation", rotation, tuple(ROTATIONS))
    check_hessian(hessian, weight.shape[1])
    check_magnitude(weight, scale_dtype)
    weight, hessian = weight.float(), hessian.float()
    # 1a. W D and D^-1 H D^-1 leave the product with the input as it is. D is stored, so it is rounded before its use.
    input_scales = None
    if rescale:
        input_scales = stored_scale(channel_scales(weight, hessian), scale_dtype).float()
        weight = weight * input_scales
        hessian = hessian / input_scales / input_scales.unsqueeze(1)
    # 1b. U W V^T, with U and V from the seed alone.
    out_side, in_side = draw_rotations(rotation, seed, *weight.shape)
    rotated = rotate_weight(weight, out_side, in_side)
    # 1c. One symmetric grid for the whole linear, whose rotated entries look alike; rho of Algorithm 1 is 2.4.
    scale = stored_scale(_GRID_DEVIATIONS * rotated.square().mean().sqrt(), scale_dtype).float()
    # 2. Rounding, against V H V^T.
    codes = ldlq(_grid_position(rotated, scale, bits), rotate_hessian(hessian, in_side), bits, damping)
    return QuIPWeight.pack(
        codes, scale, bits, rotation=rotation, seed=seed, input_scales=input_scales, scale_dtype=scale_dtype
    )


def channel_scales(weight: Tensor, hessian: Tensor) -> Tensor:
    """Return the rescaling of input channels that minimizes the error bound (the paper's Section 4).

    Args:
        weight: ``[out, in]``.
        hessian: ``[in, in]``.

    Returns:
        ``[in]``: the fourth root of each channel's hessian diagonal (relative to the largest entry of the hessian)
        over the squared norm of its weights.

    Example:
        >>> scales = channel_scales(torch.ones(2, 2), torch.diag(torch.tensor([1.0, 16.0])))
        >>> round(float(scales[1] / scales[0]), 4)  # the fourth root of 16
        2.0
    """
    # D = (diag(H) / diag(W^T W))^(1/4) makes the column norms of W D proportional to the roots of diag(D^-1 H D^-1).
    diagonal = (hessian.diagonal() / hessian.abs().max().clamp(min=torch.finfo(torch.float32).tiny)).clamp(min=_LEAST)
    norm = weight.square().sum(0).clamp(min=_LEAST)
    return (diagonal / norm).pow(0.25).clamp(min=_LEAST)


def rotate_weight(weight: Tensor, out_side: Rotation, in_side: Rotation) -> Tensor:
    """Return ``U W V^T`` for ``W [out, in]``.

    Example:
        >>> weight = torch.zeros(4, 8)
        >>> weight[0, 0] = 1.0
        >>> rotated = rotate_weight(weight, *draw_rotations("hadamard", seed=0, out_features=4, in_features=8))
        >>> round(float(rotated.norm()), 4), round(float(rotated.abs().max()), 4)  # as long, spread over 32 entries
        (1.0, 0.1768)
    """
    return out_side.apply(in_side.apply(weight).T).T.contiguous()


def rotate_hessian(hessian: Tensor, in_side: Rotation) -> Tensor:
    """Return ``V H V^T`` of the hessian ``H [in, in]`` at a mean diagonal of one, with a ridge of 0.01.

    Example:
        >>> _, in_side = draw_rotations("hadamard", seed=0, out_features=4, in_features=4)
        >>> hessian = torch.diag(torch.tensor([4.0, 0.0, 0.0, 0.0]))
        >>> [round(value, 2) for value in rotate_hessian(hessian, in_side).diagonal().tolist()]
        [1.01, 1.01, 1.01, 1.01]
    """
    # At a trace of n, the ridge is the same share of every linear's hessian.
    n = hessian.shape[0]
    hessian = hessian * (n / (hessian.trace() + _LEAST))
    hessian.diagonal().add_(_RIDGE)
    return in_side.apply(in_side.apply(hessian).T.contiguous())


def ldlq(position: Tensor, hessian: Tensor, bits: int, damping: float = 0.01) -> Tensor:
    """Round with linear feedback from the columns already rounded, last column first.

    Args:
        position: ``[out, in]``, the weight in units of the grid, in ``[0, 2**bits - 1]``.
        hessian: ``[in, in]``.
        bits: bits of a code.
        damping: see :func:`quantize_weight`.

    Returns:
        codes ``[out, in]`` uint8.

    Raises:
        UserError: the hessian is not positive definite.

    Example:
        >>> position = torch.tensor([[0.4, 0.4]])
        >>> ldlq(position, torch.eye(2), bits=2).tolist()
        [[0, 0]]
        >>> hessian = torch.tensor([[1.0, 0.9], [0.9, 1.0]])
        >>> ldlq(position, hessian, bits=2).tolist()  # the last column's loss is fed back to the first
        [[1, 0]]
    """
    largest: int = 2**bits - 1
    # Each column is rounded with linear feedback from those already rounded (Eq. 2), by H's unit triangular factor. The
    # factor of the reversed H's inverse gives the same feedback in GPTQ's compensation (Theorem 6).
    factor = inverse_factor(hessian.flip(0, 1), damping)

    def nearest(column: Tensor, _: int, __: Tensor) -> Tensor:
        return torch.floor(column + 0.5).clamp(0, largest)

    return compensate_columns(position.flip(1), factor, nearest).flip(1).to(torch.uint8)


def _grid_position(weight: Tensor, scale: Tensor, bits: int) -> Tensor:
    """Map ``[-scale, scale]`` to ``[0, 2**bits - 1]``, and what lies outside to the ends.

    The released code clamps before it rounds, so that the feedback never makes good what lies outside.
    """
    largest: int = 2**bits - 1
    # A scale that underflows to zero stands for zeros whatever the code.
    relative = torch.where(scale > 0, weight / scale, 0.0)
    return ((relative + 1) / 2 * largest).clamp(0, largest)
