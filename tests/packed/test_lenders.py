"""Linears that share codebooks, of which one stores them: counted once, stored once, changed and moved together."""

from __future__ import annotations

import copy
import json
import math
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file
from torch import Tensor
from transformers import AutoModelForCausalLM, PreTrainedModel, PreTrainedTokenizerFast

import ptq161
from ptq161.errors import UserError
from ptq161.files.checksums import SUMS
from ptq161.finetune.adapters import tune
from ptq161.finetune.training import distil
from ptq161.packed.linear import PackedLinear
from ptq161.packed.model import densify, measure, packed_linears
from tests.conftest import _tiny_model
from tests.finetune.conftest import full_model, tokens
from tests.finetune.conftest import short as short_distillation
from tests.finetune.test_adapters import short as short_tuning

LINEARS = {"input": {"k_proj", "v_proj", "up_proj"}, "block": {"k_proj", "v_proj", "o_proj", "gate_proj", "up_proj"}}
LINEARS["block"].add("down_proj")
SHARED = {"centroids", "residual_centroids"}


def method(per: str, **changes: int) -> ptq161.VPTQ:
    settings: dict[str, Any] = {"vector_length": 2, "centroids": 16, "residual_centroids": 4, "iterations": 5}
    return ptq161.VPTQ(codebook_per=per, row_scales=True, batch_size=2, **settings | changes)


def quantized(per: str = "input") -> PreTrainedModel:
    return ptq161.quantize(_tiny_model("llama"), tokens()[:4], method(per))


def logits(model: PreTrainedModel) -> Tensor:
    with torch.no_grad():
        result: Tensor = model(tokens()[:2], use_cache=False).logits
    return result


def borrowers(model: PreTrainedModel) -> dict[str, PackedLinear]:
    return {name: layer for name, layer in packed_linears(model).items() if layer.packed.lender is not None}


@pytest.mark.parametrize("per", LINEARS)
def test_one_linear_stores_what_others_share(per: str) -> None:
    model = quantized(per)
    layers = packed_linears(model)
    assert {name.rpartition(".")[2] for name in borrowers(model)} == LINEARS[per]
    for name, layer in borrowers(model).items():
        lender = layers[f"model.layers.{layer.packed.lender}"]
        assert name.split(".")[2] == str(layer.packed.lender).split(".")[0]
        assert not SHARED & set(layer.state_dict()) and set(lender.state_dict()) >= SHARED
        assert all(layer.packed.tensors()[field] is lender.get_buffer(field) for field in SHARED)
        assert layer.packed.nbytes == sum(t.numel() * t.element_size() for t in layer.state_dict().values())


@pytest.mark.parametrize("per", LINEARS)
def test_what_is_shared_is_counted_once(per: str) -> None:
    alone, model = quantized("linear"), quantized(per)
    codebooks = 2 * (16 + 4) * 2  # float16, vectors of 2 weights
    assert measure(alone).linear_bytes - measure(model).linear_bytes == codebooks * len(borrowers(model))
    assert measure(alone).other_bytes == measure(model).other_bytes


@pytest.mark.parametrize("per", LINEARS)
def test_a_checkpoint_and_back(per: str, tmp_path: Path, tiny_tokenizer: PreTrainedTokenizerFast) -> None:
    model = quantized(per)
    file = ptq161.save(model, tiny_tokenizer, tmp_path / "packed")
    stored = load_file(file)
    assert set(stored) == set(model.state_dict())
    for opened in (ptq161.load(tmp_path / "packed")[0], AutoModelForCausalLM.from_pretrained(tmp_path / "packed")):
        assert torch.equal(logits(opened), logits(model))
        assert set(borrowers(opened)) == set(borrowers(model))
        layer = opened.model.layers[1].self_attn
        assert layer.v_proj.packed.tensors()["centroids"] is layer.q_proj.centroids
        again = ptq161.save(opened, tiny_tokenizer, tmp_path / type(opened).__name__, overwrite=True)
        assert again.read_bytes() == file.read_bytes()


def test_a_copy_shares_among_itself_and_a_change_reaches_all() -> None:
    model = quantized()
    other = copy.deepcopy(model)
    attention = other.model.layers[0].self_attn
    attention.q_proj.centroids.zero_()
    attention.q_proj.residual_centroids.zero_()
    assert not attention.v_proj.dequantize().any()
    assert model.model.layers[0].self_attn.v_proj.dequantize().any()


