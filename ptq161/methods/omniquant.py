"""OmniQuant's learnable weight clipping, block by block (Shao et al. 2023, arXiv 2308.13137, Section 3.2).

Follows OpenGVLab/OmniQuant as its scripts for weight-only quantization of LLaMA run it (``--lwc``, without ``--let``):

1. the clipped grid (Eq. 2): ``UniformAffineQuantizer.per_token_dynamic_calibration`` and ``fake_quant`` in
   ``quantize/quantizer.py``: both ends of a channel's range are scaled by the sigmoid of a learned factor that starts
   at 4; rounding passes gradients straight through, the rounded zero point none;
2. the objective (Eq. 1) and its optimizer: ``omniquant`` in ``quantize/omniquant.py``: mean squared error against the
   full-precision block on the full-precision chain, with ``--aug_loss`` also against it on the quantized chain.

Differences: a range includes zero here, which matters only where all weights of a channel or group have one sign; the
forward pass uses the scale as it will be stored, so that the packed weight is exactly what the last step left.
"""

from __future__ import annotations

import dataclasses
from typing import Any, ClassVar

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from ptq161.errors import UserError
from ptq161.methods.base import Window, check_common, check_rate, prefix_errors
from ptq161.methods.blockwise import check_input_drop, optimize, replaced_linears
from ptq161.numerics import COMPUTE_DTYPES
from ptq161.packed.uniform import UniformWeight, check_uniform, grouped, per_column, uniform_codes, uniform_grid
from ptq161.packed.weight import PackedWeight, check_magnitude

_INITIAL_FACTOR = 4.0


@dataclasses.dataclass(frozen=True)
class OmniQuant:
    """OmniQuant. The defaults are those of the released script for 2 bits per channel (``w2a16.sh``).

    Attributes:
        bits: 2, 3, 4 or 8.
        group_size: columns that share a scale; None is one scale per output channel.
        epochs: passes over the calibration set per window; the released scripts for more than 2 bits take 20.
        lr: learning rate of the clipping factors.
        aug_loss: compare with the full-precision block on the quantized chain's input as well.
        input_drop: probability with which an element of the block's input comes from the full-precision chain, drawn
            anew in each step (QDrop's regularizer); 0 draws nothing.
        batch_size: calibration sequences per step.
        block_size: consecutive decoder blocks optimized together.
        compute_dtype: dtype of matrix products (bfloat16 and float16 by autocast); the clipping factors, the rounding
            and the loss are float32 always.
        scale_dtype: dtype in which scales and zero points are stored.

    Example:
        >>> method = OmniQuant(bits=2, group_size=128, epochs=20)
        >>> method.needs_full_chain, method.nominal_bits()
        (True, 2.0)
    """

    format: ClassVar[str] = "uniform"
    needs_full_chain: ClassVar[bool] = True
    takes_salient_masks: ClassVar[bool] = False

    bits: int = 2
    group_size: int | None = None
    epochs: int = 40
    lr: float = 1e-2
    aug_loss: bool = True
    input_drop: float = 0.0
    batch_size: int = 1
    block_size: int = 1
    compute_dtype: str = "float32"
    scale_dtype: str = "float16"

    def __post_init__(self) -> None:
        """Reject values out of range."""
        check_common(self.batch_size, self.compute_dtype, self.scale_dtype)
        check_uniform(self.bits, self.group_size)
        if self.block_size < 1:
            raise UserError(f"block_size={self.block_size}: use at least 1.")
        if self.epochs < 0:
            raise UserError(f"method.epochs={self.epochs}: use at least 0.")
        check_rate("method.lr", self.lr)
        check_input_drop(self.input_drop)

    def nominal_bits(self) -> float:
        """Bits of a code; scales and zero points are not counted."""
        return float(self.bits)

    def quantize_window(self, window: Window) -> dict[str, PackedWeight]:
        """Learn the clipping of the window's linears.

        Raises:
            UserError: a loss is not finite, or a weight is not.
        """
        # 1. Every linear gets a grid whose ends can move.
        layers = {name: self._clipped(name, linear) for name, linear in window.linears.items()}
        if self.epochs:
            assert window.full_outputs is not None, "the driver brings the full-precision chain (needs_full_chain)"
            # 2. Both targets are fixed, so they are computed once.
            targets = [window.full_outputs]
            if self.aug_loss:
                targets.append(window.run_all(window.quant_inputs, self.batch_size, self.compute_dtype))
            factors = [factor for layer in layers.values() for factor in (layer.upper_factor, layer.lower_factor)]
            optimizer = torch.optim.AdamW(factors, lr=self.lr, weight_decay=0.0)
            with replaced_linears(window, layers):
                optimize(
                    window,
                    optimizer,
                    targets,
                    reconstruction_loss,
                    epochs=self.epochs,
                    batch_size=self.batch_size,
                    compute_dtype=self.compute_dtype,
                    input_drop=self.input_drop,
                )
        return {name: layer.pack() for name, layer in layers.items()}

    def _clipped(self, name: str, linear: nn.Linear) -> ClippedLinear:
        with prefix_errors(name):
            return ClippedLinear(
                linear,
                self.bits,
                group_size=self.group_size,
                scale_dtype=self.scale_dtype,
                compute_dtype=COMPUTE_DTYPES[self.compute_dtype],
            )


