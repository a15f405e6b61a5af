from __future__ import annotations

from collections.abc import Callable

import pytest
import torch
from torch import Tensor
from transformers import PreTrainedModel

import ptq161
from ptq161.errors import UserError
from ptq161.methods import gptq, rtn
from ptq161.methods.compensation import weighted_error
from ptq161.methods.quip import QuIP, channel_scales, ldlq, quantize_weight, rotate_hessian
from ptq161.packed.linear import PackedLinear
from ptq161.packed.quip import ROTATIONS, draw_rotations
from tests.methods.layers import layer, packed_linears

both = pytest.mark.parametrize("rotation", sorted(ROTATIONS))


def ldlq_by_definition(position: Tensor, hessian: Tensor, bits: int, damping: float) -> Tensor:
    """Chee et al., Eq. 2, in float64: H = (U + I) D (U + I)^T with U strictly lower triangular, last column first."""
    hessian = hessian.double() + damping * hessian.double().diagonal().mean() * torch.eye(hessian.shape[0])
    lower = torch.linalg.cholesky(hessian)
    feedback = lower / lower.diagonal()
    codes = position.double().clone()
    for i in reversed(range(position.shape[1])):
        later = slice(i + 1, None)
        target = position[:, i].double() + (position[:, later].double() - codes[:, later]) @ feedback[later, i]
        codes[:, i] = torch.floor(target + 0.5).clamp(0, 2**bits - 1)
    return codes


@pytest.mark.parametrize("bits", [2, 4])
def test_the_shared_compensation_is_ldlq(bits: int) -> None:
    weight, hessian = layer(0, out_features=40, in_features=150)
    position = ((weight / 0.25 + 1) / 2 * (2**bits - 1)).clamp(0, 2**bits - 1)
    codes = ldlq(position, hessian, bits, 0.01)
    different = codes != ldlq_by_definition(position, hessian, bits, 0.01)
    assert different.float().mean() <= 2e-3


@both
def test_the_steps_of_the_released_code(rotation: str) -> None:
    """Dense matrices and the formulas of the released preprocessing, one after the other."""
    weight, hessian = layer(1, out_features=24, in_features=36)
    packed = quantize_weight(weight, hessian, 2, seed=5, rotation=rotation, scale_dtype="float32")
    relative = hessian / hessian.abs().max()
    scales = (relative.diagonal() / (weight.T @ weight).diagonal()).sqrt().sqrt()
    u, v = (drawn.apply(torch.eye(n)).T for drawn, n in zip(draw_rotations(rotation, 5, 24, 36), (24, 36), strict=True))
    w = u @ (weight * scales) @ v.T
    h = relative / scales / scales[:, None]
    h = v @ (h * 36 / h.trace() + 0.01 * torch.eye(36)) @ v.T
    grid = 2.4 * w.square().mean().sqrt()
    codes = ldlq_by_definition(((w / grid + 1) / 2 * 3).clamp(0, 3), h, 2, 0.01)
    expected = u.T @ ((codes.float() / 3 * 2 - 1) * grid) @ v / scales
    assert ((packed.dequantize() - expected).abs() > 1e-4).float().mean() <= 2e-3


@both
@pytest.mark.parametrize("bits", [2, 3])
def test_beats_round_to_nearest_and_gptq_in_the_mean(bits: int, rotation: str) -> None:
    errors = {"quip": 0.0, "gptq": 0.0, "rtn": 0.0}
    for seed in range(10):
        weight, hessian = layer(seed, out_features=48, in_features=96)
        # Outliers in the weight are what incoherence takes away.
        weight[torch.arange(48), torch.arange(48)] *= 8
        results = {
            "quip": quantize_weight(weight, hessian, bits, seed=seed, rotation=rotation),
            "gptq": gptq.quantize_weight(weight, hessian, bits),
            "rtn": rtn.quantize_weight(weight, bits),
        }
        for name, packed in results.items():
            errors[name] += weighted_error(weight, packed.dequantize(), hessian)
    assert errors["quip"] < 0.5 * errors["gptq"] < 0.5 * errors["rtn"]


def test_more_bits_are_better() -> None:
    errors = [0.0, 0.0, 0.0, 0.0]
    for seed in range(5):
        weight, hessian = layer(seed)
        for i, bits in enumerate((2, 3, 4, 8)):
            errors[i] += weighted_error(weight, quantize_weight(weight, hessian, bits).dequantize(), hessian)
    # The grid of 2.4 standard deviations is cut to 2 bits: its clipping bounds the error from below at 8.
    assert errors == sorted(errors, reverse=True)


