from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from transformers import PreTrainedModel

from ptq161.errors import UserError
from ptq161.methods.compensation import weighted_error
from ptq161.methods.rtn import RTN, quantize_weight
from tests.methods.layers import assert_golden, golden, layer, packed_linears


def test_golden_vector(golden_dir: Path) -> None:
    weight, _, expected = golden(golden_dir, "rtn_w4")
    assert_golden(quantize_weight(weight, 4, scale_dtype="float32").dequantize(), expected)


def test_each_value_is_the_nearest_of_its_row_grid() -> None:
    weight, _ = layer(0)
    packed = quantize_weight(weight, 3)
    assert packed.zero_points is not None
    grid = packed.scales.float()[:, :, None] * (torch.arange(8) - packed.zero_points.float()[:, :, None])
    nearest = (weight[:, :, None] - grid).abs().amin(-1)
    torch.testing.assert_close((weight - packed.dequantize()).abs(), nearest)


def test_the_mean_error_falls_with_bits_and_with_smaller_groups() -> None:
    layers = [layer(seed) for seed in range(20)]

    def error(bits: int, group_size: int | None = None) -> float:
        packed = [quantize_weight(weight, bits, group_size=group_size) for weight, _ in layers]
        return sum(weighted_error(w, p.dequantize(), h) for (w, h), p in zip(layers, packed, strict=True))

    assert error(2) > error(3) > error(4) > error(8)
    assert error(2) > error(2, group_size=32)


def test_a_symmetric_row_without_negative_weights_gets_half_the_range() -> None:
    """The quirk of the released quantizer: such a range is not mirrored."""
    weight = torch.linspace(0, 1.5, 16).reshape(1, -1)
    packed = quantize_weight(weight, 4, symmetric=True, scale_dtype="float32")
    assert packed.zero_points is None
    torch.testing.assert_close(packed.dequantize().max(), torch.tensor(0.7))


def test_a_row_of_zeros_stays_zero() -> None:
    assert not quantize_weight(torch.zeros(2, 16), 2).dequantize().any()


def test_weights_below_the_smallest_half_are_refused_and_a_row_of_them_becomes_zero() -> None:
    tiny = torch.full((1, 8), 1e-9)
    with pytest.raises(UserError, match=r"the largest weight is 1e-09, too small for scales in float16; use"):
        quantize_weight(tiny, 4)
    assert torch.allclose(quantize_weight(tiny, 4, scale_dtype="float32").dequantize(), tiny)
    packed = quantize_weight(torch.cat([tiny, torch.ones(1, 8)]), 4).dequantize()
    assert not packed[0].any() and packed[1].all()


@pytest.mark.parametrize("symmetric", [False, True])
def test_a_group_that_does_not_divide_is_shorter(symmetric: bool) -> None:
    weight, _ = layer(0, in_features=100)
    packed = quantize_weight(weight, 4, group_size=32, symmetric=symmetric)
    assert packed.scales.shape == (24, 4)
    tail = quantize_weight(weight[:, 96:], 4, symmetric=symmetric)
    assert torch.equal(packed.dequantize()[:, 96:], tail.dequantize())


@pytest.mark.parametrize("settings", [{"bits": 5}, {"bits": 1}, {"bits": 2, "group_size": 0}])
def test_settings_out_of_range(settings: dict[str, Any]) -> None:
    with pytest.raises(UserError, match=r"method\.(bits|group_size)=\d"):
        RTN(**settings)
    with pytest.raises(UserError, match=r"method\.(bits|group_size)=\d"):
        quantize_weight(torch.ones(2, 8), **settings)


def test_nan_weights_are_refused() -> None:
    with pytest.raises(UserError, match="nan"):
        quantize_weight(torch.full((2, 8), float("nan")), 4)


def test_a_model(tiny_model: Callable[..., PreTrainedModel]) -> None:
    model = tiny_model("llama")
    original = model.model.layers[0].mlp.up_proj.weight.detach().clone()
    linears = packed_linears(model, RTN(bits=4))
    assert len(linears) == 14
    expected = quantize_weight(original, 4).dequantize()
    assert torch.equal(linears["model.layers.0.mlp.up_proj"].packed.dequantize(), expected)
