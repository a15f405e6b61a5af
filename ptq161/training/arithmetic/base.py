"""What an arithmetic consists of: a quantizer for each operand of a linear's three products."""

from __future__ import annotations

import dataclasses
from collections.abc import Callable
from typing import ClassVar

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


@dataclasses.dataclass(frozen=True, kw_only=True)
class ArithmeticSettings:
    """What arithmetics read of the settings of a training, which inherit it.

    Attributes:
        arithmetic: in which the trained linears multiply: ``float``, ``gse``, or ``metis`` with a ``format``, for which
            ``nvfp4``, ``mxfp4`` and ``fp8`` stand, too. The settings from here to ``spectral_schedule`` are without
            effect on the others.
        bits: ``gse``: of an element, its sign included.
        group_size: ``gse``: elements that share an exponent.
        stochastic_rounding: round up or down at random, to the value on average: ``gse`` output gradients, ``metis``
            inputs, weights and output gradients.
        format: ``metis``: ``nvfp4``, ``mxfp4`` or ``fp8``, unless the name of the arithmetic is the format.
        spectral_rank: ``metis``: singular values of each matrix that are split off and quantized apart; 0 for none.
        refresh_every: ``metis``: steps between two estimates of the subspace of these.
        spectral_factors: ``metis``: ``format``, their singular vectors are rounded, too, as released, or ``float``.
        spectral_schedule: ``metis``: ``none``; ``ysche``, the released code's change of a gradient's singular values;
            ``amplified``, what it is meant to be (:func:`ptq161.training.arithmetic.spectral.quantize_spectral`).
        accumulation: forward passes per step.
    """

    names: ClassVar[Names]
    """What the training is called."""

    arithmetic: str = "float"
    bits: int = 8
    group_size: int = 32
    stochastic_rounding: bool = False
    format: str = "nvfp4"
    spectral_rank: int = 0
    refresh_every: int = 8
    spectral_factors: str = "format"
    spectral_schedule: str = "none"
    accumulation: int = 1