@both
def test_rotated_hessians_are_incoherent(rotation: str) -> None:
    hessian = torch.diag(torch.tensor([100.0] + [1.0] * 63))
    _, in_side = draw_rotations(rotation, 0, 8, 64)
    rotated = rotate_hessian(hessian, in_side)
    torch.testing.assert_close(rotated.trace(), torch.tensor(64 * 1.01))
    torch.testing.assert_close(rotated, rotated.T, atol=1e-4, rtol=0)
    assert rotated.diagonal().max() < 20  # 39.6 before the rotation


def test_the_scale_of_the_hessian_does_not_matter() -> None:
    weight, hessian = layer(2)
    values = [quantize_weight(weight, factor * hessian, 2).dequantize() for factor in (1.0, 2.0**-20)]
    torch.testing.assert_close(values[0], values[1])


def test_channel_scales_balance_weight_and_hessian() -> None:
    weight, hessian = layer(3)
    scales = channel_scales(weight, hessian)
    norms = (weight * scales).square().sum(0).sqrt()
    diagonal = (hessian / scales / scales.unsqueeze(1)).diagonal().sqrt()
    torch.testing.assert_close(norms / norms[0], diagonal / diagonal[0])


def test_dead_channels_and_weights_of_zero() -> None:
    weight, hessian = layer(4, dead=4)
    assert torch.isfinite(quantize_weight(weight, hessian, 2).dequantize()).all()
    assert not quantize_weight(torch.zeros(6, 10), torch.eye(10), 2).dequantize().any()
    assert torch.isfinite(quantize_weight(weight, torch.zeros(128, 128), 2).dequantize()).all()


@both
def test_a_seed_decides_everything(rotation: str) -> None:
    weight, hessian = layer(5)
    before = weight.clone(), hessian.clone()
    first, again, other = (
        quantize_weight(weight, hessian, 2, seed=s, rotation=rotation).dequantize() for s in (1, 1, 2)
    )
    assert torch.equal(first, again) and not torch.equal(first, other)
    assert torch.equal(weight, before[0]) and torch.equal(hessian, before[1])


@both
def test_a_model(rotation: str, tiny_model: Callable[..., PreTrainedModel]) -> None:
    first, second = (packed_linears(tiny_model("llama"), QuIP(bits=4, rotation=rotation)) for _ in range(2))
    assert len(first) == 14
    assert len({int(module.packed.state_dict()["seed"]) for module in first.values()}) == 14
    for name, module in first.items():
        assert torch.equal(module.packed.dequantize(), second[name].packed.dequantize())


@pytest.mark.parametrize("architecture", ["opt", "mistral", "qwen2", "qwen3", "gemma2", "gemma3_text"])
def test_models(architecture: str, tiny_model: Callable[..., PreTrainedModel]) -> None:
    assert packed_linears(tiny_model(architecture), QuIP())


def test_the_seed_survives_a_cast_of_the_model(tiny_model: Callable[..., PreTrainedModel]) -> None:
    model = tiny_model("llama", n_blocks=1)
    before = {name: m.packed.dequantize() for name, m in packed_linears(model, QuIP(bits=4)).items()}
    model.to(torch.float16)
    for name, module in model.named_modules():
        if isinstance(module, PackedLinear):
            assert torch.equal(module.packed.dequantize(), before[name])


def test_bad_values() -> None:
    weight, hessian = layer(6)
    with pytest.raises(UserError, match=r"method\.bits=1"):
        QuIP(bits=1)
    with pytest.raises(UserError, match=r"method\.rotation=fourier"):
        QuIP(rotation="fourier")
    with pytest.raises(UserError, match=r"method\.damping=-1"):
        QuIP(damping=-1)
    with pytest.raises(UserError, match="block_size=2"):
        QuIP(block_size=2)
    with pytest.raises(UserError, match="NaN"):
        quantize_weight(weight, torch.full_like(hessian, float("nan")), 2)
    with pytest.raises(UserError, match="not positive definite"):
        quantize_weight(weight, torch.eye(128) - 2 * torch.ones(128, 128), 2)
    with pytest.raises(UserError, match="128 columns"):
        quantize_weight(weight, torch.eye(4), 2)
    with pytest.raises(UserError, match="nan"):
        quantize_weight(weight * float("nan"), hessian, 2)


def test_a_user_error_names_block_and_linear(
    tiny_model: Callable[..., PreTrainedModel], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("ptq161.driver.windows.exponent_of", lambda _: 0)  # weights come as they are
    model = tiny_model("llama")
    with torch.no_grad():
        model.model.layers[1].mlp.up_proj.weight.fill_(1e30)
    with pytest.raises(UserError, match=r"1\.mlp\."):
        ptq161.quantize(model, torch.randint(0, 256, (4, 32)), QuIP())
