"""Packed weights on the grid of their codes: values, latents at the start, and the way back to bytes."""

from __future__ import annotations

import functools

import pytest
import torch
from torch import nn

import ptq161
from ptq161.methods.base import Method
from ptq161.methods.coded import LEARNABLE, coded_weight, latent_linear, repack
from ptq161.models.architectures import quantized_linears
from ptq161.packed.linear import PackedLinear
from ptq161.packed.weight import PackedWeight
from tests.conftest import _tiny_model, every_method

TOKENS = torch.randint(3, 256, (2, 40), generator=torch.Generator().manual_seed(1))
FLAT = {"level": "linear", "epochs": 0, "batch_size": 2}
METHODS = {
    "waterfill": ptq161.Waterfill(**FLAT, bits=2.0, tiers=[1, 2, 3, 4]),
    "waterfill, one tier": ptq161.Waterfill(**FLAT, bits=4.0, tiers=[4]),
    "waterfill, no ranged": ptq161.Waterfill(**FLAT, tiers=[1, 2], scale_dtype="float32"),
    "ptq161": ptq161.PTQ161(epochs=1, scale_lr=1e-3, angle_lr=1e-2),
    "ptq161, no mask": ptq161.PTQ161(epochs=0, mask_ratio=0.0),
    "ptq161, float32": ptq161.PTQ161(epochs=0, scale_dtype="float32", salient_bits=8),
}


@functools.cache
def pair(method: str) -> tuple[PackedWeight, nn.Linear]:
    """A packed weight of the quantized tiny model, and the linear that it comes from."""
    full, name = _tiny_model("llama", n_blocks=1), "0.mlp.up_proj"
    model = ptq161.quantize(_tiny_model("llama", n_blocks=1), TOKENS, METHODS[method])
    linear, packed = (dict(quantized_linears(m))[name] for m in (full, model))
    assert isinstance(packed, PackedLinear) and isinstance(linear, nn.Linear)
    return packed.packed, linear


@pytest.mark.parametrize("name", every_method(bits=3, epochs=0))
def test_methods_name_the_format_that_they_store(name: str) -> None:
    method: Method = every_method(bits=3, epochs=0)[name]
    model = ptq161.quantize(_tiny_model("llama", n_blocks=1), TOKENS, method)
    assert {m.packed.format for m in model.modules() if isinstance(m, PackedLinear)} == {method.format}  # type: ignore[attr-defined]


def test_every_learnable_format_is_here() -> None:
    assert {pair(name)[0].format for name in METHODS} == set(LEARNABLE)


@pytest.mark.parametrize("name", METHODS)
def test_the_grid_has_the_values_of_the_bytes(name: str) -> None:
    packed, _ = pair(name)
    coded = coded_weight(packed)
    torch.testing.assert_close(coded.grid.values(coded.codes), packed.dequantize(), rtol=1e-6, atol=1e-7)
    assert (coded.codes >= 0).all() and (coded.codes <= coded.grid.levels).all()


@pytest.mark.parametrize("exponent", [0, -20])
@pytest.mark.parametrize("name", METHODS)
def test_at_first_nothing_has_changed(name: str, exponent: int) -> None:
    packed, linear = pair(name)
    packed = packed.scaled(exponent)
    small = nn.Linear(linear.in_features, linear.out_features, bias=False)
    small.weight = nn.Parameter(linear.weight.detach() * 2.0**exponent)
    layer = latent_linear(packed, small, torch.float32)
    weight = packed.dequantize()
    torch.testing.assert_close(layer(torch.eye(64)).T, weight, rtol=1e-5, atol=1e-6 * float(weight.abs().max()))
    again = repack(packed, layer)
    assert again.settings() == packed.settings() and again.nbytes == packed.nbytes
    assert all(torch.equal(again.state_dict()[field], tensor) for field, tensor in packed.state_dict().items())


@pytest.mark.parametrize("name", METHODS)
def test_latents_are_where_the_weights_were(name: str) -> None:
    packed, linear = pair(name)
    coded, layer = coded_weight(packed), latent_linear(packed, linear, torch.float32)
    position = coded.grid.position(linear.weight.detach())
    inside = (position - coded.codes).abs() < 0.45
    torch.testing.assert_close(layer.latent.detach()[inside], position[inside])
    assert inside.float().mean() > 0.3 and (layer.latent - coded.codes).abs().max() < 0.5


@pytest.mark.parametrize("name", METHODS)
def test_what_is_learned_is_packed(name: str) -> None:
    packed, linear = pair(name)
    layer = latent_linear(packed, linear, torch.float32)
    with torch.no_grad():
        for parameter in layer.parameters():
            parameter += (0.4 if parameter is layer.latent else 0.01) * torch.randn_like(parameter)
    again = repack(packed, layer)
    assert again.nbytes == packed.nbytes
    torch.testing.assert_close(again.dequantize(), layer(torch.eye(64)).T.detach(), rtol=2e-3, atol=2e-4)
    before, after = coded_weight(packed).codes, coded_weight(again).codes
    assert torch.equal(after, layer.codes()) and 0.01 < float((before != after).float().mean()) < 0.6
