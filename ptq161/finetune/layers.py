"""What is trained in a linear whose codes are learned, in a norm and in an embedding."""

from __future__ import annotations

import torch
from torch import Tensor, nn

from ptq161.methods.coded import latent_linear, repack
from ptq161.packed.weight import PackedWeight


class CodedLinear(nn.Module):
    """A linear whose codes and factors are trained.

    Args:
        packed: the weight, of a format whose codes can be learned.
        linear: the full-precision linear, on the same device.
        bias: ``[out]``, not trained; None for no bias.
        compute_dtype: of the matrix product.
    """

    def __init__(
        self, packed: PackedWeight, linear: nn.Linear, bias: Tensor | None, compute_dtype: torch.dtype
    ) -> None:
        super().__init__()
        self._packed = packed
        self.learned = latent_linear(packed, linear, compute_dtype)
        self.learned.bias = bias

    def forward(self, x: Tensor) -> Tensor:
        """Map ``[..., in]`` to ``[..., out]`` of the compute dtype."""
        with torch.autocast(x.device.type, enabled=False):  # scales are float32, as they are in what is stored
            y: Tensor = self.learned(x)
        return y

    def repack(self) -> PackedWeight:
        """Pack codes and factors.

        Raises:
            UserError: a factor leaves the range of the dtype in which it is stored.
        """
        return repack(self._packed, self.learned)


class RelativeWeight(nn.Module):
    """The weight of a norm as ``start + gain * size``: a parametrization whose trained tensor is the gain.

    Args:
        norm: the module whose weight it is.
        compute_dtype: of the weight that the norm sees.

    Attributes:
        start: ``[hidden]`` float32.
        size: ``[hidden]`` float32, by how much a gain of one changes it: the factor that the norm multiplies by.
    """

    start: Tensor
    size: Tensor

    def __init__(self, norm: nn.Module, compute_dtype: torch.dtype) -> None:
        super().__init__()
        self.compute_dtype = compute_dtype
        start = norm.get_parameter("weight").detach().float()
        # Gemma's norms multiply by one plus their weight.
        size = (1 + start if type(norm).__name__.startswith("Gemma") else start).abs()
        self.register_buffer("start", start, persistent=False)
        self.register_buffer("size", size, persistent=False)

    def value(self, gain: Tensor) -> Tensor:
        """Return the weight in float32."""
        return self.start + gain * self.size

    def forward(self, gain: Tensor) -> Tensor:
        """Return the weight in the compute dtype, so that activations keep it."""
        return self.value(gain).to(self.compute_dtype)


class CastWeight(nn.Module):
    """The weight of an embedding in the compute dtype: a parametrization whose trained tensor is the weight in float32.

    Args:
        compute_dtype: of the weight that the embedding uses.
    """

    def __init__(self, compute_dtype: torch.dtype) -> None:
        super().__init__()
        self.compute_dtype = compute_dtype

    def forward(self, weight: Tensor) -> Tensor:
        """Return the weight in the compute dtype."""
        return weight.to(self.compute_dtype)
