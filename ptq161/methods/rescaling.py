"""Powers of two taken out of a linear's weights and inputs, so that methods see numbers of usual size.

A model whose weights are rescaled without a change of its function (``up_proj`` by c, ``down_proj`` by 1/c) has weights
that float16 scales cannot hold, that a fixed learning rate cannot follow, and inputs that a fixed bound cuts off. A
factor that is a power of two changes no digit: the driver takes it out before a method works, and puts it into the
packed weight afterwards (``PackedWeight.exponent``).
"""

from __future__ import annotations

import dataclasses
import math

import torch
from torch import Tensor, nn

_USUAL = (2.0**-7, 2.0**7)
"""Largest absolute value of a linear's weights that are left as they are: all scales that follow from it are normal
float16 numbers."""


def exponent_of(values: Tensor) -> int:
    """Return the power of two to take out of a tensor: 0 where its largest absolute value is of usual size.

    Example:
        >>> exponent_of(torch.tensor([[0.5, -1.0]])), exponent_of(torch.tensor([[3e-5, -1e-6]]))
        (0, -15)
    """
    largest = float(values.detach().abs().max()) if values.numel() else 0.0
    usual = largest == 0 or _USUAL[0] <= largest <= _USUAL[1] or not math.isfinite(largest)
    return 0 if usual else math.frexp(largest)[1]


@dataclasses.dataclass(frozen=True)
class Rescaling:
    """What is taken out of one linear.

    Attributes:
        weight: the weights that a method sees are ``2**-weight`` times the linear's.
        inputs: the same of its inputs.

    Example:
        >>> linear, x = nn.Linear(1, 1), torch.ones(1, 1)
        >>> expected = linear(x)
        >>> rescaling = Rescaling(weight=3, inputs=-2)
        >>> rescaling.take_out_of(linear)
        >>> torch.equal(rescaling.around(linear)(x), expected)
        True
    """

    weight: int
    inputs: int

    def take_out_of(self, linear: nn.Linear) -> None:
        """Rescale weight and bias of a linear, in place."""
        with torch.no_grad():
            linear.weight.mul_(2.0**-self.weight)
            if linear.bias is not None:
                linear.bias.mul_(2.0 ** -(self.weight + self.inputs))

    def around(self, module: nn.Module) -> nn.Module:
        """Put the factors around a module that stands for the rescaled linear."""
        return _Rescaled(module, self)


class _Rescaled(nn.Module):
    def __init__(self, inner: nn.Module, rescaling: Rescaling) -> None:
        super().__init__()
        self.inner = inner
        self.before = 2.0**-rescaling.inputs
        self.after = 2.0 ** (rescaling.weight + rescaling.inputs)

    def forward(self, x: Tensor) -> Tensor:
        output: Tensor = self.inner(x * self.before) * self.after
        return output