def reconstruction_loss(output: Tensor, *targets: Tensor) -> Tensor:
    """Return the sum of the mean squared errors of ``output`` against each target, all of one shape.

    Example:
        >>> output = torch.zeros(2, 3)
        >>> reconstruction_loss(output, torch.ones(2, 3), torch.full((2, 3), 2.0))  # 1 + 4
        tensor(5.)
    """
    return torch.stack([F.mse_loss(output, target) for target in targets]).sum()


class ClippedLinear(nn.Module):
    """A linear whose weight is rounded to a grid with learned ends.

    Args:
        linear: the full-precision linear, whose weight and bias are taken over.
        bits: 2, 3, 4 or 8.
        group_size: columns that share a scale; None is one scale per output channel.
        scale_dtype: dtype in which scales and zero points are stored.
        compute_dtype: dtype in which the rounded weight is multiplied.

    Attributes:
        upper_factor: parameter ``[out, groups, 1]`` float32; its sigmoid scales the largest weight.
        lower_factor: the same for the smallest weight.

    Raises:
        UserError: a weight is not finite.

    Example:
        >>> layer = ClippedLinear(nn.Linear(8, 4), bits=2, group_size=4)
        >>> layer.upper_factor.shape  # for each output channel and group
        torch.Size([4, 2, 1])
        >>> torch.allclose(layer.rounded_weight(), layer.pack().dequantize())
        True
    """

    def __init__(
        self,
        linear: nn.Linear,
        bits: int,
        *,
        group_size: int | None = None,
        scale_dtype: str = "float16",
        compute_dtype: torch.dtype = torch.float32,
    ) -> None:
        super().__init__()
        weight = linear.weight.detach().float()
        if not bool(torch.isfinite(weight).all()):
            raise UserError("a weight is NaN or infinite; check the model's weights.")
        check_magnitude(weight, scale_dtype)
        self.in_features = linear.in_features
        self.bits = bits
        self.group_size = group_size
        self.scale_dtype = scale_dtype
        self.compute_dtype = compute_dtype
        self.bias = linear.bias
        self.groups = grouped(weight, group_size)
        self.low = self.groups.amin(-1, keepdim=True).clamp(max=0)
        self.high = self.groups.amax(-1, keepdim=True).clamp(min=0)
        self.upper_factor = nn.Parameter(torch.full_like(self.high, _INITIAL_FACTOR))
        self.lower_factor = nn.Parameter(torch.full_like(self.low, _INITIAL_FACTOR))

    def forward(self, x: Tensor) -> Tensor:
        """Map ``[..., in]`` to ``[..., out]``."""
        return F.linear(x, self.rounded_weight(), self.bias)

    def rounded_weight(self) -> Tensor:
        """Return the weight on the present grid: ``[out, in]`` in the compute dtype."""
        # Eq. 2: h = (gamma max(W) - beta min(W)) / (2^N - 1), z = -round(beta min(W) / h).
        low, high = self._range()
        scale, zero_point = self._grid()
        exact_scale = (high - low) / (2**self.bits - 1)
        # The value is the stored scale's, the gradient the exact one's.
        scale = exact_scale + (scale - exact_scale).detach()
        rounded: Tensor = _StraightThrough.apply(  # type: ignore[no-untyped-call]  # torch leaves it untyped
            self.groups, scale, zero_point, self.bits, self.compute_dtype
        )
        return rounded.flatten(1)[:, : self.in_features]

    def pack(self) -> UniformWeight:
        """Return the packed weight on the present grid."""
        scale, zero_point = (parameter.squeeze(-1) for parameter in self._grid())
        weight = self.groups.flatten(1)[:, : self.in_features]
        columns = [per_column(parameter, self.in_features, self.group_size) for parameter in (scale, zero_point)]
        codes = uniform_codes(weight, columns[0], columns[1], self.bits)
        return UniformWeight.pack(
            codes, scale, zero_point, self.bits, group_size=self.group_size, scale_dtype=self.scale_dtype
        )

    def _range(self) -> tuple[Tensor, Tensor]:
        # beta min(W) and gamma max(W), both strengths in (0, 1) as sigmoids of what is learned.
        return self.lower_factor.sigmoid() * self.low, self.upper_factor.sigmoid() * self.high

    def _grid(self) -> tuple[Tensor, Tensor]:
        with torch.no_grad():
            return uniform_grid(*self._range(), self.bits, scale_dtype=self.scale_dtype)


class _StraightThrough(torch.autograd.Function):
    """Rounding to a grid, differentiated with respect to its scale as if rounding were the identity.

    With the steps ``v = w / scale`` and the rounded and clamped ``q``, the derivative of ``q * scale`` is ``q - v``
    inside the range and ``q`` beyond its ends.
    """

    @staticmethod
    def forward(ctx: Any, groups: Tensor, scale: Tensor, zero_point: Tensor, bits: int, dtype: torch.dtype) -> Tensor:
        # A scale that underflows to zero stands for zeros.
        steps = groups / torch.where(scale > 0, scale, torch.inf)
        nearest = torch.round(steps)
        clamped = nearest.clamp(-zero_point, 2**bits - 1 - zero_point)
        ctx.save_for_backward(torch.where(nearest == clamped, clamped - steps, clamped).to(dtype))
        return (clamped * scale).to(dtype)

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor | None, ...]:
        (slope,) = ctx.saved_tensors
        return None, (grad * slope).sum(-1, keepdim=True, dtype=torch.float32), None, None, None
