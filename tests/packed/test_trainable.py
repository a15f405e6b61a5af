"""Trained scales: start, gradients, training and the way back to bytes, for the formats of all methods."""

from __future__ import annotations

import copy
import functools

import pytest
import torch
from torch import Tensor, nn
from torch.nn import functional as F

import ptq161
from ptq161.errors import UserError
from ptq161.methods import gse
from ptq161.models.architectures import quantized_linears
from ptq161.packed.linear import PackedLinear
from ptq161.packed.trainable import ScaledLinear, gain_sizes, scale_tensors
from ptq161.packed.weight import _FORMATS, PackedWeight
from tests.conftest import VPTQ_WITH_ALL, _tiny_model, every_method

TOKENS = torch.randint(3, 256, (2, 40), generator=torch.Generator().manual_seed(1))
METHODS = every_method(bits=3, epochs=0) | {
    "rtn, groups": ptq161.RTN(bits=4, group_size=24),
    "fp8, groups": ptq161.FP8(group_size=24),
    "rtn, symmetric": ptq161.RTN(bits=3, symmetric=True),
    "gptq, in another order": ptq161.GPTQ(bits=2, group_size=16, act_order=True),
    "quip, hadamard": ptq161.QuIP(bits=2, rotation="hadamard"),
    "quant_dllm, by columns": ptq161.QuantDLLM(mixed_ratio=0.2, allocation="columns"),
    "vptq, all options": VPTQ_WITH_ALL,
    "waterfill, ranged": ptq161.Waterfill(level="linear", epochs=0, batch_size=2, tiers=[1, 2, 4]),
    "ptq161, float32": ptq161.PTQ161(epochs=0, scale_dtype="float32"),
}
WITHOUT_SCALES = METHODS.pop("gse")
"""A method whose format has exponents in their place."""


@functools.cache
def packed_by(method: str) -> PackedWeight:
    """The first MLP projection, with a row of zeros and weights that are far below one."""
    model = _tiny_model("llama", n_blocks=1)
    for name, linear in quantized_linears(model):
        assert isinstance(linear, nn.Linear)
        if name == "0.mlp.up_proj":
            linear.weight.data[5] = 0
    model = ptq161.quantize(model, TOKENS, METHODS[method])
    linear = dict(quantized_linears(model))["0.mlp.up_proj"]
    assert isinstance(linear, PackedLinear)
    return linear.packed


@pytest.fixture(params=METHODS)
def packed(request: pytest.FixtureRequest) -> PackedWeight:
    return packed_by(request.param)


def scaled(packed: PackedWeight) -> ScaledLinear:
    return ScaledLinear(packed, None, torch.float32)


def drifted(packed: PackedWeight, size: float) -> ScaledLinear:
    """A layer with random gains."""
    layer = scaled(packed)
    with torch.no_grad():
        for gain in layer.gains.values():
            gain += size * torch.randn_like(gain)
    return layer


def test_every_format_is_here() -> None:
    # A weight with adapters has those of its base, and is tested in test_adapted.py.
    assert {packed_by(method).format for method in METHODS} | {WITHOUT_SCALES.format, "adapted"} == set(_FORMATS)


def test_a_format_without_scales_has_nothing_to_train() -> None:
    packed = gse.quantize_weight(torch.randn(8, 40), bits=5)
    layer = scaled(packed)
    assert not [name for name, p in layer.named_parameters() if p.requires_grad]
    assert torch.equal(layer(torch.eye(40)).T, packed.dequantize()) and layer.repack().nbytes == packed.nbytes


def test_offsets_are_stored_tensors(packed: PackedWeight) -> None:
    fields = set(packed.settings()) | set(packed.state_dict())
    assert set(packed.offsets) <= fields
    assert {name for name in scale_tensors(packed) if "mean" in name or "zero" in name} <= set(packed.offsets)


def test_the_start_is_the_packed_weight(packed: PackedWeight) -> None:
    layer = scaled(packed)
    assert torch.equal(layer.dequantize(), packed.dequantize())
    again = layer.repack()
    assert again.settings() == packed.settings() and again.nbytes == packed.nbytes
    assert all(torch.equal(again.state_dict()[name], tensor) for name, tensor in packed.state_dict().items())


def test_only_gains_are_trained(packed: PackedWeight) -> None:
    trained = {name: p for name, p in scaled(packed).named_parameters() if p.requires_grad}
    assert set(trained) == {f"gains.{name}" for name in scale_tensors(packed)}
    assert all(p.dtype == torch.float32 and not p.any() for p in trained.values())


