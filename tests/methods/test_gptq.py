from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from transformers import PreTrainedModel

import ptq161
from ptq161.errors import UserError
from ptq161.methods import rtn
from ptq161.methods.compensation import compensate_columns, inverse_factor, weighted_error
from ptq161.methods.gptq import GPTQ, quantize_weight
from tests.methods.layers import assert_golden, golden, layer, packed_linears


@pytest.mark.parametrize("bits", [2, 3])
def test_golden_vectors(golden_dir: Path, bits: int) -> None:
    weight, hessian, expected = golden(golden_dir, f"gptq_w{bits}")
    assert_golden(quantize_weight(weight, hessian, bits, scale_dtype="float32").dequantize(), expected)


def test_the_mean_error_falls_with_bits_and_below_round_to_nearest() -> None:
    layers = [layer(seed) for seed in range(20)]
    by_bits = [
        sum(weighted_error(w, quantize_weight(w, h, bits).dequantize(), h) for w, h in layers) for bits in (2, 3, 4, 8)
    ]
    assert by_bits == sorted(by_bits, reverse=True)
    nearest = sum(weighted_error(w, rtn.quantize_weight(w, 2).dequantize(), h) for w, h in layers)
    assert by_bits[0] < 0.7 * nearest


def test_an_uncorrelated_input_leaves_round_to_nearest() -> None:
    weight, _ = layer(0)
    packed = quantize_weight(weight, torch.eye(128), 3)
    assert torch.equal(packed.dequantize(), rtn.quantize_weight(weight, 3).dequantize())


def test_the_column_block_changes_rounding_only() -> None:
    weight, hessian = layer(1, in_features=100)
    values = [quantize_weight(weight, hessian, 4, column_block=c).dequantize() for c in (1, 7, 32, 128)]
    for other in values[:-1]:
        assert ((values[-1] - other).abs() > 1e-6).float().mean() <= 2e-3


def test_what_is_stored_is_what_was_compensated_for() -> None:
    """The loss that is passed on is that of the value with its half-precision scale."""
    weight, hessian = layer(2, in_features=40)
    factor = inverse_factor(hessian)
    packed = quantize_weight(weight, hessian, 2)
    stored = packed.dequantize()

    def replay(column: torch.Tensor, j: int, lagged: torch.Tensor) -> torch.Tensor:
        assert packed.zero_points is not None
        scale, zero = packed.scales.float()[:, 0], packed.zero_points.float()[:, 0]
        nearest = scale * ((column / scale).round() + zero).clamp(0, 3) - scale * zero
        torch.testing.assert_close(nearest, stored[:, j])
        return stored[:, j]

    compensate_columns(weight, factor, replay)


@pytest.mark.parametrize("act_order", [False, True])
@pytest.mark.parametrize("symmetric", [False, True])
@pytest.mark.parametrize("group_size", [None, 16, 48, 500])
def test_groups_and_orders(group_size: int | None, symmetric: bool, act_order: bool) -> None:
    weight, hessian = layer(3, in_features=100, dead=3)
    packed = quantize_weight(
        weight, hessian, 4, group_size=group_size, symmetric=symmetric, act_order=act_order, column_block=32
    )
    values = packed.dequantize()
    assert not values[:, :3].any()
    assert ((values - weight)[:, 3:].norm() / weight.norm()) < 0.35
    assert (packed.group_index is not None) == (act_order and group_size is not None)
    assert (packed.zero_points is None) == symmetric


def test_groups_take_their_range_before_the_compensation_within_a_block() -> None:
    """The quirk of the released code: the second group of a block does not see what the first one passed on."""
    weight, hessian = layer(4, in_features=64)
    packed = quantize_weight(weight, hessian, 4, group_size=32, column_block=64)
    expected = rtn.quantize_weight(weight, 4, group_size=32)
    assert torch.equal(packed.scales, expected.scales)
    assert not torch.equal(quantize_weight(weight, hessian, 4, group_size=32, column_block=32).scales, expected.scales)


