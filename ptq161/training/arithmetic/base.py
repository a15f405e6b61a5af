"""What an arithmetic consists of: a quantizer for each operand of a linear's three products."""

from __future__ import annotations

import dataclasses
from collections.abc import Callable
from typing import Protocol

from torch import Tensor, nn

from ptq161.training.settings import Names

Quantizer = Callable[[Tensor, int], Tensor]
"""``quantize(matrix, dim)`` returns what the format holds of a matrix: a tensor of its shape, of any float dtype.

``dim`` (0 or 1) is the summed dimension of the product that the matrix enters: groups that share a scale run along it.
"""


def exact(matrix: Tensor, dim: int) -> Tensor:
    """Return the matrix itself: the quantizer of an operand that is not quantized."""
    return matrix


@dataclasses.dataclass(frozen=True)
class Arithmetic:
    """The quantizers of a linear ``Y = X W^T`` with ``G = dL/dY``.

    Attributes:
        input: of X ``[tokens, in]``.
        weight: of W ``[out, in]``.
        gradient: of G ``[tokens, out]``.
        quantizes_once: a matrix is quantized once, along dimension 1, and what came out enters both of its products.
            Otherwise it is quantized for each product anew, along the dimension that this product sums over.
    """

    input: Quantizer = exact
    weight: Quantizer = exact
    gradient: Quantizer = exact
    quantizes_once: bool = False


class StatefulQuantizer(nn.Module):
    """A quantizer that keeps tensors between steps, as buffers: ``forward(matrix, dim)`` is a :data:`Quantizer`.

    The linear that it serves registers it, so that it moves along; a checkpoint keeps its buffers, so that a training
    that was interrupted ends with the same bytes. The buffers are there, in their final shapes, from the start.
    """

    def forward(self, matrix: Tensor, dim: int) -> Tensor:
        """Return what the format holds of ``matrix``."""
        raise NotImplementedError


class ArithmeticSettings(Protocol):
    """Settings of a training, as arithmetics read them; a frozen dataclass."""

    @property
    def names(self) -> Names:
        """What the training is called."""

    @property
    def arithmetic(self) -> str:
        """``float``, or a name in the registry."""

    @property
    def bits(self) -> int:
        """Bits of an element, its sign included."""

    @property
    def group_size(self) -> int:
        """Elements that share an exponent."""

    @property
    def stochastic_rounding(self) -> bool:
        """Round up or down at random, to the value on average: output gradients of ``gse``, all of ``metis``."""

    @property
    def format(self) -> str:
        """``nvfp4``, ``mxfp4`` or ``fp8``: of ``metis``."""

    @property
    def spectral_rank(self) -> int:
        """Singular values that are split off; 0 splits nothing."""

    @property
    def refresh_every(self) -> int:
        """Steps between two estimates of the subspace of these."""

    @property
    def spectral_factors(self) -> str:
        """Whether their singular vectors are rounded, too: ``format`` or ``float``."""

    @property
    def spectral_schedule(self) -> str:
        """What becomes of a gradient's singular values: ``none``, ``ysche`` or ``amplified``."""

    @property
    def accumulation(self) -> int:
        """Passes per step."""
