from __future__ import annotations

from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from ptq161.errors import UserError
from ptq161.packed.pb_llm import PBLLMWeight
from ptq161.packed.weight import packed_weight_from


def random_parts(seed: int, shape: tuple[int, int], share: float, high_bit: int) -> dict[str, Any]:
    generator = torch.Generator().manual_seed(seed)

    def rows() -> Tensor:
        return torch.rand(shape[0], 1, generator=generator).half().float()

    return {
        "salient": torch.rand(shape, generator=generator) < share,
        "signs": torch.rand(shape, generator=generator) < 0.5,
        "codes": torch.randint(0, 2**high_bit, shape, generator=generator),
        "means": rows(),
        "scales": rows(),
        "high_scales": rows(),
        "high_zero_points": torch.randint(0, 2**high_bit, (shape[0], 1), generator=generator).float(),
    }


@settings(deadline=None, max_examples=60)
@given(
    shape=st.tuples(st.integers(1, 5), st.integers(1, 40)),
    share=st.sampled_from([0.0, 0.1, 0.5, 1.0]),
    high_bit=st.sampled_from([2, 3, 4, 8]),
    scale_dtype=st.sampled_from(["float16", "float32"]),
    seed=st.integers(0, 2**32),
)
def test_round_trip(shape: tuple[int, int], share: float, high_bit: int, scale_dtype: str, seed: int) -> None:
    parts = random_parts(seed, shape, share, high_bit)
    packed = PBLLMWeight.pack(**parts, high_bit=high_bit, scale_dtype=scale_dtype)
    sign = torch.where(parts["signs"], 1.0, -1.0)
    expected = torch.where(
        parts["salient"],
        parts["high_scales"] * (parts["codes"] - parts["high_zero_points"]),
        parts["means"] + sign * parts["scales"],
    )
    assert torch.equal(packed.dequantize(), expected)
    again = packed_weight_from(packed.settings(), packed.state_dict())
    assert torch.equal(again.dequantize(), expected)


def test_every_stored_bit_counts() -> None:
    parts = random_parts(0, (8, 16), 0.25, 8)
    packed = PBLLMWeight.pack(**parts, high_bit=8)
    before, n_signs = packed.dequantize(), 8 * 16 - packed.n_salient
    for name, n_bits in (("signs", n_signs), ("codes", 8 * packed.n_salient)):
        plane = packed.state_dict()[name]
        for i in range(n_bits):
            flipped = plane.clone()
            flipped[i // 8] ^= 1 << (i % 8)
            assert int((packed.with_tensors({name: flipped}).dequantize() != before).sum()) == 1


def test_bytes() -> None:
    parts = random_parts(0, (8, 16), 0.0, 8)
    parts["salient"][0, :3] = True
    packed = PBLLMWeight.pack(**parts, high_bit=8)
    assert packed.n_salient == 3
    assert packed.nbytes == 8 * 2 + 16 + 3 + 4 * 8 * 2


def test_unsupported_bits() -> None:
    with pytest.raises(UserError, match=r"method\.high_bit=6: use one of 2, 3, 4, 8"):
        PBLLMWeight.pack(**random_parts(0, (2, 4), 0.5, 6), high_bit=6)