def test_a_move_takes_what_is_shared_along() -> None:
    model = quantized()
    for layer in borrowers(model.to("meta")).values():
        assert {tensor.device.type for tensor in layer.packed.tensors().values()} == {"meta"}


def test_a_dense_model_has_the_same_weights() -> None:
    model = quantized("block")
    expected = {name: layer.dequantize() for name, layer in packed_linears(model).items()}
    densify(model)
    assert all(torch.equal(model.get_submodule(name).weight, weight) for name, weight in expected.items())


@pytest.mark.parametrize("per", LINEARS)
def test_distillation_of_scales_trains_them_together(per: str, tmp_path: Path) -> None:
    before, full = quantized(per), full_model()
    after = distil(copy.deepcopy(before), full, tokens(), short_distillation(update="scales"))
    assert measure(after) == measure(before) and set(borrowers(after)) == set(borrowers(before))
    for name, layer in borrowers(after).items():
        lender = after.get_submodule(f"model.layers.{layer.packed.lender}")
        assert layer.packed.tensors()["centroids"] is lender.get_buffer("centroids")
        assert not torch.equal(lender.get_buffer("centroids"), before.get_submodule(name).packed.centroids)
    ptq161.save(after, None, tmp_path / "packed")
    opened = AutoModelForCausalLM.from_pretrained(tmp_path / "packed")
    assert torch.equal(logits(opened), logits(after))


@pytest.mark.parametrize("target", ["q", "v"])
def test_an_adapter_beside_the_lender_or_beside_a_borrower(
    target: str, tmp_path: Path, tiny_tokenizer: PreTrainedTokenizerFast
) -> None:
    before = quantized()
    tune(after := copy.deepcopy(before), tokens(), short_tuning(targets=[target]))
    layer = after.model.layers[0].self_attn
    assert layer.q_proj.packed.format == ("adapted" if target == "q" else "vector")
    assert torch.equal(layer.k_proj.dequantize(), before.model.layers[0].self_attn.k_proj.dequantize())
    adapters = measure(after).linear_bytes - measure(before).linear_bytes
    assert adapters == sum(
        2 * 8 * (x.in_features + x.out_features) for x in packed_linears(after).values() if x.packed.format == "adapted"
    )
    ptq161.save(after, tiny_tokenizer, tmp_path / "packed")
    for opened in (ptq161.load(tmp_path / "packed")[0], AutoModelForCausalLM.from_pretrained(tmp_path / "packed")):
        assert torch.equal(logits(opened), logits(after))


def test_a_lender_that_is_not_there(tmp_path: Path, tiny_tokenizer: PreTrainedTokenizerFast) -> None:
    ptq161.save(quantized(), tiny_tokenizer, tmp_path / "packed")
    file = tmp_path / "packed" / "config.json"
    config = json.loads(file.read_text())
    linears = config["quantization_config"]["linears"]
    linears["model.layers.1.self_attn.v_proj"]["lender"] = "7.self_attn.q_proj"
    file.write_text(json.dumps(config))
    (tmp_path / "packed" / SUMS).unlink()
    with pytest.raises(UserError, match=r"v_proj shares tensors of 7\.self_attn\.q_proj, which is not there"):
        ptq161.load(tmp_path / "packed")


@pytest.mark.parametrize("per", LINEARS)
def test_the_refit_trains_them_together(per: str) -> None:
    losses: list[float] = []

    def on_metric(name: str, value: float, /, **where: int | str) -> None:
        if name == "loss" and where["block"] == 0:
            losses.append(value)

    settings = {"refit_steps": 12}
    model = ptq161.quantize(_tiny_model("llama"), tokens()[:4], method(per, **settings), on_metric=on_metric)
    assert losses[-1] < losses[0] and math.isfinite(losses[-1])
    before = quantized(per)
    first, again = (m.model.layers[0].self_attn for m in (before, model))
    assert torch.equal(first.q_proj.indices, again.q_proj.indices)
    assert not torch.equal(first.q_proj.centroids, again.q_proj.centroids)
    assert again.v_proj.packed.tensors()["centroids"] is again.q_proj.centroids
