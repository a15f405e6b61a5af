from __future__ import annotations

from collections.abc import Callable

import pytest
import torch
from transformers import PreTrainedModel

import ptq161
from ptq161.errors import UserError
from ptq161.packed.fp8 import FP8Weight
from ptq161.packed.weight import packed_weight_from
from ptq161.training.arithmetic.blockfloat import quantize
from tests.methods.layers import packed_linears

WEIGHT = torch.randn(24, 80, generator=torch.Generator().manual_seed(0))


@pytest.mark.parametrize(("group_size", "format"), [(None, "fp8e4m3"), (16, "fp8e4m3b")])
def test_what_is_stored_is_what_the_arithmetic_computes_with(group_size: int | None, format: str) -> None:
    packed = FP8Weight.rounded(WEIGHT, group_size)
    assert torch.equal(packed.dequantize(), quantize(WEIGHT, format, as_released=False))
    again = packed_weight_from(packed.settings(), packed.state_dict())
    assert torch.equal(again.dequantize(), packed.dequantize())
    assert torch.equal(packed.scaled(-2).dequantize(), packed.dequantize() / 4)


@pytest.mark.parametrize(("group_size", "bits"), [(None, 8 + 32 / (24 * 80)), (16, 9.0), (48, 8 + 2 * 16 / 80)])
def test_bits(group_size: int | None, bits: float) -> None:
    assert FP8Weight.rounded(WEIGHT, group_size).bits_per_weight == pytest.approx(bits)


def test_the_error_is_that_of_three_bits_of_mantissa() -> None:
    for group_size in (None, 7, 16):
        values = FP8Weight.rounded(WEIGHT, group_size, "float32").dequantize()
        large = WEIGHT.abs() > WEIGHT.abs().max() / 1000
        assert ((values - WEIGHT).abs() <= WEIGHT.abs() / 16 * 1.001)[large].all()


def test_every_stored_bit_counts() -> None:
    packed = FP8Weight.rounded(WEIGHT[:2, :20], 16)
    before = packed.dequantize()
    for place in range(packed.codes.numel()):
        flipped = packed.codes.clone()
        flipped.view(-1)[place] ^= 1 << (place % 7)
        assert int((packed.with_tensors({"codes": flipped}).dequantize() != before).sum()) == 1


def test_zeros_and_what_is_not_finite() -> None:
    assert not FP8Weight.rounded(torch.zeros(2, 40), 16).dequantize().any()
    assert not FP8Weight.rounded(torch.zeros(2, 40)).dequantize().any()
    for value in (float("nan"), float("inf")):
        with pytest.raises(UserError, match="cannot be stored as float32"):
            FP8Weight.rounded(torch.full((2, 8), value))


def test_a_model(tiny_model: Callable[..., PreTrainedModel]) -> None:
    model = tiny_model("llama")
    original = model.model.layers[0].mlp.up_proj.weight.detach().clone()
    packed = packed_linears(model, ptq161.FP8())["model.layers.0.mlp.up_proj"].packed
    assert torch.equal(packed.dequantize(), FP8Weight.rounded(original).dequantize())
    with pytest.raises(UserError, match=r"method\.group_size=0: use at least 1"):
        ptq161.FP8(group_size=0)
