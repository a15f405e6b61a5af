"""A low-rank update beside a packed weight: its sum, its bytes and its way through a checkpoint, on any format."""

from __future__ import annotations

import copy
import functools
from pathlib import Path

import pytest
import torch
from transformers import AutoModelForCausalLM, PreTrainedModel, PreTrainedTokenizerFast

import ptq161
from ptq161.errors import UserError
from ptq161.packed.adapted import AdaptedWeight
from ptq161.packed.linear import PackedLinear
from ptq161.packed.model import measure, packed_linears, sha256_of_packed
from ptq161.packed.weight import packed_weight_from
from tests.conftest import _tiny_model, every_method

TOKENS = torch.randint(3, 256, (2, 40), generator=torch.Generator().manual_seed(1))
METHODS = every_method(bits=3, epochs=0)
NAME = "model.layers.0.mlp.up_proj"


@functools.cache
def _packed(method: str) -> PreTrainedModel:
    return ptq161.quantize(_tiny_model("llama", n_blocks=1), TOKENS, METHODS[method])


def adapted(method: str) -> tuple[PreTrainedModel, AdaptedWeight]:
    model = copy.deepcopy(_packed(method))
    layer = packed_linears(model)[NAME]
    weight = AdaptedWeight.pack(layer.packed, torch.randn(4, layer.in_features), torch.randn(layer.out_features, 4))
    model.set_submodule(NAME, PackedLinear(weight, layer.bias).eval())
    return model, weight


@pytest.mark.parametrize("method", METHODS)
def test_it_comes_back_from_settings_and_tensors(method: str) -> None:
    model, weight = adapted(method)
    base = weight.base
    expected = base.dequantize() + weight.up.float() @ weight.down.float()
    assert torch.equal(weight.dequantize(), expected)
    assert weight.nbytes == base.nbytes + 2 * 4 * (base.in_features + base.out_features)
    again = packed_weight_from(weight.settings(), weight.state_dict())
    assert isinstance(again, AdaptedWeight) and type(again.base) is type(base)
    assert again.settings() == weight.settings() and torch.equal(again.dequantize(), expected)
    layer = packed_linears(model)[NAME]
    with torch.no_grad():
        layer.get_buffer("up").zero_()  # the module's buffers are what counts
    assert torch.equal(layer.dequantize(), base.dequantize())


@pytest.mark.parametrize("method", ["gse", "ptq161"])
def test_a_checkpoint_holds_and_applies_it(
    method: str, tiny_tokenizer: PreTrainedTokenizerFast, tmp_path: Path
) -> None:
    model, weight = adapted(method)
    before = _packed(method)
    assert measure(model).linear_bytes == measure(before).linear_bytes + weight.nbytes - weight.base.nbytes
    ptq161.save(model, tiny_tokenizer, tmp_path / "packed")
    loaded, _ = ptq161.load(tmp_path / "packed")
    assert sha256_of_packed(loaded) == sha256_of_packed(model) != sha256_of_packed(before)
    expected = model(TOKENS).logits
    assert torch.equal(loaded(TOKENS).logits, expected)
    assert not torch.allclose(before(TOKENS).logits, expected)
    assert torch.equal(AutoModelForCausalLM.from_pretrained(tmp_path / "packed")(TOKENS).logits, expected)
    ptq161.export(tmp_path / "packed", tmp_path / "dense")
    dense = AutoModelForCausalLM.from_pretrained(tmp_path / "dense")
    torch.testing.assert_close(dense(TOKENS).logits, expected)


def test_what_is_missing_is_told() -> None:
    _, weight = adapted("rtn")
    for name in ("down", "base_codes"):
        tensors = weight.state_dict()
        del tensors[name]
        with pytest.raises(UserError, match=f"{name.removeprefix('base_')} is missing in a weight of format"):
            packed_weight_from(weight.settings(), tensors)
