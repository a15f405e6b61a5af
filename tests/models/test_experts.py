"""Mixtures of experts: split into linears, quantized with few tokens or none, and fused again."""

from __future__ import annotations

import logging
import re
from collections.abc import Callable

import pytest
import torch
from transformers import PreTrainedModel

import ptq161
from ptq161.methods.base import Method
from ptq161.models.architectures import decoder_blocks, quantized_linears
from ptq161.models.experts import fuse_experts, split_experts
from ptq161.packed.model import densify, packed_linears
from tests.conftest import MIXTURES, every_method

TinyModel = Callable[..., PreTrainedModel]
TOKENS = torch.randint(3, 256, (4, 16), generator=torch.Generator().manual_seed(0))
METHODS = every_method(bits=4, epochs=2) | {"waterfill": ptq161.Waterfill(epochs=1, batch_size=2)}


@torch.no_grad()
def logits(model: PreTrainedModel) -> torch.Tensor:
    found: torch.Tensor = model(TOKENS).logits
    return found


@torch.no_grad()
def avoid(model: PreTrainedModel, expert: int) -> None:
    """Let the router of the last block choose an expert for no token."""
    router = decoder_blocks(model)[-1].mlp.gate.weight
    others = [i for i in range(len(router)) if i != expert]
    router[expert] = -1e3 * router[others].abs().sum(0)
    model.get_input_embeddings().weight.abs_()
    decoder_blocks(model)[-1].post_attention_layernorm.register_forward_hook(lambda *args: args[2].abs())


@pytest.mark.parametrize("architecture", MIXTURES)
def test_split_experts_compute_what_fused_ones_do(architecture: str, tiny_model: TinyModel) -> None:
    model = tiny_model(architecture)
    before = logits(model)
    names = {name: tensor.clone() for name, tensor in model.state_dict().items()}
    split_experts(model)
    torch.testing.assert_close(logits(model), before, rtol=1e-5, atol=1e-5)
    assert any(".experts.3.down_proj" in name for name, _ in quantized_linears(model))
    fuse_experts(model)
    assert torch.equal(logits(model), before)
    assert {name: True for name in names} == {
        name: torch.equal(tensor, names[name]) for name, tensor in model.state_dict().items()
    }


@pytest.mark.parametrize("architecture", MIXTURES)
def test_a_quantization_that_fails_leaves_the_model_as_it_was(architecture: str, tiny_model: TinyModel) -> None:
    model = tiny_model(architecture)
    before = list(model.state_dict())
    with pytest.raises(ptq161.errors.UserError):
        ptq161.quantize(model, TOKENS, ptq161.RTN(), salient_masks={})
    assert list(model.state_dict()) == before


@pytest.mark.parametrize("method", METHODS.values(), ids=METHODS)
@pytest.mark.parametrize("architecture", MIXTURES)
def test_an_expert_without_tokens(
    architecture: str, method: Method, tiny_model: TinyModel, caplog: pytest.LogCaptureFixture
) -> None:
    model = tiny_model(architecture)
    avoid(model, 2)
    n_tokens: dict[str, float] = {}

    def on_metric(name: str, value: float, /, **where: int | str) -> None:
        if name == "input_tokens":
            n_tokens[str(where["linear"])] = value

    before = logits(model)
    with caplog.at_level(logging.WARNING):
        ptq161.quantize(model, TOKENS, method, on_metric=on_metric)
    told = re.search(
        r"block 1: no calibration token reaches experts? ([\d, ]+); quantized from the weights", caplog.text
    )
    assert told is not None
    experts = told[1].split(", ")
    assert "2" in experts
    unseen = [name for name, n in n_tokens.items() if n == 0 and name.startswith("1.")]
    paths = ("gate_proj", "up_proj", "down_proj")
    assert unseen == [f"1.mlp.experts.{expert}.{path}" for expert in experts for path in paths]
    chosen = sum(n for name, n in n_tokens.items() if name.startswith("1.") and name.endswith("up_proj"))
    assert chosen == 2 * TOKENS.numel()
    assert len([name for name in packed_linears(model) if ".experts.2." in name]) >= 3
    after = logits(model)
    assert torch.isfinite(after).all()
    if method.nominal_bits() == 4:
        assert (after - before).norm() < 0.5 * before.norm()
    # The expert is worth about as much as the others when its turn comes.
    errors = {}
    for name, layer in packed_linears(model).items():
        if ".1.mlp.experts." in name and name.endswith("up_proj"):
            full = tiny_model(architecture)
            split_experts(full)
            weight = full.get_submodule(name).weight
            errors[name.split(".experts.")[1][0]] = float((layer.dequantize() - weight).norm() / weight.norm())
    assert errors["2"] < 1.5 * max(error for expert, error in errors.items() if expert != "2")


@pytest.mark.parametrize("architecture", MIXTURES)
def test_a_densified_mixture_is_one_of_transformers_again(architecture: str, tiny_model: TinyModel) -> None:
    model = tiny_model(architecture)
    names = set(model.state_dict())
    ptq161.quantize(model, TOKENS, ptq161.RTN(bits=4))
    after = logits(model)
    densify(model)
    fuse_experts(model)
    assert set(model.state_dict()) == names
    torch.testing.assert_close(logits(model), after, rtol=1e-5, atol=1e-5)
