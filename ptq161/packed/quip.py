"""Integer codes of a weight that was rescaled and rotated at random before rounding: the format of QuIP.

A rotation is never stored: the seed is, and the rotation is drawn from it again whenever the weight is dequantized.
Products of few rows rotate the rows in its place.
Both kinds are products of small factors, so rotating ``[out, in]`` takes far less than a product with a dense
``[in, in]`` matrix.
"""

from __future__ import annotations

import dataclasses
import functools
import math
from abc import ABC, abstractmethod
from typing import ClassVar, Self

import torch
from torch import Tensor

from ptq161.kernels import packed_rows
from ptq161.kernels.packed_rows import CODE_BITS, Operands
from ptq161.packed.bits import pack_codes, unpack_codes
from ptq161.packed.weight import PackedWeight, stored_scale


class Rotation(ABC):
    """An orthogonal matrix ``Q [n, n]`` as a product of fast factors.

    Example:
        >>> _, rotation = draw_rotations("butterfly", seed=0, out_features=4, in_features=6)
        >>> x = torch.eye(6)
        >>> torch.allclose(rotation.invert(rotation.apply(x)), x, atol=1e-5)
        True
    """

    @abstractmethod
    def apply(self, x: Tensor) -> Tensor:
        """Return ``x @ Q.T`` for ``x [..., n]``."""

    @abstractmethod
    def invert(self, x: Tensor) -> Tensor:
        """Return ``x @ Q`` for ``x [..., n]``."""


@dataclasses.dataclass(frozen=True)
class Butterfly(Rotation):
    """Two stages of small random orthogonal matrices between two random permutations.

    As ``gen_rand_ortho_butterfly`` and ``mul_ortho_butterfly`` in ``method.py`` of Cornell-RelaxML/QuIP: with
    ``n = p * q``, each of the q strided slices is turned by a matrix of its own, then each of the p contiguous ones.

    Attributes:
        first: ``[q, p, p]`` float32.
        second: ``[p, q, q]`` float32.
        order_in: ``[n]`` int64, the permutation before the stages.
        order_out: ``[n]`` int64, the permutation after them.

    Example:
        >>> rotation = Butterfly.draw(576, torch.Generator().manual_seed(0))
        >>> rotation.first.shape, rotation.second.shape  # 576 = 24 * 24
        (torch.Size([24, 24, 24]), torch.Size([24, 24, 24]))
        >>> matrix = rotation.apply(torch.eye(576))
        >>> torch.allclose(matrix @ matrix.T, torch.eye(576), atol=1e-5)
        True
    """

    first: Tensor
    second: Tensor
    order_in: Tensor
    order_out: Tensor

    @classmethod
    def draw(cls, n: int, generator: torch.Generator) -> Self:
        """Draw a rotation of ``n`` dimensions from a CPU generator."""
        p, q = _balanced_factors(n)
        return cls(
            first=_random_orthogonal(q, p, generator),
            second=_random_orthogonal(p, q, generator),
            order_in=torch.randperm(n, generator=generator),
            order_out=torch.randperm(n, generator=generator),
        )

    def apply(self, x: Tensor) -> Tensor:
        """Return ``x @ Q.T`` for ``x [..., n]``."""
        first, second = self.first.to(x.device), self.second.to(x.device)
        x = x[..., self.order_in.to(x.device)].unflatten(-1, (second.shape[0], first.shape[0]))
        x = torch.einsum("qab,...bq->...aq", first, x)
        x = torch.einsum("pab,...pb->...pa", second, x)
        return x.flatten(-2)[..., self.order_out.to(x.device)]

    def invert(self, x: Tensor) -> Tensor:
        """Return ``x @ Q`` for ``x [..., n]``."""
        first, second = self.first.to(x.device), self.second.to(x.device)
        x = x[..., self._before_order_out.to(x.device)].unflatten(-1, (second.shape[0], first.shape[0]))
        x = torch.einsum("pab,...pa->...pb", second, x)
        x = torch.einsum("qab,...aq->...bq", first, x)
        return x.flatten(-2)[..., self._before_order_in.to(x.device)]

    @functools.cached_property
    def _before_order_in(self) -> Tensor:
        return self.order_in.argsort()

    @functools.cached_property
    def _before_order_out(self) -> Tensor:
        return self.order_out.argsort()


