"""Embeddings that are packed, tied and untied: looked up, multiplied, stored, opened and made dense again."""

from __future__ import annotations

import copy
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from peft import LoraConfig, get_peft_model
from safetensors.torch import load_file
from torch import Tensor, nn
from transformers import AutoModelForCausalLM, PreTrainedModel, PreTrainedTokenizerFast

import ptq161
from ptq161.errors import UserError
from ptq161.files.strict_json import decode_json
from ptq161.finetune.checks import check_dense_embeddings
from ptq161.methods.rtn import quantize_rows, quantize_weight
from ptq161.models.loading import load_weights
from ptq161.models.settings import ModelConfig
from ptq161.packed.checkpoint import load
from ptq161.packed.embedding import PackedEmbedding, embedding_bits, packed_embeddings
from ptq161.packed.layout import WEIGHTS_FILE
from ptq161.packed.linear import PackedHead, dense_products, int8_activations
from ptq161.packed.model import cast_rest, densify, measure, packed_linears, sha256_of_packed
from tests.conftest import TINY

TOKENS = torch.randint(3, 256, (2, 32), generator=torch.Generator().manual_seed(4))


def made(
    tiny_model: Callable[..., PreTrainedModel], architecture: str, bits: int, *, tied: bool | None = None
) -> PreTrainedModel:
    model = tiny_model(architecture)
    if tied is not None:
        model.config.tie_word_embeddings = tied
        model.lm_head.weight = nn.Parameter(model.lm_head.weight.detach().clone() + (0 if tied else 1))
        model.all_tied_weights_keys = model.get_expanded_tied_weights_keys(all_submodels=True)
        model.tie_weights()
    model = ptq161.quantize(model, TOKENS, ptq161.RTN(bits=2))
    return ptq161.quantize_embeddings(model, bits)


def is_tied(model: PreTrainedModel) -> bool:
    return len(packed_embeddings(model)) == 1


@torch.no_grad()
def logits(model: PreTrainedModel, tokens: Tensor = TOKENS) -> Tensor:
    return model(tokens).logits


def assert_same(model: PreTrainedModel, other: PreTrainedModel) -> None:
    mine, others = model.state_dict(), other.state_dict()
    assert mine.keys() == others.keys() and sha256_of_packed(model) == sha256_of_packed(other)
    assert torch.equal(logits(model), logits(other))


@pytest.mark.parametrize("architecture", TINY)
def test_every_architecture_is_stored_opened_and_made_dense(
    architecture: str,
    tiny_model: Callable[..., PreTrainedModel],
    tiny_tokenizer: PreTrainedTokenizerFast,
    tmp_path: Path,
) -> None:
    bits = 4 if TINY.index(architecture) % 2 else 8
    model = made(tiny_model, architecture, bits)
    with dense_products(model):  # an expert may see few rows
        before = logits(model)
    file = ptq161.save(model, tiny_tokenizer, tmp_path / "packed")
    loaded, _ = ptq161.load(tmp_path / "packed")
    opened = type(model).from_pretrained(tmp_path / "packed")
    for again in (loaded, opened):
        assert_same(again, model)
        assert embedding_bits(again) == bits and is_tied(again) == is_tied(model)
        again.save_pretrained(tmp_path / f"again_{again is opened}")
        assert (tmp_path / f"again_{again is opened}" / WEIGHTS_FILE).read_bytes() == file.read_bytes()
    dense = opened.dequantize()
    assert embedding_bits(dense) is None and isinstance(dense.get_input_embeddings(), nn.Embedding)
    assert torch.equal(logits(dense), before)
    exported = type(model).from_pretrained(ptq161.export(tmp_path / "packed", tmp_path / "dense"))
    assert torch.equal(logits(exported), before)


@pytest.mark.parametrize("bits", [8, 4])
@pytest.mark.parametrize("tied", [True, False])
def test_tied_embeddings_are_one_tensor_and_others_two(
    tied: bool,
    bits: int,
    tiny_model: Callable[..., PreTrainedModel],
    tiny_tokenizer: PreTrainedTokenizerFast,
    tmp_path: Path,
) -> None:
    model = made(tiny_model, "llama", bits, tied=tied)
    file = ptq161.save(model, tiny_tokenizer, tmp_path / "packed")
    codes = [name for name in load_file(file) if name.endswith(".codes") and "layers" not in name]
    assert codes == (["model.embed_tokens.codes"] if tied else ["lm_head.codes", "model.embed_tokens.codes"])
    again = AutoModelForCausalLM.from_pretrained(tmp_path / "packed")
    assert is_tied(again) == tied
    assert_same(again, model)
    ptq161.export(tmp_path / "packed", tmp_path / "dense")
    dense = AutoModelForCausalLM.from_pretrained(tmp_path / "dense")
    assert (dense.lm_head.weight is dense.model.embed_tokens.weight) == tied
    assert torch.equal(logits(dense), logits(model))
    # Moved, copied, cast: still tied, the packed tensors as they were.
    stored = model.state_dict()
    for name, tensor in model.to(torch.bfloat16).state_dict().items():
        assert tensor.dtype == stored[name].dtype or "norm" in name
    assert is_tied(model) == tied and logits(model).dtype == torch.bfloat16
    copied = copy.deepcopy(model)
    shared = copied.lm_head.packed.state_dict()["codes"] is copied.model.embed_tokens.codes
    assert shared == tied and copied.model.embed_tokens.codes is not model.model.embed_tokens.codes


