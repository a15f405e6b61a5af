"""Tokens that do not fit a model, and models that are not finite, not known or quantized already."""

from __future__ import annotations

from collections.abc import Callable

import pytest
import torch
from torch import Tensor, nn
from transformers import GPT2Config, GPT2LMHeadModel, PreTrainedModel

from ptq161.driver.quantization import quantize
from ptq161.errors import UserError
from ptq161.methods.ptq161 import PTQ161
from ptq161.methods.rtn import RTN
from ptq161.models.architectures import decoder_blocks, quantized_linears

TinyModel = Callable[..., PreTrainedModel]
TOKENS = torch.randint(3, 256, (5, 48), generator=torch.Generator().manual_seed(4))
QUICK = PTQ161(epochs=1, batch_size=2)


@pytest.mark.parametrize(
    ("tokens", "message"),
    [
        (torch.zeros(1, 513, dtype=torch.long), r"calib\.seq_len=513: the model takes at most 512 tokens"),
        (torch.full((2, 8), 256), "outside the model's vocabulary of 256"),
        (torch.full((2, 8), -1), "outside the model's vocabulary of 256"),
        (torch.rand(2, 8), r"are of float32: use integers \[n_samples, seq_len\]"),
        (torch.zeros(8, dtype=torch.long), r"shape \[8\]: use integers"),
        (torch.zeros(1, 2, 8, dtype=torch.long), r"shape \[1, 2, 8\]: use integers"),
        (torch.zeros(0, 8, dtype=torch.long), r"shape \[0, 8\]: use integers"),
    ],
)
def test_tokens_that_do_not_fit(tokens: Tensor, message: str, tiny_model: TinyModel) -> None:
    model = tiny_model("llama")
    with pytest.raises(UserError, match=message) as caught:
        quantize(model, tokens, QUICK)
    assert "\n" not in str(caught.value)
    assert all(type(module) is nn.Linear for _, module in quantized_linears(model))


@pytest.mark.parametrize("value", [float("nan"), float("inf")])
@pytest.mark.parametrize("name", ["model.layers.1.mlp.up_proj.weight", "lm_head.weight", "model.norm.weight"])
def test_weights_that_are_not_finite(value: float, name: str, tiny_model: TinyModel) -> None:
    model = tiny_model("llama")
    model.get_parameter(name).data.view(-1)[3] = value
    with pytest.raises(UserError, match=f"weights are NaN or infinite in {name}"):
        quantize(model, TOKENS, QUICK)


@pytest.mark.parametrize("method", [QUICK, RTN(bits=4)])
@pytest.mark.parametrize("block", [0, 1])
def test_activations_that_are_not_finite_name_the_block(
    block: int, method: PTQ161 | RTN, tiny_model: TinyModel
) -> None:
    model = tiny_model("llama", n_blocks=3)
    decoder_blocks(model)[block].post_attention_layernorm.weight.data.fill_(1e38)
    with pytest.raises(UserError, match=rf"block {block} returns NaN or infinite activations"):
        quantize(model, TOKENS, method)


def test_unsupported_architectures() -> None:
    model = GPT2LMHeadModel(GPT2Config(vocab_size=256, n_positions=64, n_embd=16, n_layer=1, n_head=2))
    with pytest.raises(UserError, match=r"models of type 'gpt2' are not supported; supported are .*llama.*opt"):
        quantize(model, TOKENS, QUICK)


def test_models_that_are_already_quantized(tiny_model: TinyModel) -> None:
    model = quantize(tiny_model("llama"), TOKENS, QUICK)
    packed = {name: module for name, module in quantized_linears(model)}
    with pytest.raises(
        UserError, match=r"already quantized: its linear model\.layers\.0\.self_attn\.q_proj is a Packed"
    ):
        quantize(model, TOKENS, QUICK)
    assert {name: module for name, module in quantized_linears(model)} == packed
    other = tiny_model("llama")
    other.config.quantization_config = {"quant_method": "gptq"}
    with pytest.raises(UserError, match=r"already quantized \(by gptq\)"):
        quantize(other, TOKENS, QUICK)
