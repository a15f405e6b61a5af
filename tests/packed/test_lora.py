"""PEFT's LoRA on packed linears, of a model that was quantized here or opened by transformers."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from peft import LoraConfig, PeftModel, get_peft_model
from transformers import AutoModelForCausalLM, PreTrainedModel

import ptq161
from ptq161.errors import UserError
from ptq161.packed.lora import PackedLora
from ptq161.packed.model import packed_linears, sha256_of_packed
from tests.conftest import every_method

TinyModel = Callable[..., PreTrainedModel]
TOKENS = torch.randint(3, 256, (2, 32), generator=torch.Generator().manual_seed(4))
METHODS = every_method(bits=2, epochs=1)


def adapted(model: PreTrainedModel) -> PeftModel:
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        found: PeftModel = get_peft_model(model, LoraConfig(r=4, target_modules=["q_proj", "down_proj"]))
    return found


def logits(model: torch.nn.Module) -> torch.Tensor:
    with torch.no_grad():
        found: torch.Tensor = model(TOKENS).logits
    return found


@pytest.mark.parametrize("name", METHODS)
def test_adapters_alone_are_trained(name: str, tiny_model: TinyModel) -> None:
    packed = ptq161.quantize(tiny_model("llama"), TOKENS, METHODS[name])
    stored, before = sha256_of_packed(packed), logits(packed)
    model = adapted(packed)
    assert torch.equal(logits(model), before)  # B begins with zeros
    trained = [parameter for parameter in model.parameters() if parameter.requires_grad]
    optimizer, losses = torch.optim.Adam(trained, lr=1e-2), []
    for _ in range(5):
        loss = model(TOKENS, labels=TOKENS).loss
        loss.backward()
        optimizer.step()
        optimizer.zero_grad()
        losses.append(float(loss.detach()))
    assert losses[-1] < losses[0]
    with model.disable_adapter():
        assert torch.equal(logits(model), before)
    assert sha256_of_packed(model.unload()) == stored


def test_saved_adapters_are_loaded_onto_a_packed_folder(tiny_model: TinyModel, tmp_path: Path) -> None:
    packed = ptq161.quantize(tiny_model("llama"), TOKENS, ptq161.RTN(bits=2))
    ptq161.save(packed, None, tmp_path / "packed")
    model = adapted(packed)
    for name, parameter in model.named_parameters():
        if "lora_B" in name:
            torch.nn.init.ones_(parameter)
    model.save_pretrained(tmp_path / "adapter")
    again = PeftModel.from_pretrained(AutoModelForCausalLM.from_pretrained(tmp_path / "packed"), tmp_path / "adapter")
    assert torch.equal(logits(again), logits(model))
    layers = [module for module in again.modules() if isinstance(module, PackedLora)]
    assert len(layers) == 2 * packed.config.num_hidden_layers and len(packed_linears(again)) == len(
        packed_linears(model)
    )


def test_an_adapter_is_not_merged_into_packed_bytes(tiny_model: TinyModel) -> None:
    model = adapted(ptq161.quantize(tiny_model("llama"), TOKENS, ptq161.RTN(bits=2)))
    with pytest.raises(UserError, match="dequantize"):
        model.merge_and_unload()
    with pytest.raises(UserError, match="dequantize"):
        model.merge_adapter()