@dataclasses.dataclass(frozen=True)
class RandomHadamard(Rotation):
    """Random signs, then a Hadamard matrix; a random orthogonal one stands for the odd factor of ``n``.

    The transform of QuIP# (Tseng et al. 2024, Section 3.1) for ``n = 2**k * m``: ``Q = (O_m x H) diag(signs)``, where
    QuIP# takes a known Hadamard matrix of order ``m`` times a power of two and knows none for an odd ``n``.

    Attributes:
        signs: ``[n]`` float32, each 1 or -1.
        odd: ``[m, m]`` float32, orthogonal.

    Example:
        >>> rotation = RandomHadamard.draw(4, torch.Generator().manual_seed(0))
        >>> rotation.apply(torch.tensor([8.0, 0.0, 0.0, 0.0])).abs()  # an outlier is spread evenly
        tensor([4., 4., 4., 4.])
    """

    signs: Tensor
    odd: Tensor

    @classmethod
    def draw(cls, n: int, generator: torch.Generator) -> Self:
        """Draw a rotation of ``n`` dimensions from a CPU generator."""
        signs = torch.randint(0, 2, (n,), generator=generator).float() * 2 - 1
        return cls(signs=signs, odd=_random_orthogonal(1, n // _power_of_two(n), generator)[0])

    def apply(self, x: Tensor) -> Tensor:
        """Return ``x @ Q.T`` for ``x [..., n]``."""
        return self._mix(x * self.signs.to(x.device), self.odd.to(x.device))

    def invert(self, x: Tensor) -> Tensor:
        """Return ``x @ Q`` for ``x [..., n]``."""
        return self._mix(x, self.odd.T.to(x.device)) * self.signs.to(x.device)

    def _mix(self, x: Tensor, odd: Tensor) -> Tensor:
        m, power = odd.shape[0], x.shape[-1] // odd.shape[0]
        # H of order 2**k is the Kronecker product of two of about its root: two small dense products are faster
        # than k passes of additions over the whole of x.
        left = 2 ** (int(math.log2(power)) // 2)
        right = power // left
        shape = x.shape
        x = x.reshape(-1, right) @ _hadamard(right).to(x.device)
        x = _hadamard(left).to(x.device) @ x.view(-1, left, right)
        return (odd @ x.view(-1, m, power)).view(shape) / math.sqrt(power)


ROTATIONS: dict[str, type[Butterfly] | type[RandomHadamard]] = {"butterfly": Butterfly, "hadamard": RandomHadamard}


def draw_rotations(kind: str, seed: int, out_features: int, in_features: int) -> tuple[Rotation, Rotation]:
    """Draw the rotations of a weight's output and input side; the same seed gives the same ones.

    Args:
        kind: a key of ``ROTATIONS``.
        seed: any non-negative int64.
        out_features: dimensions of the first rotation.
        in_features: dimensions of the second one.

    Example:
        >>> out_side, in_side = draw_rotations("hadamard", seed=1, out_features=2, in_features=4)
        >>> _, again = draw_rotations("hadamard", seed=1, out_features=2, in_features=4)
        >>> torch.equal(in_side.apply(torch.eye(4)), again.apply(torch.eye(4)))
        True
    """
    generator = torch.Generator().manual_seed(seed)
    rotation = ROTATIONS[kind]
    return rotation.draw(out_features, generator), rotation.draw(in_features, generator)


@dataclasses.dataclass(frozen=True, eq=False)
class QuIPWeight(PackedWeight):
    """Codes on one symmetric grid of ``2**bits`` evenly spaced values from ``-scale`` to ``scale``.

    Attributes:
        bits: bits per code.
        rotation: a key of ``ROTATIONS``.
        codes: ``[out, ceil(in * bits / 8)]`` uint8.
        scale: ``[1]`` in ``scale_dtype``, half the width of the grid.
        seed: ``[1]`` int64, from which both rotations are drawn.
        input_scales: ``[in]`` in ``scale_dtype``; column ``j`` was multiplied by ``input_scales[j]`` before the
            rotation. None where it was not rescaled.

    Example:
        >>> codes = torch.tensor([[0, 3], [3, 0]])
        >>> packed = QuIPWeight.pack(codes, torch.tensor(2.0), bits=2, rotation="hadamard", seed=7)
        >>> packed.nbytes  # 2 bytes of codes, a scale in float16, a seed of 8 bytes; no rotation
        12
        >>> round(float(packed.dequantize().norm()), 3)  # that of four weights of 2 or -2: rotations keep it
        4.0
    """

    format: ClassVar[str] = "quip"

    bits: int
    rotation: str
    codes: Tensor
    scale: Tensor
    seed: Tensor
    input_scales: Tensor | None = None

    @classmethod
    def pack(
        cls,
        codes: Tensor,
        scale: Tensor,
        bits: int,
        *,
        rotation: str,
        seed: int,
        input_scales: Tensor | None = None,
        scale_dtype: str = "float16",
    ) -> Self:
        """Store codes and everything that leads back from them to the weight.

        Args:
            codes: ``[out, in]``, any integer dtype, each in ``[0, 2**bits)``.
            scale: a scalar, half the width of the grid.
            bits: 2, 3, 4 or 8.
            rotation: a key of ``ROTATIONS``.
            seed: a non-negative int64.
            input_scales: ``[in]``, positive; None for no rescaling.
            scale_dtype: ``float16`` or ``float32``.

        Raises:
            UserError: a scale leaves the range of ``scale_dtype``.
        """
        return cls(
            out_features=codes.shape[0],
            in_features=codes.shape[1],
            bits=bits,
            rotation=rotation,
            codes=pack_codes(codes, bits),
            scale=stored_scale(scale.reshape(1), scale_dtype),
            seed=torch.tensor([seed], device=codes.device),
            input_scales=None if input_scales is None else stored_scale(input_scales, scale_dtype),
        )

    def values(self) -> Tensor:
        """Return ``U^T grid(codes) V / input_scales``: ``[out, in]`` float32."""
        # QuIP's Algorithm 2: from codes to the grid, then U^T and V, then D^-1.
        codes = unpack_codes(self.codes, self.in_features, self.bits)
        weight = _symmetric_values(codes, self.scale.float(), self.bits)
        out_side, in_side = draw_rotations(self.rotation, int(self.seed), self.out_features, self.in_features)
        weight = out_side.invert(in_side.invert(weight).T).T.contiguous()
        return weight if self.input_scales is None else weight / self.input_scales.float()

    def rows_product(
        self, x: Tensor, bias: Tensor | None, *, int8: bool = False, level: int = packed_rows.HIGHEST
    ) -> Tensor | None:
        """Return ``x @ W.T + bias``, as :meth:`PackedWeight.rows_product`: the rows are rotated in place of the weight.

        The rotations are drawn once and kept: those of kind ``butterfly`` take about as much memory as the codes of a
        weight of 4096 x 4096 at 2 bits, ``hadamard`` next to none.
        """
        if int8 or x.device.type != "cpu" or self.bits not in CODE_BITS or not packed_rows.usable(x.dtype, x):
            return None
        out_side, in_side = self._rotations
        rows = x.float() if self.input_scales is None else x.float() / self.input_scales.float()
        y = packed_rows.product(self._rotated(), in_side.apply(rows), None, level=level)
        y = out_side.invert(y)
        return (y if bias is None else y + bias.float()).to(x.dtype)

    def _rotated(self) -> Operands:
        """Return the weight between its rotations as uniform codes, whose zero lies in the middle of the grid."""
        largest = 2**self.bits - 1
        scales = (self.scale.float() * (2 / largest)).repeat(self.out_features, 1)
        tensors = (self.codes, scales, torch.full_like(scales, largest / 2), None)
        return Operands("uniform", tensors, (self.in_features, self.bits, self.in_features), 2.0**self.exponent)

    @functools.cached_property
    def _rotations(self) -> tuple[Rotation, Rotation]:
        return draw_rotations(self.rotation, int(self.seed), self.out_features, self.in_features)


def _symmetric_values(codes: Tensor, scale: Tensor, bits: int) -> Tensor:
    """Return the grid's value of each code: ``scale * (2 * code / (2**bits - 1) - 1)`` in float32."""
    largest: int = 2**bits - 1
    return scale * (codes.float() * (2 / largest) - 1)


def _balanced_factors(n: int) -> tuple[int, int]:
    """Split n into two factors by dealing out its prime factors, smallest first, in turn."""
    primes: list[int] = []
    divisor = 2
    while n > 1:
        while n % divisor == 0:
            primes.append(divisor)
            n //= divisor
        # A number without a divisor up to its root is prime.
        divisor = divisor + 1 if divisor * divisor <= n else n
    return math.prod(primes[0::2]), math.prod(primes[1::2])


def _power_of_two(n: int) -> int:
    """Return the largest power of two that divides n."""
    return n & -n


def _random_orthogonal(count: int, n: int, generator: torch.Generator) -> Tensor:
    """Draw ``[count, n, n]`` orthogonal matrices from the Haar measure, in float32.

    The factorization is done in float64, so that what rounding order changes there is gone after the cast.
    """
    gaussian = torch.randn(count, n, n, generator=generator, dtype=torch.float64)
    q, r = torch.linalg.qr(gaussian)
    # Without fixing the signs the distribution would depend on the sign convention of the factorization.
    orthogonal: Tensor = q * r.diagonal(dim1=-2, dim2=-1).sign().unsqueeze(-2)
    return orthogonal.float()


@functools.cache
def _hadamard(n: int) -> Tensor:
    """Return Sylvester's Hadamard matrix ``[n, n]`` of ones and minus ones for n a power of two."""
    matrix = torch.ones(1, 1)
    step = torch.tensor([[1.0, 1.0], [1.0, -1.0]])
    while matrix.shape[0] < n:
        matrix = torch.kron(step, matrix)
    return matrix
