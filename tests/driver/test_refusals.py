"""What is no model, no method, no device and no tokens: one sentence each, and the model is left as it was."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.nn.utils import parametrizations, prune
from transformers import PretrainedConfig, PreTrainedModel

import ptq161
from ptq161.errors import UserError
from ptq161.models.architectures import max_seq_len, quantized_linears

TinyModel = Callable[..., PreTrainedModel]
TOKENS = torch.randint(3, 256, (3, 16), generator=torch.Generator().manual_seed(0))
RTN = ptq161.RTN(bits=3)


@pytest.mark.parametrize(
    ("tokens", "sentence"),
    [
        ([[1, 2, 3], [4, 5]], "have lengths from 2 to 3; cut them to one"),
        ("a text", "are text; apply the model's tokenizer first"),
        (["a text"], "are text"),
        ([{"text": "a"}], "have no input_ids but text"),
        ({"input_ids": TOKENS, "attention_mask": TOKENS * 0}, r"are padded \(zeros in attention_mask\)"),
        (None, "are a NoneType"),
        (7, "are a int"),
        ([], "are empty"),
        ([[]], "use integers"),
        (TOKENS.float(), "are of float32"),
        ([[1.5, 2.0]], "hold a float"),
        (TOKENS > 9, "are of bool"),
        (TOKENS[0], r"have shape \[16\]"),
        (TOKENS.tolist()[0], r"have shape \[16\]"),
    ],
)
def test_tokens_that_are_none(tokens: Any, sentence: str, tiny_model: TinyModel) -> None:
    model = tiny_model("llama")
    with pytest.raises(UserError, match=f"calibration tokens .*{sentence}") as caught:
        ptq161.quantize(model, tokens, RTN)
    assert "\n" not in str(caught.value)
    assert all(type(module) is nn.Linear for _, module in quantized_linears(model))


def peft_model(model: PreTrainedModel) -> Any:
    from peft import LoraConfig, get_peft_model

    return get_peft_model(model, LoraConfig(target_modules=["q_proj"]))


def adapted(model: PreTrainedModel) -> Any:
    peft_model(model)
    return model


def weight_norm(model: PreTrainedModel) -> Any:
    parametrizations.weight_norm(model.model.layers[1].mlp.up_proj)
    return model


def pruned(model: PreTrainedModel) -> Any:
    prune.l1_unstructured(model.model.layers[1].mlp.up_proj, "weight", 0.5)
    return model


def hooked(model: PreTrainedModel) -> Any:
    model.model.layers[1].mlp.up_proj.register_forward_hook(lambda *_: None)
    return model


def on_meta(model: PreTrainedModel) -> Any:
    return model.to("meta")


def dispatched(model: PreTrainedModel) -> Any:
    from accelerate import dispatch_model

    return dispatch_model(model, {"": "cpu"}, force_hooks=True)


def integers(model: PreTrainedModel) -> Any:
    linear = model.model.layers[0].mlp.up_proj
    linear.weight = nn.Parameter(linear.weight.to(torch.int8), requires_grad=False)
    return model


@pytest.mark.parametrize(
    ("change", "sentence"),
    [
        (peft_model, r"a PeftModel is a model with an adapter: merge it first, with merge_and_unload\(\)\."),
        (adapted, r"carries an adapter \(a Linear at .*q_proj\): merge it first"),
        (weight_norm, r"model\.layers\.1\.mlp\.up_proj is computed from others"),
        (pruned, r"model\.layers\.1\.mlp\.up_proj is computed from others"),
        (hooked, r"model\.layers\.1\.mlp\.up_proj has forward hooks, which would be lost"),
        (on_meta, r"not in memory \(model\.embed_tokens\.weight is on the meta device\)"),
        (dispatched, "spread over devices"),
        (integers, "of int8: use a dense model"),
        (nn.DataParallel, r"the model is wrapped \(a DataParallel\): pass its \.module"),
        (torch.compile, r"the model is compiled \(a OptimizedModule\): pass its \._orig_mod"),
        (lambda model: (model, None), r"pass its first item, if it is \(model, tokenizer\)"),
        (lambda _: "folder/of/model", "'folder/of/model' is no model: load it first"),
        (lambda _: Path("folder"), "'folder' is no model: load it first"),
        (lambda _: None, "a NoneType is no transformers model"),
        (lambda model: model.state_dict(), "is no transformers model"),
        (lambda _: nn.Linear(4, 4), "a Linear is no transformers model"),
    ],
)
def test_models_that_are_none(change: Callable[[PreTrainedModel], Any], sentence: str, tiny_model: TinyModel) -> None:
    given = change(tiny_model("llama"))
    with pytest.raises(UserError, match=sentence) as caught:
        ptq161.quantize(given, TOKENS, RTN)
    assert "\n" not in str(caught.value)


@pytest.mark.parametrize(
    ("method", "sentence"),
    [
        ("rtn", r"'rtn' is no method: pass an instance, such as ptq161\.RTN\(bits=4\)"),
        (ptq161.RTN, r"the class RTN is no method: pass an instance"),
        (None, r"None is no method"),
        ({"bits": 4}, r"is no method"),
    ],
)
def test_methods_that_are_none(method: Any, sentence: str, tiny_model: TinyModel) -> None:
    with pytest.raises(UserError, match=sentence):
        ptq161.quantize(tiny_model("llama"), TOKENS, method)


@pytest.mark.parametrize("device", ["tpu", "", "cuda:99", "meta"])
def test_devices_that_are_none(device: str, tiny_model: TinyModel) -> None:
    with pytest.raises(UserError, match=f"device={device}: "):
        ptq161.quantize(tiny_model("llama"), TOKENS, RTN, device=device)


def test_a_sequence_longer_than_the_models(tiny_model: TinyModel) -> None:
    tokens: Tensor = TOKENS.repeat(1, 33)
    with pytest.raises(UserError, match=r"calib\.seq_len=528: the model takes at most 512 tokens"):
        ptq161.quantize(tiny_model("llama"), tokens, RTN)


def test_a_config_without_a_limit() -> None:
    assert max_seq_len(PretrainedConfig()) is None
