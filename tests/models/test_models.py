"""The table of architectures, and loading from local folders."""

from __future__ import annotations

import itertools
import json
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file
from torch import nn
from transformers import GPT2Config, GPT2LMHeadModel, PreTrainedModel

import ptq161
from ptq161.errors import UserError
from ptq161.methods.rtn import RTN
from ptq161.models.architectures import (
    architecture_of,
    decoder_blocks,
    input_groups,
    keep_first_blocks,
    max_seq_len,
    quantized_linears,
)
from ptq161.models.checks import check_quantizable
from ptq161.models.experts import split_experts
from ptq161.models.loading import is_packed_folder, load_model
from ptq161.models.settings import ModelConfig
from tests.conftest import MAX_LENGTH, TINY

TinyModel = Callable[..., PreTrainedModel]
TOKENS = torch.randint(3, 256, (2, 40), generator=torch.Generator().manual_seed(0))


@pytest.fixture
def folder(tiny_model_dir: Path, tmp_path: Path) -> Path:
    """A copy of the saved tiny Llama, to be changed."""
    return Path(shutil.copytree(tiny_model_dir, tmp_path / "model"))


def local(folder: Path, **settings: Any) -> ModelConfig:
    return ModelConfig(name="tiny", path=str(folder), **settings)


def change_config(folder: Path, **values: Any) -> None:
    file = folder / "config.json"
    file.write_text(json.dumps(json.loads(file.read_text()) | values))


def one_sentence(caught: pytest.ExceptionInfo[UserError]) -> bool:
    text = str(caught.value)
    return "\n" not in text and text.endswith(".") and not text.endswith("..")


# the table


@pytest.mark.parametrize("architecture", TINY)
def test_the_table_names_every_linear_of_a_block(architecture: str, tiny_model: TinyModel) -> None:
    model = tiny_model(architecture)
    split_experts(model)
    found = dict(quantized_linears(model))
    for i, block in enumerate(decoder_blocks(model)):
        linears = {f"{i}.{name}": module for name, module in block.named_modules() if isinstance(module, nn.Linear)}
        assert {name: module for name, module in found.items() if name.startswith(f"{i}.")} == linears
    assert len(found) > 10


@pytest.mark.parametrize("architecture", TINY)
def test_groups_share_their_input_and_come_in_its_order(architecture: str, tiny_model: TinyModel) -> None:
    model = tiny_model(architecture)
    split_experts(model)
    order: list[str] = []
    inputs: dict[str, torch.Tensor] = {}
    for name, module in quantized_linears(model):
        module.register_forward_pre_hook(
            lambda _, args, name=name: (order.append(name), inputs.__setitem__(name, args[0]))[0]
        )
    with torch.no_grad():
        model(TOKENS)
    groups = [
        [f"{i}.{path}" for path in group]
        for i, block in enumerate(decoder_blocks(model))
        for group in input_groups(model, block)
    ]
    ranks = [[order.index(name) for name in group] for group in groups]
    assert all(max(before) < min(after) for before, after in itertools.pairwise(ranks))
    for group in groups:
        assert all(torch.equal(inputs[name], inputs[group[0]]) for name in group)
    leaders = [inputs[group[0]] for group in groups]
    assert not any(a.shape == b.shape and torch.equal(a, b) for i, a in enumerate(leaders) for b in leaders[:i])


def test_unsupported_architectures() -> None:
    model = GPT2LMHeadModel(GPT2Config(vocab_size=32, n_positions=16, n_embd=8, n_layer=1, n_head=1))
    for question in (architecture_of, decoder_blocks, check_quantizable):
        with pytest.raises(
            UserError, match=r"models of type 'gpt2' are not supported; supported are Dream, gemma2"
        ) as caught:
            question(model)
        assert one_sentence(caught)


@pytest.mark.parametrize("architecture", ["llama", "gemma3_text", "opt"])
def test_keeping_the_first_blocks(architecture: str, tiny_model: TinyModel) -> None:
    model, whole = tiny_model(architecture, n_blocks=3), tiny_model(architecture, n_blocks=3)
    keep_first_blocks(model, 2)
    assert len(decoder_blocks(model)) == model.config.num_hidden_layers == 2
    assert len(getattr(model.config, "layer_types", None) or "12") == 2
    with torch.no_grad():
        expected = whole(TOKENS, output_hidden_states=True, use_cache=False).hidden_states[2]
        hidden = model(TOKENS, output_hidden_states=True, use_cache=False).hidden_states[1]
        before = whole(TOKENS, output_hidden_states=True, use_cache=False).hidden_states[1]
        assert torch.isfinite(model(TOKENS).logits).all()
    assert torch.equal(hidden, before) and not torch.equal(hidden, expected)


def test_max_seq_len(tiny_model: TinyModel) -> None:
    assert all(max_seq_len(tiny_model(name).config) == MAX_LENGTH for name in TINY)


@pytest.mark.parametrize("value", [float("nan"), float("-inf")])
def test_weights_that_are_not_finite_are_named(value: float, tiny_model: TinyModel) -> None:
    model = tiny_model("opt")
    check_quantizable(model)
    model.model.decoder.layers[1].fc1.bias.data[2] = value
    with pytest.raises(UserError, match=r"NaN or infinite in model\.decoder\.layers\.1\.fc1\.bias"):
        check_quantizable(model)