def test_act_order_helps_where_inputs_differ_in_size() -> None:
    better = 0
    for seed in range(10):
        weight, _ = layer(seed)
        generator = torch.Generator().manual_seed(seed)
        inputs = torch.randn(256, 128, generator=generator) @ torch.randn(128, 128, generator=generator)
        inputs *= 10 ** (2 * torch.rand(128, generator=generator) - 1)
        hessian = 2 * inputs.T @ inputs
        plain, ordered = (
            weighted_error(weight, quantize_weight(weight, hessian, 2, act_order=o).dequantize(), hessian)
            for o in (False, True)
        )
        better += ordered < plain
    assert better >= 7


def test_the_hessian_is_left_alone_and_two_runs_agree() -> None:
    weight, hessian = layer(5, dead=2)
    before, weight_before = hessian.clone(), weight.clone()
    first, second = (quantize_weight(weight, hessian, 2).state_dict() for _ in range(2))
    assert torch.equal(hessian, before) and torch.equal(weight, weight_before)
    assert all(torch.equal(first[k], second[k]) for k in first)


def test_the_factor_inverts_the_damped_hessian() -> None:
    _, hessian = layer(6, in_features=32)
    factor = inverse_factor(hessian)
    damped = hessian + 0.01 * hessian.diagonal().mean() * torch.eye(32)
    torch.testing.assert_close(factor.upper.T @ factor.upper @ damped, torch.eye(32), atol=1e-3, rtol=0)


def test_damping_is_raised_where_the_factorization_fails() -> None:
    hessian = torch.eye(8) - 0.15 * torch.ones(8, 8)  # its smallest eigenvalue is -0.2, its mean diagonal 0.85
    assert inverse_factor(hessian, 0.01).damping == 1.0
    assert inverse_factor(torch.eye(8), 0.01).damping == 0.01
    assert inverse_factor(torch.ones(8, 8), 0.0).damping > 0


def test_hessians_that_no_damping_mends() -> None:
    weight = torch.ones(2, 4)
    with pytest.raises(UserError, match="not positive definite"):
        quantize_weight(weight, torch.eye(4) - 2 * torch.ones(4, 4), 2)
    for bad in (float("nan"), float("inf")):
        with pytest.raises(UserError, match="NaN or infinite"):
            quantize_weight(weight, torch.full((4, 4), bad), 2)
    with pytest.raises(UserError, match="8 inputs"):
        quantize_weight(weight, torch.eye(8), 2)
    with pytest.raises(UserError, match=r"\[4, 8\]"):
        quantize_weight(weight, torch.ones(4, 8), 2)


@pytest.mark.parametrize("settings", [{"bits": 5}, {"column_block": 0}, {"damping": -0.1}, {"group_size": 0}])
def test_settings_out_of_range(settings: dict[str, Any]) -> None:
    with pytest.raises(UserError, match=f"method.{next(iter(settings))}="):
        GPTQ(**settings)
    with pytest.raises(UserError, match=f"method.{next(iter(settings))}="):
        quantize_weight(torch.ones(2, 8), torch.eye(8), **{"bits": 4, **settings})


def test_a_model(tiny_model: Callable[..., PreTrainedModel]) -> None:
    assert len(packed_linears(tiny_model("llama"), GPTQ(bits=4))) == 14


def test_a_user_error_names_block_and_linear(
    tiny_model: Callable[..., PreTrainedModel], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("ptq161.driver.windows.exponent_of", lambda _: 0)  # weights come as they are
    model = tiny_model("llama")
    with torch.no_grad():
        model.model.layers[1].mlp.down_proj.weight.fill_(1e30)
    tokens = torch.randint(0, 256, (4, 32))
    with pytest.raises(UserError, match=r"1\.mlp\.down_proj"):
        ptq161.quantize(model, tokens, GPTQ(bits=4))