def test_gradients_are_those_of_differences(packed: PackedWeight) -> None:
    layer = drifted(packed, 0.05)
    direction = torch.randn(packed.out_features, packed.in_features)
    (layer.dequantize() * direction).sum().backward()

    def at(name: str, step: Tensor) -> float:
        moved = copy.deepcopy(layer)
        with torch.no_grad():
            moved.gains[name] += step
            return float((moved.dequantize().double() * direction.double()).sum())

    for name, gain in layer.gains.items():
        assert gain.grad is not None and gain.grad.isfinite().all()
        assert gain.grad.any() or not gain.numel()
        for way in (torch.randn_like(gain), gain.grad / gain.grad.norm().clamp(min=1e-30)):
            difference = (at(name, 0.01 * way) - at(name, -0.01 * way)) / 0.02
            assert float((gain.grad * way).sum()) == pytest.approx(
                difference, abs=5e-3 * float(gain.grad.norm()) + 1e-9
            )


def test_training_lowers_the_error(packed: PackedWeight) -> None:
    layer = scaled(packed)
    x = torch.randn(64, packed.in_features)
    y = x @ (packed.dequantize() * (1 + 0.3 * torch.rand(packed.out_features, 1))).T
    optimizer = torch.optim.Adam([p for p in layer.parameters() if p.requires_grad], lr=1e-2)
    errors = []
    for _ in range(15):
        loss = (layer(x) - y).square().mean()
        errors.append(loss.item())
        loss.backward()
        optimizer.step()
        optimizer.zero_grad()
    assert errors[-1] < 0.9 * errors[0]


def test_repacking_loses_what_the_stored_dtype_loses(packed: PackedWeight) -> None:
    layer = drifted(packed, 0.05)
    again, sizes = layer.repack(), gain_sizes(packed)
    assert type(again) is type(packed) and again.nbytes == packed.nbytes and again.settings() == packed.settings()
    for name, start in packed.state_dict().items():
        found = again.state_dict()[name]
        assert found.dtype == start.dtype and found.shape == start.shape
        if name in sizes:
            torch.testing.assert_close(found, (start.float() + layer.gains[name] * sizes[name]).to(start.dtype))
            assert not torch.equal(found, start) or not sizes[name].any()
        else:
            assert torch.equal(found, start)
    computed, stored = layer.dequantize().detach(), again.dequantize()
    assert float((stored - computed).norm() / computed.norm()) < 1e-3


def test_a_row_of_zeros_stays_one(packed: PackedWeight) -> None:
    zero = ~packed.dequantize().any(1)
    # Rotations spread every other row over it, and vectors span several rows.
    assert packed.format in ("quip", "vector") or zero[5]
    layer = drifted(packed, 0.5)
    assert not layer.dequantize()[zero].any() and not layer.repack().dequantize()[zero].any()
    assert layer.dequantize()[~zero].any(1).all()


def test_a_bias_and_a_dtype() -> None:
    packed, bias = packed_by("billm"), torch.randn(96)
    layer = ScaledLinear(packed, bias, torch.bfloat16)
    x = torch.randn(3, 64).bfloat16()
    assert torch.equal(layer(x), F.linear(x, packed.dense(torch.bfloat16), bias.bfloat16()))
    layer(x).sum().backward()
    assert layer.start.bias is not None and layer.start.bias.grad is None
    with torch.autocast("cpu", torch.bfloat16):
        assert torch.equal(layer(x.float()), layer(x))


def test_the_weight_is_exact_under_autocast() -> None:
    """The rotations of QuIP are products of their own."""
    packed, eye = packed_by("quip"), torch.eye(64).bfloat16()
    expected = packed.dequantize().bfloat16()
    with torch.autocast("cpu", torch.bfloat16):
        found = ScaledLinear(packed, None, torch.bfloat16)(eye).T
    assert torch.equal(found, expected)


def test_the_exponent_of_a_weight_is_kept() -> None:
    packed = packed_by("rtn").scaled(-20)
    assert torch.equal(scaled(packed).dequantize(), packed.dequantize())
    assert scaled(packed).repack().exponent == packed.exponent


def test_a_scale_beyond_its_dtype_is_refused() -> None:
    layer = scaled(packed_by("rtn"))
    with torch.no_grad():
        layer.gains["scales"].fill_(1e9)
    with pytest.raises(UserError, match="cannot be stored as float16"):
        layer.repack()
