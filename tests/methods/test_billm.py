from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor
from transformers import PreTrainedModel

from ptq161.errors import UserError
from ptq161.methods import rtn
from ptq161.methods.billm import BiLLM, binarize, quantize_weight
from ptq161.methods.billm.search import best_split, salient_columns
from ptq161.methods.compensation import weighted_error
from ptq161.packed.billm import binary_values
from ptq161.packed.bits import unpack_plane
from tests.methods.layers import assert_golden, golden, layer, packed_linears


def binarized_error(values: Tensor, mask: Tensor, orders: int) -> float:
    """Squared error of the masked values after row-wise binarization, element by element, in float64."""
    error = 0.0
    for row, selected in zip(values.double(), mask, strict=True):
        rest = row[selected]
        for _ in range(orders if len(rest) else 0):
            centered = rest - rest.mean()
            rest = centered - centered.sign() * centered.abs().mean()
        error += float(rest.square().sum())
    return error


def test_golden_vector(golden_dir: Path) -> None:
    weight, hessian, expected = golden(golden_dir, "billm_hessian")
    assert_golden(quantize_weight(weight, hessian, "hessian", scale_dtype="float32").dequantize(), expected)


@pytest.mark.parametrize(("columns", "signed"), [(64, True), (64, False), (20, True), (50, False), (2, True)])
def test_the_number_of_salient_columns_is_the_one_of_least_error(columns: int, signed: bool) -> None:
    generator = torch.Generator().manual_seed(columns)
    score = torch.randn(12, columns, generator=generator) * (1 + 4 * torch.rand(columns, generator=generator) ** 8)
    score = score if signed else score.square()
    order = score.abs().sum(0).argsort(descending=True)
    errors = []
    for n in range(1, min(50, columns)):
        mask = torch.zeros(12, columns, dtype=torch.bool)
        mask[:, order[:n]] = True
        errors.append(binarized_error(score, mask, 2) + binarized_error(score, ~mask, 2))
    expected = torch.zeros(columns, dtype=torch.bool)
    expected[order[: 1 + int(np.argmin(errors))]] = True
    assert torch.equal(salient_columns(score), expected)


@pytest.mark.parametrize("signed", [True, False])
@pytest.mark.parametrize("n_salient", [0, 3, 40])
def test_the_split_is_the_one_of_least_error(n_salient: int, signed: bool) -> None:
    generator = torch.Generator().manual_seed(n_salient)
    score = torch.randn(12, 64, generator=generator) ** (1 if signed else 2)
    salient = torch.arange(64) < n_salient
    sizes = score.abs() * ~salient
    candidates = np.quantile(sizes.numpy(), np.linspace(0.1, 0.9, 81))
    errors = [
        sum(binarized_error(score, mask & ~salient, 1) for mask in (sizes < edge, sizes >= edge)) for edge in candidates
    ]
    assert best_split(score, salient) == pytest.approx(candidates[int(np.argmin(errors))], rel=1e-5)


def test_a_block_of_one_column_is_salient_and_stored_exactly() -> None:
    weight, hessian = layer(0, in_features=129)
    packed = quantize_weight(weight, torch.diag(hessian.diagonal()), "hessian", scale_dtype="float32")
    assert unpack_plane(packed.salient, 129)[128]
    torch.testing.assert_close(packed.dequantize()[:, 128], weight[:, 128])


def test_empty_groups_have_zero_scales_and_nothing_is_nan() -> None:
    block = torch.randn(3, 8)
    none = torch.zeros(8, dtype=torch.bool)
    planes, grid = binarize(block, none, block.abs() >= 0, "float16")
    assert not grid.scales[[0, 2, 3]].any() and not grid.means[[0, 2]].any()
    assert torch.isfinite(binary_values(planes, grid)).all()


def test_salient_columns_take_four_values_a_row_and_others_four_in_two_groups() -> None:
    weight, hessian = layer(1)
    packed = quantize_weight(weight, hessian, "hessian")
    salient, values = unpack_plane(packed.salient, 128), packed.dequantize()
    assert 1 <= packed.n_salient <= 49
    for row in values:
        assert len(row[salient].unique()) <= 4
        assert len(row[~salient].unique()) == 4


def test_no_loss_is_passed_on_within_a_block() -> None:
    """The quirk of the released code: with one block for all columns, the hessian decides the masks at most."""
    weight, hessian = layer(2)
    alone = quantize_weight(weight, torch.diag(hessian.diagonal()), "magnitude").dequantize()
    assert torch.equal(quantize_weight(weight, hessian, "magnitude").dequantize(), alone)
    wide, wide_hessian = layer(2, in_features=256)
    parts = quantize_weight(wide, torch.diag(wide_hessian.diagonal()), "magnitude").dequantize()
    whole = quantize_weight(wide, wide_hessian, "magnitude").dequantize()
    assert torch.equal(whole[:, :128], parts[:, :128]) and not torch.equal(whole[:, 128:], parts[:, 128:])


def test_it_beats_round_to_nearest_at_two_bits_in_the_mean() -> None:
    ours = nearest = 0.0
    for weight, hessian in (layer(seed, in_features=256) for seed in range(20)):
        ours += weighted_error(weight, quantize_weight(weight, hessian, "hessian").dequantize(), hessian)
        nearest += weighted_error(weight, rtn.quantize_weight(weight, 2).dequantize(), hessian)
    assert ours < nearest


@pytest.mark.parametrize("saliency", ["magnitude", "hessian"])
@pytest.mark.parametrize(("in_features", "column_block"), [(1, 128), (100, 128), (130, 128), (200, 64), (40, 7)])
def test_shapes_that_the_block_does_not_divide(in_features: int, column_block: int, saliency: str) -> None:
    weight, hessian = layer(3, in_features=in_features, dead=in_features // 20)
    values = quantize_weight(weight, hessian, saliency, column_block).dequantize()
    assert values.shape == weight.shape
    assert (values - weight).norm() < weight.norm()


def test_measured_and_nominal_bits() -> None:
    weight, hessian = layer(4, out_features=64, in_features=512)
    assert 2.875 < quantize_weight(weight, hessian, "hessian").bits_per_weight < 2.92
    assert BiLLM().nominal_bits() == 1.08


def test_two_runs_agree() -> None:
    weight, hessian = layer(5)
    first, second = (quantize_weight(weight, hessian, "hessian").state_dict() for _ in range(2))
    assert all(torch.equal(first[k], second[k]) for k in first)


@pytest.mark.parametrize("settings", [{"saliency": "taylor"}, {"column_block": 0}])
def test_settings_out_of_range(settings: dict[str, Any]) -> None:
    with pytest.raises(UserError, match=f"method.{next(iter(settings))}="):
        BiLLM(**settings)
    with pytest.raises(UserError, match=f"method.{next(iter(settings))}="):
        quantize_weight(torch.ones(2, 8), torch.eye(8), **{"saliency": "hessian", **settings})


def test_an_indefinite_hessian_and_nan_weights() -> None:
    with pytest.raises(UserError, match="not positive definite"):
        quantize_weight(torch.ones(2, 4), torch.eye(4) - 2 * torch.ones(4, 4), "hessian")
    with pytest.raises(UserError, match="NaN or infinite"):
        quantize_weight(torch.full((2, 4), float("nan")), torch.eye(4), "hessian")


def test_a_model(tiny_model: Callable[..., PreTrainedModel]) -> None:
    linears = packed_linears(tiny_model("llama"), BiLLM(saliency="hessian"))
    assert len(linears) == 14
    assert {linear.packed.format for linear in linears.values()} == {"billm"}