# loading


def test_loading_a_folder(tiny_model_dir: Path, tiny_model: TinyModel) -> None:
    model, tokenizer = load_model(local(tiny_model_dir))
    assert not model.training and model.config.use_cache is True
    assert tokenizer("abc")["input_ids"]
    for name, parameter in tiny_model("llama").named_parameters():
        assert torch.equal(model.get_parameter(name), parameter)


@pytest.mark.parametrize("tied", [False, True])
@pytest.mark.parametrize("architecture", TINY)
def test_every_architecture_loads_whole(architecture: str, tied: bool, folder: Path, tiny_model: TinyModel) -> None:
    """A tied head is in no file and yet not missing."""
    original = tiny_model(architecture)
    original.config.tie_word_embeddings = tied
    if tied:
        original.tie_weights()
    else:
        original.lm_head.weight = nn.Parameter(original.lm_head.weight.detach().clone())
    original.save_pretrained(folder)
    model, _ = load_model(local(folder))
    with torch.no_grad():
        assert torch.equal(model(TOKENS).logits, original(TOKENS).logits)


def test_the_checkpoints_own_dtype_is_kept(folder: Path, tiny_model: TinyModel) -> None:
    tiny_model("llama").to(torch.bfloat16).save_pretrained(folder)
    model, _ = load_model(local(folder))
    assert {p.dtype for p in model.parameters()} == {torch.bfloat16}
    assert model.model.rotary_emb.inv_freq.dtype == torch.float32


def test_only_the_first_blocks(tiny_model_dir: Path) -> None:
    model, _ = load_model(local(tiny_model_dir, n_blocks=1))
    assert len(decoder_blocks(model)) == model.config.num_hidden_layers == 1


def test_a_missing_folder(tmp_path: Path) -> None:
    for path in (tmp_path / "missing", tmp_path):
        with pytest.raises(UserError, match=r"model\.path=.*: no config\.json is there; give") as caught:
            load_model(local(path))
        assert one_sentence(caught) and str(path) in str(caught.value)


def test_an_unsupported_folder(folder: Path) -> None:
    change_config(folder, model_type="gpt2")
    with pytest.raises(UserError, match="models of type 'gpt2' are not supported") as caught:
        load_model(local(folder))
    assert one_sentence(caught)


@pytest.mark.parametrize("content", ["{", "[]", "", '{"model_type": "no such model"}', "{}"])
def test_a_broken_config(content: str, folder: Path) -> None:
    (folder / "config.json").write_text(content)
    with pytest.raises(UserError) as caught:
        load_model(local(folder))
    assert one_sentence(caught) and str(folder) in str(caught.value)


@pytest.mark.parametrize("method", ["gptq", "bitsandbytes", "ptq161", "awq"])
def test_a_quantized_folder(method: str, folder: Path) -> None:
    change_config(folder, quantization_config={"quant_method": method, "bits": 4})
    with pytest.raises(UserError, match=rf"already quantized \(by {method}\); use the full-precision model") as caught:
        load_model(local(folder))
    assert one_sentence(caught)


@pytest.mark.parametrize("share", [0, 0.5, 0.99])
def test_truncated_weights(share: float, folder: Path) -> None:
    file = folder / "model.safetensors"
    content = file.read_bytes()
    file.write_bytes(content[: int(share * len(content))])
    with pytest.raises(UserError, match=r"model .* cannot be loaded: ") as caught:
        load_model(local(folder))
    assert one_sentence(caught)


def test_missing_weights(folder: Path) -> None:
    file = folder / "model.safetensors"
    tensors = load_file(file)
    file.unlink()
    with pytest.raises(UserError, match=r"model .* cannot be loaded: ") as caught:
        load_model(local(folder))
    assert one_sentence(caught)
    del tensors["model.layers.1.mlp.up_proj.weight"]
    save_file(tensors, file, metadata={"format": "pt"})
    with pytest.raises(UserError, match=r"cannot be loaded: .*model\.layers\.1\.mlp\.up_proj\.weight") as caught:
        load_model(local(folder))
    assert one_sentence(caught)


def test_weights_of_another_shape(folder: Path) -> None:
    change_config(folder, intermediate_size=128)
    with pytest.raises(UserError, match=r"tensor model\.layers\.0\.mlp\.down_proj\.weight .* another shape") as caught:
        load_model(local(folder))
    assert one_sentence(caught)


def test_a_missing_tokenizer(folder: Path) -> None:
    for file in folder.glob("tokenizer*"):
        file.unlink()
    with pytest.raises(UserError, match="cannot be loaded: ") as caught:
        load_model(local(folder))
    assert one_sentence(caught)


def test_packed_folders_are_known(
    tiny_model_dir: Path, tiny_model: TinyModel, tiny_tokenizer: Any, tmp_path: Path
) -> None:
    ptq161.save(ptq161.quantize(tiny_model("llama"), TOKENS, RTN(bits=4)), tiny_tokenizer, tmp_path)
    assert is_packed_folder(tmp_path) and is_packed_folder(str(tmp_path))
    assert not is_packed_folder(tiny_model_dir)
    assert not is_packed_folder(tmp_path / "missing")
    with pytest.raises(UserError, match=r"already quantized \(by ptq161\)"):
        load_model(local(tmp_path))
