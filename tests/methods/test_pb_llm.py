from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from transformers import PreTrainedModel

from ptq161.errors import UserError
from ptq161.methods.compensation import inverse_factor, weighted_error
from ptq161.methods.pb_llm import PBLLM, binary_parameters, quantize_weight, salient_weights
from ptq161.packed.bits import unpack_plane
from tests.methods.layers import assert_golden, golden, layer, packed_linears


@pytest.mark.parametrize(("saliency", "low_frac"), [("hessian", 0.9), ("magnitude", 0.8)])
def test_golden_vectors(golden_dir: Path, saliency: str, low_frac: float) -> None:
    weight, hessian, expected = golden(golden_dir, f"pb_llm_{saliency}")
    packed = quantize_weight(weight, hessian, low_frac, 8, saliency, scale_dtype="float32")
    assert_golden(packed.dequantize(), expected)


def test_one_weight_more_than_the_share_is_binarized() -> None:
    """The quirk of the released comparison with the threshold."""
    weight, hessian = layer(0)
    packed = quantize_weight(weight, hessian, 0.9, 8, "magnitude")
    assert packed.n_salient == weight.numel() - int(0.9 * weight.numel()) - 1
    salient = unpack_plane(packed.salient, 128)
    assert weight[salient].abs().min() > weight[~salient].abs().max()


def test_the_hessian_saliency_prefers_columns_with_large_inputs() -> None:
    weight = torch.ones(4, 16) + 1e-3 * torch.randn(4, 16)
    hessian = torch.diag(torch.tensor([1.0] * 14 + [100.0, 100.0]))
    salient = salient_weights(weight, inverse_factor(hessian), 0.9, "hessian")
    assert salient.any() and not salient[:, :14].any()


def test_zeros_of_salient_weights_count_in_mean_and_scale() -> None:
    """The quirk of the released binarization."""
    mean, scale = binary_parameters(torch.tensor([[2.0, 2.0, 0.0, 0.0]]), "float32")
    assert (float(mean), float(scale)) == (1.0, 1.0)


def test_binary_weights_take_two_values_a_row_and_salient_ones_stay_close() -> None:
    weight, hessian = layer(1)
    packed = quantize_weight(weight, torch.eye(128), 0.8, 8, "magnitude")
    salient, values = unpack_plane(packed.salient, 128), packed.dequantize()
    for row, mask in zip(values, salient, strict=True):
        assert len(row[~mask].unique()) == 2
    assert (values - weight)[salient].abs().max() <= float(packed.high_scales.max())
    assert weighted_error(weight, quantize_weight(weight, hessian, 0.8, 8, "hessian").dequantize(), hessian) < (
        weighted_error(weight, values, hessian)
    )


def test_fewer_binary_weights_are_better_in_the_mean() -> None:
    errors = [0.0, 0.0, 0.0]
    for weight, hessian in (layer(seed) for seed in range(20)):
        for i, low_frac in enumerate((0.95, 0.8, 0.5)):
            packed = quantize_weight(weight, hessian, low_frac, 8, "hessian")
            errors[i] += weighted_error(weight, packed.dequantize(), hessian)
    assert errors == sorted(errors, reverse=True)


@pytest.mark.parametrize("in_features", [1, 100, 129, 130])
def test_the_last_block_may_be_shorter_and_columns_dead(in_features: int) -> None:
    weight, hessian = layer(2, in_features=in_features, dead=in_features // 20)
    packed = quantize_weight(weight, hessian, 0.9, 8, "hessian", scale_dtype="float32")
    values = packed.dequantize()
    assert values.shape == weight.shape and torch.isfinite(values).all()
    other = quantize_weight(weight, hessian, 0.9, 8, "hessian", column_block=13, scale_dtype="float32").dequantize()
    assert ((values - other).abs() > 1e-5).float().mean() <= 2e-3


def test_measured_and_nominal_bits() -> None:
    generator = torch.Generator().manual_seed(0)
    weight = torch.randn(64, 1024, generator=generator)
    packed = quantize_weight(weight, torch.eye(1024), 0.9, 8, "magnitude")
    assert packed.bits_per_weight == pytest.approx(1 + 0.9 + 0.8 + 64 / 1024, abs=0.005)
    assert PBLLM().nominal_bits() == pytest.approx(1.7)


def test_two_runs_agree() -> None:
    weight, hessian = layer(3)
    first, second = (quantize_weight(weight, hessian, 0.9, 8, "hessian").state_dict() for _ in range(2))
    assert all(torch.equal(first[k], second[k]) for k in first)


@pytest.mark.parametrize(
    "settings", [{"low_frac": 1.0}, {"low_frac": -0.1}, {"high_bit": 5}, {"saliency": "taylor"}, {"column_block": 0}]
)
def test_settings_out_of_range(settings: dict[str, Any]) -> None:
    with pytest.raises(UserError, match=f"method.{next(iter(settings))}="):
        PBLLM(**settings)
    arguments: dict[str, Any] = {"low_frac": 0.9, "high_bit": 8, "saliency": "hessian", **settings}
    with pytest.raises(UserError, match=f"method.{next(iter(settings))}="):
        quantize_weight(torch.ones(2, 8), torch.eye(8), **arguments)


def test_an_indefinite_hessian_and_nan_weights() -> None:
    with pytest.raises(UserError, match="not positive definite"):
        quantize_weight(torch.ones(2, 4), torch.eye(4) - 2 * torch.ones(4, 4), 0.9, 8, "hessian")
    with pytest.raises(UserError, match="nan"):
        quantize_weight(torch.full((2, 4), float("nan")), torch.eye(4), 0.9, 8, "hessian")


def test_a_model(tiny_model: Callable[..., PreTrainedModel]) -> None:
    linears = packed_linears(tiny_model("llama"), PBLLM(saliency="hessian"))
    assert len(linears) == 14
    assert {linear.packed.format for linear in linears.values()} == {"pb_llm"}
