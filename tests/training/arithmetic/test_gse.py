"""Shared-exponent integers against the reference, and their own promises: steps, ranges, exact integer products."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest
import torch
from torch import Tensor

from ptq161.packed.gse import EXPONENT_SPAN, GseWeight, power_of_two
from ptq161.training.arithmetic.gse import accumulate, dequantize, integer_product, quantize, round_to_grid


@pytest.fixture(scope="module")
def vectors(golden_dir: Path) -> dict[str, Tensor]:
    with np.load(golden_dir / "gsq_tuning" / "format_vectors.npz") as stored:
        return {name: torch.from_numpy(stored[name]) for name in stored}


def wide(rows: int, columns: int, seed: int, spread: float = 3.0) -> Tensor:
    """Normal numbers of sizes that differ from row to row and from group to group."""
    generator = torch.Generator().manual_seed(seed)
    sizes = torch.exp2(spread * torch.randn(rows, -(-columns // 32), generator=generator).repeat_interleave(32, 1))
    return torch.randn(rows, columns, generator=generator) * sizes[:, :columns]


@pytest.mark.parametrize("bits", [8, 6, 5])
def test_reference_vectors(vectors: dict[str, Tensor], bits: int) -> None:
    mantissa, exponent, base = quantize(vectors["X"], bits)
    for found, name in ((mantissa, "mantissa"), (exponent, "exponent"), (base, "base")):
        expected = vectors[f"{name}{bits}"]
        assert found.dtype == expected.dtype and torch.equal(found, expected), name
    value = dequantize(mantissa, exponent, base, bits)
    assert torch.equal(value.double(), vectors[f"value{bits}"])
    assert torch.equal(round_to_grid(vectors["X"], 1, bits), value)
    assert torch.equal(round_to_grid(vectors["X"].T, 0, bits), value.T)


def test_reference_product(vectors: dict[str, Tensor]) -> None:
    a, b = quantize(vectors["A"], 8), quantize(vectors["B"], 6)
    assert torch.equal(accumulate(a[0], b[0]), vectors["accumulators"])
    assert torch.equal(integer_product(a, b, (8, 6)), vectors["product"])


@pytest.mark.parametrize(("bits", "group_size"), [((8, 8), 32), ((5, 8), 32), ((6, 5), 7), ((2, 3), 1)])
def test_the_integer_product_is_that_of_the_values(bits: tuple[int, int], group_size: int) -> None:
    x, w = wide(6, 100, 0), wide(9, 100, 1)
    a, b = (quantize(m, n, group_size) for m, n in zip((x, w), bits, strict=True))
    values = [dequantize(*q, n, group_size, torch.float64) for q, n in zip((a, b), bits, strict=True)]
    assert torch.equal(integer_product(a, b, bits, group_size), values[0] @ values[1].T)
    in_float = values[0].float() @ values[1].float().T
    torch.testing.assert_close(in_float.double(), values[0] @ values[1].T, rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
@pytest.mark.parametrize("bits", [2, 5, 8])
def test_steps(bits: int, dtype: torch.dtype) -> None:
    x = wide(20, 70, 2).to(dtype)
    mantissa, exponent, base = quantize(x, bits)
    assert mantissa.abs().max() <= 2 ** (bits - 1) - 1
    assert int(base) == int(exponent.max()) and int(base - exponent.min()) <= EXPONENT_SPAN
    step = torch.exp2(exponent.double() - bits + 2).repeat_interleave(32, 1)[:, :70]
    value = dequantize(mantissa, exponent, base, bits).double()
    assert torch.equal(value / step, mantissa.double())
    is_clamped = mantissa.abs() == 2 ** (bits - 1) - 1
    assert ((value - x.double()).abs() <= torch.where(is_clamped, step, step / 2)).all()
    # Each group's exponent is that of its largest number, so that more than half of the range is in use.
    largest = torch.nn.functional.pad(x.double().abs(), (0, 26)).view(20, 3, 32).amax(2)
    assert torch.equal(largest.log2().floor(), exponent.double())


def test_ties_go_to_even() -> None:
    mantissa, _, _ = quantize(torch.tensor([8.0, 0.5, 1.5, 2.5, -0.5, -1.5]), bits=5)
    assert mantissa.tolist() == [8, 0, 2, 2, 0, -2]


@pytest.mark.parametrize("size", [0.0, 1e-45, 1e-38, 1e-7, 1.0, 3e38])
def test_all_sizes_of_numbers(size: float) -> None:
    """The exponent of a tensor follows it, from nothing at all to the largest float32."""
    x = size * torch.tensor([[1.0, -0.5, 0.25, 0.0]])
    mantissa, exponent, base = quantize(x, 8)
    value = dequantize(mantissa, exponent, base, 8)
    assert torch.equal(round_to_grid(x, 1, 8), value)
    # The least step is the least normal float32.
    torch.testing.assert_close(value, x, rtol=2**-7, atol=2**-127)
    assert -128 <= int(base) <= 127


def test_half_precision_is_taken_as_it_is() -> None:
    x = wide(4, 64, 3).bfloat16()
    assert torch.equal(round_to_grid(x, 1, 6), round_to_grid(x.float(), 1, 6))


def test_what_is_not_finite_stays_so() -> None:
    x = torch.ones(2, 64)
    x[0, 3], x[1, 40] = torch.inf, torch.nan
    found = round_to_grid(x, 1, 8)
    assert torch.equal(found.isnan().view(2, 2, 32).all(2), torch.tensor([[True, False], [False, True]]))


def test_stochastic_rounding_is_right_on_average() -> None:
    x = torch.tensor([1.0, 0.3, -0.71, 0.02]).repeat(4000, 1)
    mantissa, exponent, base = quantize(x, 4, stochastic=True, generator=torch.Generator().manual_seed(0))
    values = dequantize(mantissa, exponent, base, 4)
    assert len(values[:, 1].unique()) == 2 and len(values[:, 0].unique()) == 1
    # A step is 1/4, and the deviation of a mean of 4000 at most 1/8 / sqrt(4000) = 0.002.
    torch.testing.assert_close(values.mean(0), x[0], rtol=0, atol=0.01)
    again = quantize(x, 4, stochastic=True, generator=torch.Generator().manual_seed(0))
    assert torch.equal(again[0], mantissa)


def test_powers_of_two() -> None:
    exponents = torch.arange(-126, 128)
    assert torch.equal(power_of_two(exponents).double(), torch.exp2(exponents.double()))


@pytest.mark.parametrize(("bits", "group_size"), [(8, 32), (6, 32), (5, 32), (3, 7)])
def test_packed_bytes_hold_the_integers(bits: int, group_size: int) -> None:
    x = wide(48, 100, 5)
    x[3, :40] = 0
    numbers = quantize(x, bits, group_size)
    packed = GseWeight.pack(*numbers, bits=bits, group_size=group_size)
    for found, expected in zip(packed.unpacked(), numbers, strict=True):
        assert found.dtype == expected.dtype and torch.equal(found, expected)
    assert torch.equal(packed.dequantize(), dequantize(*numbers, bits, group_size))
    groups = -(-100 // group_size)
    # 48 rows fill whole bytes, whatever the bits; one byte more is the largest exponent.
    assert packed.nbytes == 48 * 100 * bits / 8 + 48 * groups * 5 / 8 + 1
