from __future__ import annotations

from collections.abc import Callable

import pytest
import torch
from torch import Tensor
from transformers import PreTrainedModel

import ptq161
from ptq161.errors import UserError
from ptq161.methods import rtn
from ptq161.methods.awq import AWQ, quantize_weight, search_clip, search_scales
from ptq161.methods.compensation import weighted_error
from ptq161.packed.awq import AWQWeight
from tests.methods.layers import packed_linears


def outlier_layer(seed: int, out_features: int = 32, in_features: int = 96) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """Return weight, inputs, hessian and mean |x| of inputs whose channels differ in size, as a real model's do."""
    generator = torch.Generator().manual_seed(seed)
    weight = torch.randn(out_features, in_features, generator=generator) * 0.05
    inputs = torch.randn(4 * in_features, in_features, generator=generator)
    inputs *= torch.exp(torch.randn(in_features, generator=generator))
    return weight, inputs, 2 * inputs.T @ inputs, inputs.abs().mean(0)


@pytest.mark.parametrize("group_size", [None, 32, 40])
@pytest.mark.parametrize("bits", [2, 3, 4])
def test_beats_round_to_nearest_on_every_layer(bits: int, group_size: int | None) -> None:
    for seed in range(5):
        weight, _, hessian, mean = outlier_layer(seed)
        error, nearest = (
            weighted_error(weight, packed.dequantize(), hessian)
            for packed in (
                quantize_weight(weight, hessian, mean, bits, group_size=group_size),
                rtn.quantize_weight(weight, bits, group_size=group_size),
            )
        )
        assert error < 0.9 * nearest


def test_scales_and_clipping_each_help() -> None:
    """It is more than a clipped RTN, and more than a scaled one."""
    errors = {"nearest": 0.0, "clipped": 0.0, "scaled": 0.0, "both": 0.0}
    for seed in range(5):
        weight, _, hessian, mean = outlier_layer(seed)
        flat = torch.ones_like(mean)
        packed = {
            "nearest": rtn.quantize_weight(weight, 2),
            "clipped": quantize_weight(weight, hessian, flat, 2),
            "scaled": quantize_weight(weight, hessian, mean, 2, clip=False),
            "both": quantize_weight(weight, hessian, mean, 2),
        }
        for name, result in packed.items():
            errors[name] += weighted_error(weight, result.dequantize(), hessian)
    assert errors["both"] < 0.9 * min(errors["clipped"], errors["scaled"])
    assert max(errors["clipped"], errors["scaled"]) < errors["nearest"]


def test_the_scales_are_the_best_of_the_grid_on_the_outputs() -> None:
    """By hand, on the outputs themselves."""
    weight, inputs, hessian, mean = outlier_layer(3)
    errors = []
    for step in range(20):
        scales = mean.pow(step / 20)
        scales = scales / (scales.max() * scales.min()).sqrt()
        values = rtn.quantize_weight(weight * scales, 3, scale_dtype="float32").dequantize() / scales
        errors.append((float((inputs @ (values - weight).T).square().sum()), scales))
    best = min(errors, key=lambda pair: pair[0])[1]
    found = search_scales(weight, hessian, mean, 3, scale_dtype="float32")
    torch.testing.assert_close(found, best)
    assert not torch.equal(found, torch.ones_like(found))


def test_equal_channels_need_no_scales() -> None:
    weight, _, hessian, mean = outlier_layer(0)
    assert torch.equal(search_scales(weight, hessian, torch.full_like(mean, 0.5), 4), torch.ones_like(mean))


def test_the_limit_is_the_best_of_the_grid_on_the_outputs() -> None:
    weight, inputs, hessian, _ = outlier_layer(4, in_features=80)
    limit = search_clip(weight, hessian, 2, group_size=32, scale_dtype="float32")
    assert limit.shape == (32, 3)
    for group, columns in enumerate((slice(0, 32), slice(32, 64), slice(64, 80))):
        part, x = weight[:, columns], inputs[:, columns]
        largest = part.abs().amax(1, keepdim=True)
        errors = []
        for step in range(10):
            clipped = part.clamp(-largest * (1 - step / 20), largest * (1 - step / 20))
            values = rtn.quantize_weight(clipped, 2, scale_dtype="float32").dequantize()
            errors.append(((values - part) @ x.T).square().sum(1))
        best = torch.stack(errors).argmin(0)
        torch.testing.assert_close(limit[:, group], largest[:, 0] * (1 - best / 20))
        assert len(best.unique()) > 2


