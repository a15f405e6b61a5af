from __future__ import annotations

from collections.abc import Callable

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from transformers import PreTrainedModel

import ptq161
from ptq161.errors import UserError
from ptq161.kernels.minifloat import e2m1_values
from ptq161.packed.fp4 import FP4_BLOCKS, FP4Weight
from ptq161.packed.weight import packed_weight_from
from ptq161.training.arithmetic.blockfloat import quantize
from tests.methods.layers import packed_linears

WEIGHT = torch.randn(24, 80, generator=torch.Generator().manual_seed(0))
FORMATS = {"nvfp4": "nvfp4e2m1b", "mxfp4": "mxfp4e2m1b"}
"""Format of a weight -> its name in the arithmetic of trainings."""


@pytest.mark.parametrize("format", FORMATS)
def test_what_is_stored_is_what_the_arithmetic_computes_with(format: str) -> None:
    expected = quantize(WEIGHT, FORMATS[format], as_released=False)
    assert torch.equal(FP4Weight.rounded(WEIGHT, format).dequantize(), expected)
    assert torch.equal(
        FP4Weight.rounded(WEIGHT, format, 8).dequantize(), quantize(WEIGHT, FORMATS[format], block=8, as_released=False)
    )


@pytest.mark.parametrize(("format", "bits"), [("nvfp4", 4 + 8 / 16 + 32 / (96 * 64)), ("mxfp4", 4 + 8 / 32)])
def test_bits(format: str, bits: float) -> None:
    assert FP4Weight.rounded(torch.randn(96, 64), format).bits_per_weight == pytest.approx(bits)


@settings(deadline=None, max_examples=40)
@given(
    shape=st.tuples(st.integers(1, 5), st.integers(1, 70)),
    format=st.sampled_from(sorted(FORMATS)),
    block=st.sampled_from([None, 4, 16]),
    exponent=st.integers(-60, 60),
    seed=st.integers(0, 2**32),
)
def test_round_trip(shape: tuple[int, int], format: str, block: int | None, exponent: int, seed: int) -> None:
    weight = torch.randn(shape, generator=torch.Generator().manual_seed(seed)) * 2.0**exponent
    packed = FP4Weight.rounded(weight, format, block)
    values = packed.dequantize()
    again = packed_weight_from(packed.settings(), packed.state_dict())
    assert torch.equal(again.dequantize(), values) and values.shape == shape
    # What the format holds is its own rounding, but for the scale of the whole weight, which is found anew.
    torch.testing.assert_close(FP4Weight.rounded(values, format, block).dequantize(), values, rtol=1e-6, atol=0)
    assert torch.equal(packed.scaled(3).dequantize(), 8 * values)
    largest = weight.abs().amax()
    assert float((values - weight).abs().max()) <= (0.5 if format == "mxfp4" else 0.2) * float(largest)


@pytest.mark.parametrize("format", FORMATS)
def test_each_code_is_the_nearest_under_its_stored_scale(format: str) -> None:
    packed = FP4Weight.rounded(WEIGHT, format)
    top = e2m1_values(torch.full(packed.codes.shape, 7, dtype=torch.uint8))
    assert (top == 6).all()
    sixes = packed.with_tensors({"codes": torch.full_like(packed.codes, 0x77)}).dequantize() / 6
    grid = sixes.unsqueeze(-1) * e2m1_values(torch.arange(16, dtype=torch.uint8))
    nearest = (WEIGHT.unsqueeze(-1) - grid).abs().amin(-1)
    torch.testing.assert_close((packed.dequantize() - WEIGHT).abs(), nearest, rtol=1e-5, atol=1e-6)


@pytest.mark.parametrize("format", FORMATS)
def test_every_stored_bit_counts(format: str) -> None:
    packed = FP4Weight.rounded(WEIGHT[:2, :40], format)
    before = packed.dequantize()
    for name, stored in packed.state_dict().items():
        if stored.dtype != torch.uint8:
            continue
        for place in range(stored.numel()):
            flipped = stored.clone()
            flipped.view(-1)[place] ^= 1 << (place % 7)
            changed = packed.with_tensors({name: flipped}).dequantize() != before
            width = 1 if name == "codes" else packed.block
            assert 0 < int(changed.sum()) <= width, (name, place)


@pytest.mark.parametrize("format", FORMATS)
def test_zeros_and_what_is_not_finite(format: str) -> None:
    assert not FP4Weight.rounded(torch.zeros(2, 40), format).dequantize().any()
    rows = torch.cat([torch.zeros(1, 40), torch.full((1, 40), 1e-30), WEIGHT[:1, :40]])
    values = FP4Weight.rounded(rows, format).dequantize()
    assert not values[0].any() and values[2].any()
    for value in (float("nan"), float("inf")):
        with pytest.raises(UserError, match=f"a weight is NaN or infinite and cannot be stored as {format}"):
            FP4Weight.rounded(torch.full((2, 8), value), format)


@pytest.mark.parametrize("arguments", [{"block_format": "fp4"}, {"group_size": 0}])
def test_settings_out_of_range(arguments: dict[str, object]) -> None:
    with pytest.raises(
        UserError, match=r"method\.(block_format=fp4: use one of nvfp4, mxfp4|group_size=0: use at least 1)"
    ):
        ptq161.FP4(**arguments)  # type: ignore[arg-type]


@pytest.mark.parametrize("format", FORMATS)
def test_a_model(format: str, tiny_model: Callable[..., PreTrainedModel]) -> None:
    model = tiny_model("llama")
    original = model.model.layers[0].mlp.up_proj.weight.detach().clone()
    linears = packed_linears(model, ptq161.FP4(block_format=format))
    assert len(linears) == 14
    packed = linears["model.layers.0.mlp.up_proj"].packed
    assert torch.equal(packed.dequantize(), quantize(original, FORMATS[format], as_released=False))
    assert isinstance(packed, FP4Weight) and packed.block == FP4_BLOCKS[format]