def test_the_values_are_those_of_rounding_to_nearest(tiny_model: Callable[..., PreTrainedModel]) -> None:
    model = tiny_model("gemma3_text")
    weight = model.get_input_embeddings().weight.detach().clone()
    model = ptq161.quantize_embeddings(ptq161.quantize(model, TOKENS, ptq161.RTN(bits=2)), 4)
    embedding = model.get_input_embeddings()
    assert isinstance(embedding, PackedEmbedding)
    expected = quantize_weight(weight, 4, group_size=64).dequantize()
    assert torch.equal(embedding.dequantize(), expected)
    assert torch.equal(embedding(TOKENS), expected[TOKENS] * 64**0.5)
    assert torch.equal(model.get_output_embeddings().dequantize(), expected)


def test_many_rows_are_rounded_as_at_once(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("ptq161.methods.rtn._WEIGHTS_AT_ONCE", 100)
    weight = torch.randn(17, 40).bfloat16()
    one, other = quantize_rows(weight, 4, group_size=16), quantize_weight(weight, 4, group_size=16)
    assert one.settings() == other.settings()
    assert all(torch.equal(tensor, other.state_dict()[name]) for name, tensor in one.state_dict().items())


def test_only_the_rows_that_are_looked_up_are_dequantized(
    tiny_model: Callable[..., PreTrainedModel], monkeypatch: pytest.MonkeyPatch
) -> None:
    embedding = made(tiny_model, "llama", 8).get_input_embeddings()
    weight = embedding.dequantize()
    kind = type(embedding.packed)
    shapes, values = [], kind.values

    def counted(self: object) -> Tensor:
        found: Tensor = values(self)  # type: ignore[arg-type]
        shapes.append(tuple(found.shape))
        return found

    monkeypatch.setattr(kind, "values", counted)
    assert torch.equal(embedding(TOKENS[:, :3]), weight[TOKENS[:, :3]]) and shapes == [(6, 64)]
    with pytest.raises(IndexError):
        embedding(torch.tensor([[256]]))
    with pytest.raises(IndexError):
        embedding(torch.tensor([[-1]]))


def test_a_head_multiplies_few_rows_and_many(tiny_model: Callable[..., PreTrainedModel]) -> None:
    for bits in (8, 4):
        head = made(tiny_model, "llama", bits).get_output_embeddings()
        assert isinstance(head, PackedHead)
        for rows in (1, 40):
            x = torch.randn(rows, 64)
            expected = nn.functional.linear(x, head.dequantize())
            torch.testing.assert_close(head(x), expected)
            with dense_products(head):
                assert torch.equal(head(x), expected)


def test_they_count_as_other_bytes(tiny_model: Callable[..., PreTrainedModel], tmp_path: Path) -> None:
    model = ptq161.quantize(tiny_model("llama"), TOKENS, ptq161.RTN(bits=2))
    before, linears = measure(model), packed_linears(model).keys()
    packed = ptq161.quantize_embeddings(model, 8)
    after = measure(packed)
    assert (after.linear_bytes, after.linear_weights) == (before.linear_bytes, before.linear_weights)
    # 256 rows of 64, for input and head: 4 bytes of each weight become 1, and 4 for each row.
    assert before.other_bytes - after.other_bytes == 2 * 256 * (64 * 3 - 4)
    assert packed_linears(packed).keys() == linears
    file = ptq161.save(packed, None, tmp_path / "packed")
    assert "Embedding and head are stored in codes of 8 bits." in (file.parent / "README.md").read_text()
    settings = decode_json((file.parent / "config.json").read_text())["quantization_config"]
    assert settings["embeddings"].keys() == {"model.embed_tokens", "lm_head"}


def test_activations_of_eight_bits_leave_the_head_out(tiny_model: Callable[..., PreTrainedModel]) -> None:
    head = made(tiny_model, "llama", 8).get_output_embeddings()
    model = nn.Sequential(head)
    x = torch.randn(2, 64)
    before = model(x)
    with int8_activations(model):
        assert torch.equal(model(x), before)


def test_the_dtype_follows_a_cast(tiny_model: Callable[..., PreTrainedModel], tmp_path: Path) -> None:
    model = made(tiny_model, "gemma3_text", 4)
    cast_rest(model, torch.bfloat16)
    assert model.get_input_embeddings()(TOKENS).dtype == logits(model).dtype == torch.bfloat16
    ptq161.save(model, None, tmp_path / "packed")
    again = type(model).from_pretrained(tmp_path / "packed")
    assert_same(again, model)
    other = type(model).from_pretrained(tmp_path / "packed", dtype=torch.float16)
    assert other.get_input_embeddings().dtype == logits(other).dtype == torch.float16
    densify(again)
    assert again.get_input_embeddings().weight.dtype == torch.bfloat16
    assert again.lm_head.weight is again.get_input_embeddings().weight


def test_adapters_of_peft_stand_beside_them(tiny_model: Callable[..., PreTrainedModel], tmp_path: Path) -> None:
    model = made(tiny_model, "llama", 4)
    before = logits(model)
    adapted = get_peft_model(model, LoraConfig(r=2, target_modules=["q_proj"]))
    assert torch.equal(logits(adapted), before)
    adapted(TOKENS, labels=TOKENS).loss.backward()
    assert all(p.grad is not None for name, p in adapted.named_parameters() if "lora_" in name)
    adapted.save_pretrained(tmp_path / "adapter")
    assert (tmp_path / "adapter" / "adapter_model.safetensors").exists()


def test_it_generates(tiny_model: Callable[..., PreTrainedModel]) -> None:
    model = made(tiny_model, "llama", 4)
    assert model.generate(TOKENS[:1, :4], max_new_tokens=3, do_sample=False).shape == (1, 7)


@pytest.mark.parametrize("architecture", ["llama", "gemma3_text", "gemma3", "opt"])
def test_a_folder_gives_the_same_bytes(
    architecture: str, tiny_model: Callable[..., PreTrainedModel], tmp_path: Path
) -> None:
    tiny_model(architecture).bfloat16().save_pretrained(tmp_path / "model")
    model = load_weights(ModelConfig(name="model", path=str(tmp_path / "model")))
    model = ptq161.quantize_embeddings(ptq161.quantize(model, TOKENS, ptq161.RTN(bits=2)), 4)
    expected = ptq161.save(model, None, tmp_path / "expected").parent
    out = tmp_path / "found"
    ptq161.quantize_folder(tmp_path / "model", TOKENS, ptq161.RTN(bits=2), out, embedding_bits=4)
    assert {path.name for path in out.iterdir()} == {path.name for path in expected.iterdir()}
    for path in out.iterdir():
        assert path.read_bytes() == (expected / path.name).read_bytes(), path.name


def test_bad_input_is_refused_in_one_sentence(tiny_model: Callable[..., PreTrainedModel], tmp_path: Path) -> None:
    model = tiny_model("llama")
    with pytest.raises(UserError, match=r"^model\.embedding_bits=5: use one of 16, 8, 4\.$"):
        ptq161.quantize_embeddings(model, 5)
    with pytest.raises(UserError, match=r"^model\.embedding_bits=3: use one of 16, 8, 4\.$"):
        model.save_pretrained(tmp_path / "model")
        ptq161.quantize_folder(tmp_path / "model", TOKENS, ptq161.RTN(bits=2), tmp_path / "out", embedding_bits=3)
    with pytest.raises(UserError, match=r"no packed linears; quantize it first\.$"):
        ptq161.quantize_embeddings(model, 8)
    model = ptq161.quantize(model, TOKENS, ptq161.RTN(bits=2))
    assert ptq161.quantize_embeddings(model, 16) is model and embedding_bits(model) is None
    model.model.embed_tokens.__class__ = type("Unknown", (nn.Embedding,), {})
    with pytest.raises(UserError, match=r"an embedding of class Unknown cannot be packed: use 16\.$"):
        ptq161.quantize_embeddings(model, 8)
    model.model.embed_tokens.__class__ = nn.Embedding
    model = ptq161.quantize_embeddings(model, 8)
    with pytest.raises(UserError, match=r"embeddings are already quantized\.$"):
        ptq161.quantize_embeddings(model, 8)
    with pytest.raises(UserError, match=r"quantized to 8 bits \(model\.embedding_bits\), which finetuning does not"):
        check_dense_embeddings(model)


def test_a_damaged_checkpoint_is_refused(
    tiny_model: Callable[..., PreTrainedModel], tiny_tokenizer: PreTrainedTokenizerFast, tmp_path: Path
) -> None:
    file = ptq161.save(made(tiny_model, "llama", 8), tiny_tokenizer, tmp_path / "packed")
    config = file.parent / "config.json"
    config.write_text(config.read_text().replace('"model.embed_tokens"', '"model.norm"'))
    (file.parent / "SHA256SUMS").unlink()
    with pytest.raises(UserError, match=r"the checkpoint is damaged: "):
        load(file.parent)
