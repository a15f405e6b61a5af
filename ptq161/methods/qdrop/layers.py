"""What is trained in a window: linears with soft rounding, and the quantizer of the input that some of them share."""

from __future__ import annotations

import math
from collections.abc import Callable

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from ptq161.methods.qdrop.ranges import search_range
from ptq161.methods.qdrop.rounding import hard_codes, initial_alpha, lower_steps, soft_values
from ptq161.packed.activations import quantized_activations
from ptq161.packed.uniform import UniformWeight, grouped, per_column
from ptq161.packed.weight import stored_scale

_LEAST_SCALE = 1e-8

DrawKept = Callable[[torch.Size], Tensor]
"""``draw(shape)`` is a mask of the elements that are quantized."""


def lsq_quantize(x: Tensor, scale: Tensor, zero_point: Tensor, bits: int) -> Tensor:
    """Quantize activations with a learned scale, whose gradient is divided by ``sqrt(numel * (2**bits - 1))``.

    Arguments and result are those of :func:`ptq161.packed.activations.quantized_activations` (LSQ, Section 2.2).

    Example:
        >>> x, scale = torch.tensor([-9.0, 0.4, 0.6]), torch.ones(1, requires_grad=True)
        >>> lsq_quantize(x, scale, torch.tensor([1]), bits=2).sum().backward()
        >>> round(float(scale.grad), 4)  # (-1 - 0.4 + 0.4) / sqrt(3 * 3)
        -0.3333
    """
    part = scale * (1 / math.sqrt(x.numel() * (2**bits - 1)))
    return quantized_activations(x, (scale - part).detach() + part, zero_point, bits)


class ActivationQuantizer(nn.Module):
    """Rounds activations to a grid with a learned scale, all of them or a random part (``LSQFakeQuantize``).

    Args:
        scale: ``[1]``, positive.
        zero_point: ``[1]``, stays as it is.
        bits: of a code.
        draw_kept: which elements keep their quantized value; the others pass as they are. None quantizes all.

    Attributes:
        scale: parameter ``[1]`` float32.

    Example:
        >>> quantizer = ActivationQuantizer(torch.ones(1), torch.zeros(1), 4, lambda shape: torch.tensor([True, False]))
        >>> quantizer(torch.tensor([0.6, 0.6]))
        tensor([1.0000, 0.6000], grad_fn=<WhereBackward0>)
    """

    def __init__(self, scale: Tensor, zero_point: Tensor, bits: int, draw_kept: DrawKept | None = None) -> None:
        super().__init__()
        self.scale = nn.Parameter(scale.detach().float().clone())
        self.zero_point = zero_point
        self.bits = bits
        self._draw_kept = draw_kept
        self._kept: Tensor | None = None

    @torch.no_grad()
    def begin_step(self) -> None:
        """Make the scale positive, and forget the mask: linears that share an input share one mask in a step."""
        self.scale.abs_().clamp_(min=_LEAST_SCALE)
        self._kept = None

    def forward(self, x: Tensor) -> Tensor:
        """Quantize a tensor of any shape."""
        quantized = lsq_quantize(x, self.scale, self.zero_point, self.bits)
        if self._draw_kept is None:
            return quantized
        if self._kept is None:
            self._kept = self._draw_kept(x.shape).to(x.device)
        return torch.where(self._kept, quantized, x)


class RoundedLinear(nn.Module):
    """A linear whose weights learn to round up or down on a fixed grid.

    Args:
        linear: the full-precision linear, whose weight and bias are taken over.
        scale: ``[out, groups]`` float32, as it will be stored.
        zero_point: ``[out, groups]``, whole numbers.
        bits: 2, 3, 4 or 8.
        group_size: columns that share a scale; None is one scale per output channel.
        compute_dtype: dtype in which the weight is multiplied.
        inputs: quantizes the input; None leaves it as it is.

    Attributes:
        alpha: parameter ``[out, in]`` float32; a weight is rounded up where it is at least zero.

    Example:
        >>> linear = nn.Linear(2, 1, bias=False)
        >>> _ = nn.init.constant_(linear.weight, 0.3)
        >>> layer = RoundedLinear(linear, torch.ones(1, 1), torch.ones(1, 1), bits=2)
        >>> round(layer(torch.ones(2)).item(), 4), layer.pack().dequantize().tolist()
        (0.6, [[0.0, 0.0]])
    """

    def __init__(
        self,
        linear: nn.Linear,
        scale: Tensor,
        zero_point: Tensor,
        bits: int,
        *,
        group_size: int | None = None,
        compute_dtype: torch.dtype = torch.float32,
        inputs: ActivationQuantizer | None = None,
    ) -> None:
        super().__init__()
        weight = linear.weight.detach().float()
        self.bits = bits
        self.group_size = group_size
        self.compute_dtype = compute_dtype
        self.bias = linear.bias
        self.inputs = inputs
        self._grid = scale, zero_point
        self._scale, self._zero_point = (
            per_column(part.float(), weight.shape[1], group_size) for part in (scale, zero_point)
        )
        self._lower = lower_steps(weight, self._scale)
        self.alpha = nn.Parameter(initial_alpha(weight, self._scale, self._zero_point, bits))

    def forward(self, x: Tensor) -> Tensor:
        """Map ``[..., in]`` to ``[..., out]``."""
        weight = soft_values(
            self.alpha, self._lower, self._scale, self._zero_point, self.bits, dtype=self.compute_dtype
        )
        return F.linear(x if self.inputs is None else self.inputs(x), weight, self.bias)

    @torch.no_grad()
    def pack(self, scale_dtype: str = "float16") -> UniformWeight:
        """Round up or down for good, and store the codes with their grid."""
        codes = hard_codes(self.alpha, self._lower, self._zero_point, self.bits).to(torch.uint8)
        packed = UniformWeight.pack(codes, *self._grid, self.bits, group_size=self.group_size, scale_dtype=scale_dtype)
        if self.inputs is None:
            return packed
        self.inputs.begin_step()
        return packed.with_activations(self.inputs.bits, self.inputs.scale, self.inputs.zero_point)


def searched_grid(weight: Tensor, bits: int, group_size: int | None, scale_dtype: str) -> tuple[Tensor, Tensor]:
    """Search the grid of each output channel, or group of its columns, and round its scale to what is stored.

    Args:
        weight: ``[out, in]``.
        bits: of a code.
        group_size: columns that share a scale; None is one scale per output channel.
        scale_dtype: of stored scales.

    Returns:
        scale and zero point, both ``[out, groups]`` float32.

    Raises:
        UserError: a weight is not finite, or a scale leaves the range of ``scale_dtype``.

    Example:
        >>> searched_grid(torch.tensor([[-1.0, 0.0, 1.0, 2.0]]), 2, None, "float16")
        (tensor([[1.]]), tensor([[1.]]))
    """
    groups = grouped(weight.detach().float(), group_size)
    scale, zero_point = search_range(groups.flatten(0, 1), bits)
    shape = groups.shape[:2]
    return stored_scale(scale, scale_dtype).float().view(shape), zero_point.float().view(shape)
