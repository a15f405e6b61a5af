from __future__ import annotations

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from ptq161.errors import UserError
from ptq161.methods.rtn import quantize_weight as round_to_nearest
from ptq161.packed.awq import AWQWeight
from ptq161.packed.uniform import UNIFORM_BITS
from ptq161.packed.weight import packed_weight_from


@settings(deadline=None, max_examples=40)
@given(
    bits=st.sampled_from(UNIFORM_BITS),
    shape=st.tuples(st.integers(1, 5), st.integers(1, 40)),
    group_size=st.none() | st.integers(1, 50),
    scale_dtype=st.sampled_from(["float16", "float32"]),
    seed=st.integers(0, 2**32),
)
def test_round_trip(bits: int, shape: tuple[int, int], group_size: int | None, scale_dtype: str, seed: int) -> None:
    generator = torch.Generator().manual_seed(seed)
    scales = torch.rand(shape[1], generator=generator).add(0.1).half().float()
    scaled = round_to_nearest(
        torch.randn(shape, generator=generator), bits, group_size=group_size, scale_dtype=scale_dtype
    )
    packed = AWQWeight.from_uniform(scaled, scales, scale_dtype)
    expected = scaled.dequantize() / scales
    assert torch.equal(packed.dequantize(), expected)
    again = packed_weight_from(packed.settings(), packed.state_dict())
    assert isinstance(again, AWQWeight)
    assert torch.equal(again.dequantize(), expected) and again.nbytes == packed.nbytes


def test_the_channel_scales_are_counted() -> None:
    scaled = round_to_nearest(torch.randn(64, 96), 2)
    packed = AWQWeight.from_uniform(scaled, torch.ones(96))
    assert packed.nbytes == scaled.nbytes + 2 * 96
    assert packed.bits_per_weight == 2 + 2 * 16 / 96 + 16 / 64


@pytest.mark.parametrize("entry", ["codes", "scales", "zero_points", "input_scales"])
def test_a_flipped_bit_changes_the_output(entry: str) -> None:
    packed = AWQWeight.from_uniform(round_to_nearest(torch.randn(8, 16), 2), torch.ones(16))
    before = packed.dequantize()
    packed.state_dict()[entry].view(torch.uint8).flatten()[1] ^= 1
    assert not torch.equal(packed.dequantize(), before)


def test_a_channel_scale_that_cannot_be_stored() -> None:
    with pytest.raises(UserError, match="float16"):
        AWQWeight.from_uniform(round_to_nearest(torch.randn(2, 4), 2), torch.full((4,), 1e6))
