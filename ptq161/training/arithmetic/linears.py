"""Linears that compute in an arithmetic: with a trained weight, a frozen one, or a frozen one and a low-rank update."""

from __future__ import annotations

import torch
from torch import Tensor, nn

from ptq161.training.arithmetic.base import Arithmetic, ArithmeticSettings, StatefulQuantizer
from ptq161.training.arithmetic.product import FrozenWeight, freeze, linear
from ptq161.training.arithmetic.registry import arithmetic_of


class TrainedLinear(nn.Linear):
    """A linear whose weight is trained: its parameters are those of the linear that it is made of.

    Args:
        source: the linear in float.
        settings: name the arithmetic.
    """

    def __init__(self, source: nn.Linear, settings: ArithmeticSettings) -> None:
        super().__init__(source.in_features, source.out_features, bias=source.bias is not None, device="meta")
        self.weight, self.bias = source.weight, source.bias
        self.arithmetic = arithmetic_of(settings, source.weight)
        self.quantizers = _stateful(self.arithmetic)

    def forward(self, x: Tensor) -> Tensor:
        """Map ``[..., in]`` to ``[..., out]``."""
        return linear(x, self.weight, self.arithmetic, bias=self.bias)


class FrozenLinear(nn.Module):
    """A linear whose weight is not trained and is kept as what its two products take; none of it is stored.

    Args:
        weight: ``[out, in]``.
        bias: ``[out]``; None for no bias.
        settings: name the arithmetic.
        dtype: of the products.
    """

    along_in: Tensor
    along_out: Tensor

    def __init__(self, weight: Tensor, bias: Tensor | None, settings: ArithmeticSettings, dtype: torch.dtype) -> None:
        super().__init__()
        self.arithmetic = arithmetic_of(settings, weight)
        self.quantizers = _stateful(self.arithmetic)
        frozen = freeze(weight, self.arithmetic, dtype)
        self.register_buffer("along_in", frozen.forward, persistent=False)
        self.register_buffer("along_out", frozen.backward, persistent=False)
        self.bias = None if bias is None else nn.Parameter(bias.detach(), requires_grad=False)

    def forward(self, x: Tensor) -> Tensor:
        """Map ``[..., in]`` to ``[..., out]``."""
        return linear(x, FrozenWeight(self.along_in, self.along_out), self.arithmetic, bias=self.bias)


class LoraLinear(nn.Module):
    """A frozen linear and a low-rank update: ``Y = Q(X) Q(W)^T + scale * Q(H) Q(B)^T`` with ``H = Q(X) Q(A)^T``.

    Args:
        base: the frozen linear.
        down: A ``[rank, in]`` float32.
        up: B ``[out, rank]`` float32.
        scale: of the update.
        settings: name the arithmetic.
        dropout: of the update's input.
    """

    def __init__(
        self,
        base: FrozenLinear,
        down: Tensor,
        up: Tensor,
        scale: float,
        settings: ArithmeticSettings,
        dropout: float = 0.0,
    ) -> None:
        super().__init__()
        self.base, self.scale, self.dropout = base, scale, nn.Dropout(dropout)
        self.lora_A, self.lora_B = nn.Parameter(down.detach()), nn.Parameter(up.detach())
        self.arithmetics = arithmetic_of(settings, down), arithmetic_of(settings, up)
        self.quantizers = nn.ModuleList(map(_stateful, self.arithmetics))

    def forward(self, x: Tensor) -> Tensor:
        """Map ``[..., in]`` to ``[..., out]``."""
        inner = linear(self.dropout(x), self.lora_A, self.arithmetics[0])
        base: Tensor = self.base(x)
        return base + linear(inner, self.lora_B, self.arithmetics[1], scale=self.scale)

    def delta(self) -> Tensor:
        """Return the update of the weight, ``scale * B A`` of the factors themselves: ``[out, in]`` float32."""
        delta: Tensor = (self.lora_B.detach() @ self.lora_A.detach()) * self.scale
        return delta


def quantizer_buffers(student: nn.Module) -> dict[str, Tensor]:
    """Return what the quantizers of a student keep between steps, by name."""
    return {
        f"{path}.{name}": buffer
        for path, module in student.named_modules()
        if isinstance(module, StatefulQuantizer)
        for name, buffer in module.named_buffers(recurse=False)
    }


def _stateful(arithmetic: Arithmetic) -> nn.ModuleList:
    """Return the quantizers that are modules, to be registered."""
    operands = (arithmetic.input, arithmetic.weight, arithmetic.gradient)
    return nn.ModuleList(q for q in operands if isinstance(q, StatefulQuantizer))
