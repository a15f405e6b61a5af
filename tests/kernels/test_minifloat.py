from __future__ import annotations

from collections.abc import Callable

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch import Tensor

from ptq161.kernels.minifloat import (
    E2M1,
    E4M3,
    e2m1_codes,
    e2m1_values,
    e4m3_codes,
    e4m3_values,
    mxfp4_exponents,
    nvfp4_scales,
    power_of_two,
    round_minifloat,
)

MANY = torch.cat([torch.logspace(-6, 3, 5001), -torch.logspace(-6, 3, 5001), torch.arange(-500, 501) / 64])


def test_e4m3_is_that_of_torch() -> None:
    expected = MANY.clamp(-448, 448).to(torch.float8_e4m3fn).float()
    assert torch.equal(round_minifloat(MANY, E4M3), expected)
    assert torch.equal(round_minifloat(MANY, E4M3, torch.full_like(MANY, 0.5)), expected)


def test_e2m1_is_the_nearest_of_its_sixteen_values() -> None:
    grid = e2m1_values(torch.arange(16, dtype=torch.uint8))
    x = MANY.clamp(-6, 6)
    torch.testing.assert_close((round_minifloat(x, E2M1) - x).abs(), (x[:, None] - grid).abs().amin(1), atol=0, rtol=0)


def test_ties_go_to_the_even_code() -> None:
    ties = torch.tensor([0.25, 0.75, 1.25, 1.75, 2.5, 3.5, 5.0])
    expected = torch.tensor([0.0, 1.0, 1.0, 2.0, 2.0, 4.0, 4.0])
    for uniform in (None, torch.full_like(ties, 0.5)):
        assert torch.equal(round_minifloat(ties, E2M1, uniform), expected)
        assert torch.equal(round_minifloat(-ties, E2M1, uniform), -expected)


@given(value=st.floats(-6, 6, width=32))
def test_random_rounding_takes_a_neighbour_and_keeps_the_mean(value: float) -> None:
    uniform = (torch.arange(4096) + 0.5) / 4096
    x = torch.full_like(uniform, value)
    rounded = round_minifloat(x, E2M1, uniform)
    assert torch.isin(rounded, e2m1_values(torch.arange(16, dtype=torch.uint8))).all()
    assert rounded.unique().numel() <= 2 and float((rounded - value).abs().max()) < 2
    assert float(rounded.mean()) == pytest.approx(value, abs=2 / 4096)


@pytest.mark.parametrize(
    ("codes_of", "values_of", "n"), [(e2m1_codes, e2m1_values, 16), (e4m3_codes, e4m3_values, 256)]
)
def test_codes_and_values_are_one_to_one(
    codes_of: Callable[[Tensor], Tensor], values_of: Callable[[Tensor], Tensor], n: int
) -> None:
    codes = torch.arange(n, dtype=torch.uint8)
    values = values_of(codes)
    known = values.isfinite() & (values != 0)  # E4M3 has two NaN, and both have two zeros
    assert torch.equal(codes_of(values)[known], codes[known])
    assert not codes_of(torch.zeros(2)).any()


def test_what_is_not_finite() -> None:
    assert round_minifloat(torch.tensor(float("nan")), E2M1).isnan()
    assert round_minifloat(torch.tensor(float("nan")), E2M1, torch.tensor(0.3)).isnan()
    assert round_minifloat(torch.tensor(float("-inf")), E4M3) == -448


def test_nvfp4_reaches_its_largest_number_and_holds_its_scales() -> None:
    x = torch.randn(5, 48, generator=torch.Generator().manual_seed(0))
    scales, scale = nvfp4_scales(x)
    assert scales.shape == (5, 3) and scales.max() == 448
    assert torch.equal(scales.to(torch.float8_e4m3fn).float(), scales)
    torch.testing.assert_close(scale * 448 * 6, x.abs().max())
    scales, scale = nvfp4_scales(torch.zeros(1, 16))
    assert not scales.any() and not scale


def test_mxfp4_has_exponents_below_the_largest_numbers() -> None:
    x = torch.tensor([[4.0, 1.0], [7.99, 0.0], [8.0, 3.0], [0.0, 0.0], [1e-40, 0.0]])
    exponents = mxfp4_exponents(x, block=2)
    assert exponents.flatten().tolist() == [0, 0, 1, -126, -126]
    largest = x[:3].amax(1) / power_of_two(exponents[:3, 0])
    assert (largest >= 4).all() and (largest < 8).all()