def test_a_group_shares_its_scales_and_queries_and_keys_are_not_clipped(
    tiny_model: Callable[..., PreTrainedModel],
) -> None:
    linears = packed_linears(tiny_model("llama", n_blocks=1), AWQ(bits=2, group_size=None))
    clipped = packed_linears(tiny_model("llama", n_blocks=1), AWQ(bits=2, group_size=None, auto_clip=False))
    packed = {name.rpartition(".")[2]: module.packed for name, module in linears.items()}
    unclipped = {name.rpartition(".")[2]: module.packed for name, module in clipped.items()}
    assert all(isinstance(weight, AWQWeight) for weight in packed.values()) and len(packed) == 7
    for group in (("q_proj", "k_proj", "v_proj"), ("gate_proj", "up_proj")):
        assert all(torch.equal(packed[name].input_scales, packed[group[0]].input_scales) for name in group)
    assert not torch.equal(packed["q_proj"].input_scales, packed["o_proj"].input_scales)
    same = {name for name in packed if torch.equal(packed[name].scales, unclipped[name].scales)}
    assert same == {"q_proj", "k_proj"}


@pytest.mark.parametrize("architecture", ["opt", "mistral", "qwen2", "qwen3", "gemma2", "gemma3_text"])
def test_models(architecture: str, tiny_model: Callable[..., PreTrainedModel]) -> None:
    assert packed_linears(tiny_model(architecture), AWQ(bits=4, group_size=32))


def test_two_runs_agree_and_inputs_are_left_alone() -> None:
    weight, _, hessian, mean = outlier_layer(5)
    copies = [tensor.clone() for tensor in (weight, hessian, mean)]
    first, second = (quantize_weight(weight, hessian, mean, 2, group_size=32).state_dict() for _ in range(2))
    assert all(torch.equal(first[k], second[k]) for k in first)
    assert all(map(torch.equal, copies, (weight, hessian, mean)))


def test_dead_channels_and_rows_of_zeros() -> None:
    weight, inputs, _, _ = outlier_layer(6)
    inputs[:, :5] = 0
    weight[3] = 0
    values = quantize_weight(weight, 2 * inputs.T @ inputs, inputs.abs().mean(0), 2).dequantize()
    assert torch.isfinite(values).all() and not values[3].any()


def test_bad_values() -> None:
    weight, _, hessian, mean = outlier_layer(7)
    with pytest.raises(UserError, match=r"method\.bits=5"):
        AWQ(bits=5)
    with pytest.raises(UserError, match=r"method\.group_size=0"):
        AWQ(group_size=0)
    with pytest.raises(UserError, match="block_size=2"):
        AWQ(block_size=2)
    with pytest.raises(UserError, match="NaN"):
        quantize_weight(weight, torch.full_like(hessian, float("nan")), mean, 2)
    with pytest.raises(UserError, match="96 columns"):
        quantize_weight(weight, torch.eye(8), mean, 2)
    with pytest.raises(UserError, match="scale"):
        quantize_weight(weight * float("nan"), hessian, mean, 2)


def test_a_user_error_names_block_and_linear(
    tiny_model: Callable[..., PreTrainedModel], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("ptq161.driver.windows.exponent_of", lambda _: 0)  # weights come as they are
    model = tiny_model("llama")
    with torch.no_grad():
        model.model.layers[1].mlp.up_proj.weight.fill_(1e30)
    with pytest.raises(UserError, match=r"1\.mlp\."):
        ptq161.quantize(model, torch.randint(0, 256, (4, 32)), AWQ())
