from __future__ import annotations

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from ptq161.errors import UserError
from ptq161.packed.uniform import (
    UNIFORM_BITS,
    UniformWeight,
    per_column,
    uniform_codes,
    uniform_nearest,
    uniform_parameters,
    uniform_values,
)
from ptq161.packed.weight import packed_weight_from


@settings(deadline=None, max_examples=60)
@given(
    bits=st.sampled_from(UNIFORM_BITS),
    shape=st.tuples(st.integers(1, 5), st.integers(1, 40)),
    group_size=st.none() | st.integers(1, 50),
    symmetric=st.booleans(),
    scale_dtype=st.sampled_from(["float16", "float32"]),
    shuffled=st.booleans(),
    seed=st.integers(0, 2**32),
)
def test_round_trip(
    bits: int,
    shape: tuple[int, int],
    group_size: int | None,
    symmetric: bool,
    scale_dtype: str,
    shuffled: bool,
    seed: int,
) -> None:
    generator = torch.Generator().manual_seed(seed)
    out_features, in_features = shape
    n_groups = 1 if group_size is None else -(-in_features // group_size)
    codes = torch.randint(0, 2**bits, shape, generator=generator)
    scales = torch.rand(out_features, n_groups, generator=generator).half().float()
    zeros = torch.randint(0, 2**bits, (out_features, n_groups), generator=generator).float()
    if symmetric:
        zeros.fill_(2 ** (bits - 1))
    group_index = torch.arange(in_features) // (group_size or in_features)
    if shuffled:
        group_index = group_index[torch.randperm(in_features, generator=generator)]
    packed = UniformWeight.pack(
        codes,
        scales,
        zeros,
        bits,
        group_size=group_size,
        symmetric=symmetric,
        scale_dtype=scale_dtype,
        group_index=group_index if shuffled else None,
    )
    expected = scales[:, group_index] * (codes - zeros[:, group_index])
    assert torch.equal(packed.unpacked_codes().long(), codes)
    assert torch.equal(packed.dequantize(), expected)
    again = packed_weight_from(packed.settings(), packed.state_dict())
    assert torch.equal(again.dequantize(), expected) and again.nbytes == packed.nbytes


@settings(deadline=None, max_examples=60)
@given(
    bits=st.sampled_from(UNIFORM_BITS),
    symmetric=st.booleans(),
    scale_dtype=st.sampled_from(["float16", "float32"]),
    magnitude=st.sampled_from([1e-7, 1e-3, 1.0, 1e3]),
    seed=st.integers(0, 2**32),
)
def test_a_value_on_the_grid_comes_back_as_its_code(
    bits: int, symmetric: bool, scale_dtype: str, magnitude: float, seed: int
) -> None:
    weight = torch.randn(3, 9, generator=torch.Generator().manual_seed(seed)) * magnitude
    scale, zero = uniform_parameters(weight, bits, symmetric, scale_dtype=scale_dtype)
    codes = uniform_codes(weight, scale, zero, bits)
    values = uniform_values(codes, scale, zero)
    assert torch.equal(uniform_values(uniform_codes(values, scale, zero, bits), scale, zero), values)
    assert torch.equal(uniform_nearest(weight, scale, zero, bits), values)


def test_a_scale_of_zero_has_the_value_zero() -> None:
    weight, zero = torch.tensor([[-1.0, -0.0, 0.0, 2.0]]), torch.zeros(1, 1)
    assert torch.equal(uniform_nearest(weight, zero, zero, 2), torch.zeros(1, 4))


def test_zero_is_a_point_of_every_grid() -> None:
    for weight in (torch.tensor([[0.5, 1.0]]), torch.tensor([[-3.0, -1.0]]), torch.tensor([[-1.0, 2.0]])):
        scale, zero = uniform_parameters(weight, 4)
        assert float(uniform_values(uniform_codes(torch.zeros(1, 1), scale, zero, 4), scale, zero)) == 0.0


def test_the_range_of_a_row_of_zeros_is_minus_one_to_one() -> None:
    scale, zero = uniform_parameters(torch.zeros(1, 4), 2, scale_dtype="float32")
    assert float(scale) == pytest.approx(2 / 3)
    assert float(zero) == 2.0


def test_flipping_any_stored_bit_of_a_code_changes_the_weight() -> None:
    scale, zero = uniform_parameters(torch.randn(2, 8), 3)
    packed = UniformWeight.pack(torch.randint(0, 8, (2, 8)), scale, zero, 3)
    before = packed.dequantize()
    for byte in range(packed.codes.shape[1]):
        for bit in range(8):
            codes = packed.codes.clone()
            codes[1, byte] ^= 1 << bit
            assert not torch.equal(packed.with_tensors({"codes": codes}).dequantize(), before)


def test_bytes_and_bits() -> None:
    codes = torch.zeros(16, 64, dtype=torch.long)
    packed = UniformWeight.pack(codes, torch.ones(16, 2), torch.zeros(16, 2), 3, group_size=32)
    assert packed.nbytes == 16 * (24 + 2 * 2 + 2 * 2)
    assert packed.bits_per_weight == 4.0


def test_per_column_repeats_for_a_shorter_last_group() -> None:
    assert per_column(torch.tensor([[1.0, 2.0]]), 5, 3).tolist() == [[1, 1, 1, 2, 2]]


def test_a_scale_that_half_precision_cannot_hold() -> None:
    with pytest.raises(UserError, match="scale_dtype=float32"):
        uniform_parameters(torch.tensor([[1e6, -1e6]]), 2)
    assert torch.isfinite(uniform_parameters(torch.tensor([[1e6, -1e6]]), 2, scale_dtype="float32")[0]).all()


@pytest.mark.parametrize("bits", [0, 1, 5, 16])
def test_unsupported_bits(bits: int) -> None:
    with pytest.raises(UserError, match=f"method.bits={bits}: use one of 2, 3, 4, 8"):
        uniform_parameters(torch.ones(1, 4), bits)
