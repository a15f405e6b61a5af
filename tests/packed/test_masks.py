"""Salient channels that the caller gives: read back from a packed model, used again, and refused where wrong."""

from __future__ import annotations

import re
from collections.abc import Callable, Mapping

import pytest
import torch
from torch import Tensor
from transformers import PreTrainedModel

import ptq161
from ptq161.errors import UserError
from ptq161.methods.base import Method
from ptq161.methods.billm import BiLLM
from ptq161.methods.omniquant import OmniQuant
from ptq161.methods.ptq161 import PTQ161
from ptq161.methods.rtn import RTN
from ptq161.models.architectures import quantized_linears
from ptq161.packed.masks import salient_masks

TinyModel = Callable[..., PreTrainedModel]
TOKENS = torch.randint(3, 256, (3, 24), generator=torch.Generator().manual_seed(2))
QUICK = PTQ161(epochs=1, batch_size=3)


def random_masks(model: PreTrainedModel) -> dict[str, Tensor]:
    """A different mask for each linear, also for those that share an input."""
    generator = torch.Generator().manual_seed(5)
    return {
        name: torch.rand(module.in_features, generator=generator) < 0.3 for name, module in quantized_linears(model)
    }


@pytest.mark.parametrize("architecture", ["llama", "opt"])
@pytest.mark.parametrize("block_size", [1, 2])
def test_given_masks_come_back(architecture: str, block_size: int, tiny_model: TinyModel) -> None:
    model = tiny_model(architecture, n_blocks=3)
    given = random_masks(model)
    ptq161.quantize(model, TOKENS, PTQ161(epochs=1, batch_size=3, block_size=block_size), salient_masks=given)
    found = salient_masks(model)
    assert found.keys() == given.keys()
    assert all(torch.equal(found[name], mask) for name, mask in given.items())


def test_the_masks_of_a_first_pass_give_the_same_model(tiny_model: TinyModel) -> None:
    one = ptq161.quantize(tiny_model("llama"), TOKENS, QUICK)
    masks = salient_masks(one)
    other = ptq161.quantize(tiny_model("llama"), TOKENS, QUICK, salient_masks=masks)
    assert all(torch.equal(tensor, other.state_dict()[name]) for name, tensor in one.state_dict().items())


def test_the_masks_of_another_pass_are_kept_where_the_method_would_choose_others(tiny_model: TinyModel) -> None:
    masks = salient_masks(ptq161.quantize(tiny_model("llama"), TOKENS, QUICK))
    fresh = salient_masks(ptq161.quantize(tiny_model("llama", seed=1), TOKENS, QUICK))
    kept = salient_masks(ptq161.quantize(tiny_model("llama", seed=1), TOKENS, QUICK, salient_masks=masks))
    assert any(not torch.equal(masks[name], mask) for name, mask in fresh.items())
    assert all(torch.equal(masks[name], mask) for name, mask in kept.items())


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (lambda m: m.pop("1.mlp.up_proj"), r"1\.mlp\.up_proj has no mask; give one for each quantized linear"),
        (lambda m: m.update({"9.mlp.up_proj": m["1.mlp.up_proj"]}), r"9\.mlp\.up_proj is no linear that is quantized"),
        (
            lambda m: m.update({"0.mlp.up_proj": torch.zeros(65, dtype=torch.bool)}),
            r"the mask of 0\.mlp\.up_proj is bool \[65\]; use bool \[64\]",
        ),
        (
            lambda m: m.update({"0.mlp.up_proj": torch.zeros(64)}),
            r"the mask of 0\.mlp\.up_proj is float32 \[64\]; use bool \[64\]",
        ),
        (dict.clear, r"0\.mlp\.down_proj has no mask"),
    ],
)
def test_masks_that_do_not_fit_the_model(
    change: Callable[[dict[str, Tensor]], object], message: str, tiny_model: TinyModel
) -> None:
    model = tiny_model("llama")
    masks = random_masks(model)
    change(masks)
    refused(model, QUICK, masks, message)


@pytest.mark.parametrize("method", [RTN(), BiLLM(), OmniQuant()])
def test_methods_without_salient_channels_refuse_masks(method: Method, tiny_model: TinyModel) -> None:
    model = tiny_model("llama")
    refused(model, method, random_masks(model), f"{type(method).__name__} has no salient channels")


def refused(model: PreTrainedModel, method: Method, masks: Mapping[str, Tensor], message: str) -> None:
    before = {name: tensor.clone() for name, tensor in model.state_dict().items()}
    with pytest.raises(UserError, match=f"^salient_masks: {message}") as caught:
        ptq161.quantize(model, TOKENS, method, salient_masks=masks)
    assert "\n" not in str(caught.value)
    assert all(torch.equal(tensor, model.state_dict()[name]) for name, tensor in before.items())


def test_a_model_without_masks_has_none_to_read(tiny_model: TinyModel) -> None:
    with pytest.raises(UserError, match=re.escape("its linear 0.self_attn.q_proj is not packed")):
        salient_masks(tiny_model("llama"))
    rounded = ptq161.quantize(tiny_model("llama"), TOKENS, RTN())
    with pytest.raises(UserError, match=re.escape("its linear 0.self_attn.q_proj is stored as 'uniform'")):
        salient_masks(rounded)
