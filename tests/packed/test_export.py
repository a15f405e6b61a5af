"""What is saved and exported behaves as the original does, but for its weights; nothing of the user's is lost."""

from __future__ import annotations

import json
import os
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file
from transformers import (
    AutoModelForCausalLM,
    AutoModelForImageTextToText,
    AutoTokenizer,
    PreTrainedModel,
    PreTrainedTokenizerFast,
)

import ptq161
from ptq161.errors import UserError
from ptq161.files.atomic import umask
from ptq161.packed.checkpoint import own_methods
from ptq161.packed.export import save_dense
from ptq161.packed.model import packed_linears
from tests.conftest import TINY, WRAPPERS

TinyModel = Callable[..., PreTrainedModel]
TOKENS = torch.randint(3, 256, (3, 32), generator=torch.Generator().manual_seed(4))
TEMPLATE = "{% for m in messages %}<{{ m.role }}>{{ m.content }}{% endfor %}"
OF_THE_WEIGHTS = {"quantization_config"}


@pytest.fixture
def tokenizer(tiny_tokenizer: PreTrainedTokenizerFast, tmp_path: Path) -> PreTrainedTokenizerFast:
    tiny_tokenizer.save_pretrained(tmp_path / "tokenizer")
    copy: PreTrainedTokenizerFast = AutoTokenizer.from_pretrained(tmp_path / "tokenizer")
    copy.chat_template = TEMPLATE
    return copy


@pytest.fixture
def original(tiny_model: TinyModel, tokenizer: PreTrainedTokenizerFast, tmp_path: Path) -> Callable[..., Path]:
    """Makes the folder of an instruct model: two end tokens and sampling settings in its generation config alone."""

    def make(architecture: str = "llama", dtype: torch.dtype = torch.bfloat16) -> Path:
        folder = tmp_path / "original"
        tiny_model(architecture).to(dtype).save_pretrained(folder)
        tokenizer.save_pretrained(folder)
        # Settings that transformers refuses to save itself are part of published models.
        generation = {"eos_token_id": [1, 5], "temperature": 0.6, "top_p": 0.9, "do_sample": False, "max_length": 77}
        (folder / "generation_config.json").write_text(json.dumps(generation))
        return folder

    return make


def opened(folder: Path) -> PreTrainedModel:
    kind = json.loads((folder / "config.json").read_text())["model_type"]
    auto = AutoModelForImageTextToText if kind in WRAPPERS else AutoModelForCausalLM
    model: PreTrainedModel = auto.from_pretrained(folder, dtype="auto")
    return model


def config(model: PreTrainedModel) -> dict[str, Any]:
    content: dict[str, Any] = json.loads(model.config.to_json_string(use_diff=False))
    for part in (content, *(value for value in content.values() if isinstance(value, dict))):
        part.pop("_name_or_path", None)
    return content


def generation(model: PreTrainedModel) -> dict[str, Any]:
    return {k: v for k, v in model.generation_config.to_diff_dict().items() if not k.startswith(("_", "transformers"))}


@pytest.mark.parametrize("architecture", TINY)
def test_checkpoint_loaded_model_and_export_have_the_configs_of_the_original(
    architecture: str, original: Callable[..., Path], tokenizer: PreTrainedTokenizerFast, tmp_path: Path
) -> None:
    source = opened(original(architecture))
    before, settings = config(source), generation(source)
    assert (settings["eos_token_id"], settings["temperature"]) == ([1, 5], 0.6)
    packed = ptq161.quantize(opened(tmp_path / "original"), TOKENS, ptq161.RTN())
    assert config(packed) == before and generation(packed) == settings
    ptq161.save(packed, tokenizer, tmp_path / "packed")
    stored = json.loads((tmp_path / "packed" / "config.json").read_text())
    assert {k: v for k, v in stored.items() if k not in OF_THE_WEIGHTS} == before
    loaded, loaded_tokenizer = ptq161.load(tmp_path / "packed")
    ptq161.export(tmp_path / "packed", tmp_path / "dense")
    dense = opened(tmp_path / "dense")
    for model in (loaded, dense):
        assert config(model) == before and generation(model) == settings
        assert model.config.get_text_config().use_cache is True and not model.training
        assert {p.dtype for p in model.parameters()} == {torch.bfloat16}
    expected = AutoTokenizer.from_pretrained(tmp_path / "original")
    for found in (loaded_tokenizer, AutoTokenizer.from_pretrained(tmp_path / "dense")):
        assert found.chat_template == TEMPLATE
        assert found("Any text.")["input_ids"] == expected("Any text.")["input_ids"]
        assert found.special_tokens_map == expected.special_tokens_map


def test_no_file_carries_a_path_or_a_mode_of_its_own(
    original: Callable[..., Path], tokenizer: PreTrainedTokenizerFast, tmp_path: Path
) -> None:
    model = ptq161.quantize(opened(original()), TOKENS, ptq161.RTN())
    ptq161.save(model, tokenizer, tmp_path / "packed")
    ptq161.export(tmp_path / "packed", tmp_path / "dense")
    for folder in ("packed", "dense"):
        for path in (tmp_path / folder).iterdir():
            assert path.stat().st_mode & 0o777 == 0o666 & ~umask(), path
            assert str(tmp_path).encode() not in path.read_bytes(), path


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
def test_the_stored_dtype_is_that_of_the_tensors(
    dtype: torch.dtype, original: Callable[..., Path], tokenizer: PreTrainedTokenizerFast, tmp_path: Path
) -> None:
    model = ptq161.quantize(opened(original(dtype=torch.float32)), TOKENS, ptq161.RTN()).to(dtype)
    ptq161.save(model, tokenizer, tmp_path / "packed")
    stored = json.loads((tmp_path / "packed" / "config.json").read_text())["dtype"]
    tensors = load_file(tmp_path / "packed" / "packed.safetensors")
    assert tensors["model.embed_tokens.weight"].dtype == getattr(torch, stored) == dtype
    assert ptq161.load(tmp_path / "packed")[0].dtype == dtype


@pytest.fixture
def packed(tiny_model: TinyModel, tiny_tokenizer: PreTrainedTokenizerFast, tmp_path: Path) -> Path:
    model = ptq161.quantize(tiny_model("llama"), TOKENS, ptq161.RTN())
    return ptq161.save(model, tiny_tokenizer, tmp_path / "packed").parent


def tree(folder: Path) -> dict[str, bytes]:
    return {str(path.relative_to(folder)): path.read_bytes() for path in folder.rglob("*") if path.is_file()}


@pytest.mark.parametrize("overwrite", [False, True])
@pytest.mark.parametrize("theirs", ["adapter", "model"])
def test_the_users_files_are_never_touched(
    overwrite: bool,
    theirs: str,
    packed: Path,
    tiny_model: TinyModel,
    tiny_tokenizer: PreTrainedTokenizerFast,
    tmp_path: Path,
) -> None:
    target = tmp_path / theirs
    target.mkdir()
    if theirs == "adapter":
        save_file({"w": torch.ones(2)}, target / "adapter_model.safetensors")
    else:
        tiny_model("opt").save_pretrained(target)
    model, _ = ptq161.load(packed)
    before = tree(target)
    writers: list[Callable[[], object]] = [
        lambda: ptq161.export(packed, target, overwrite=overwrite),
        lambda: ptq161.save(model, tiny_tokenizer, target, overwrite=overwrite),
        lambda: save_dense(tiny_model("llama"), tiny_tokenizer, target, overwrite=overwrite),
    ]
    for write in writers:
        with pytest.raises(UserError, match=r" holds .*: choose a new or empty folder"):
            write()
        assert tree(target) == before


def test_an_export_does_not_replace_its_own_checkpoint(packed: Path) -> None:
    before = tree(packed)
    with pytest.raises(UserError, match="overwrite=True"):
        ptq161.export(packed, packed)
    assert tree(packed) == before


def test_what_was_written_here_is_replaced_as_a_whole_when_asked(
    packed: Path, tiny_tokenizer: PreTrainedTokenizerFast, tmp_path: Path
) -> None:
    model, _ = ptq161.load(packed)
    dense = ptq161.export(packed, tmp_path / "dense")
    (dense / "notes.txt").write_text("of the earlier one")
    ptq161.export(packed, dense, overwrite=True)
    assert not (dense / "notes.txt").exists() and opened(dense)
    ptq161.save(model, tiny_tokenizer, dense, overwrite=True)
    assert not (dense / "model.safetensors").exists() and ptq161.load(dense)
    ptq161.export(packed, packed, overwrite=True)
    assert not (packed / "packed.safetensors").exists()
    assert torch.equal(opened(packed).lm_head.weight, model.lm_head.weight)
    assert sorted(path.name for path in tmp_path.iterdir()) == ["dense", "packed"]


def test_a_save_that_fails_leaves_nothing(
    packed: Path, tiny_tokenizer: PreTrainedTokenizerFast, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    model, _ = ptq161.load(packed)

    def fail(*_: object, **__: object) -> None:
        raise OSError("the disk is gone")

    monkeypatch.setattr(type(tiny_tokenizer), "save_pretrained", fail)
    for write in (
        lambda: ptq161.save(model, tiny_tokenizer, tmp_path / "new"),
        lambda: ptq161.export(packed, tmp_path / "new"),
    ):
        with pytest.raises(UserError, match="the disk is gone"):
            write()
    assert os.listdir(tmp_path) == ["packed"]


def test_a_packed_models_own_save_writes_a_checkpoint(
    tiny_model: TinyModel, tiny_tokenizer: PreTrainedTokenizerFast, tmp_path: Path
) -> None:
    model = ptq161.quantize(tiny_model("llama"), TOKENS, ptq161.RTN())
    model.save_pretrained(tmp_path / "own")
    assert packed_linears(opened(tmp_path / "own")).keys() == packed_linears(model).keys()
    tiny_tokenizer.save_pretrained(tmp_path / "own")
    loaded, _ = ptq161.load(tmp_path / "own")
    loaded.save_pretrained(tmp_path / "again")
    assert (tmp_path / "again" / "packed.safetensors").read_bytes() == (
        tmp_path / "own" / "packed.safetensors"
    ).read_bytes()
    with pytest.raises(UserError, match=r"save_pretrained\(push_to_hub=\.\.\.\)"):
        loaded.save_pretrained(tmp_path / "hub", push_to_hub=True)
    assert not (tmp_path / "hub").exists()


@pytest.mark.parametrize("dtype", [None, torch.bfloat16])
def test_dequantize_makes_a_model_plain_wherever_it_comes_from(
    dtype: torch.dtype | None, tiny_model: TinyModel, tiny_tokenizer: PreTrainedTokenizerFast, tmp_path: Path
) -> None:
    quantized = ptq161.quantize(tiny_model("llama"), TOKENS, ptq161.RTN())
    ptq161.save(quantized, tiny_tokenizer, tmp_path / "packed")
    loaded, _ = ptq161.load(tmp_path / "packed")
    with torch.no_grad():
        reopened = AutoModelForCausalLM.from_pretrained(tmp_path / "packed", dtype=dtype or torch.float32)
        expected = reopened.dequantize()(TOKENS).logits
        for model in (quantized, loaded):
            assert model.dequantize(dtype) is model and not packed_linears(model)
            assert {parameter.dtype for parameter in model.parameters()} == {dtype or torch.float32}
            assert torch.equal(model(TOKENS).logits, expected)
    loaded.save_pretrained(tmp_path / "dense")
    assert (tmp_path / "dense" / "model.safetensors").is_file()


def test_a_copy_saves_itself_and_not_the_model_it_was_copied_from(tiny_model: TinyModel, tmp_path: Path) -> None:
    import copy

    model = ptq161.quantize(tiny_model("llama"), TOKENS, ptq161.RTN())
    other = copy.deepcopy(model)
    with torch.no_grad():
        other.model.norm.weight += 1
    other.save_pretrained(tmp_path / "other")
    stored = load_file(tmp_path / "other" / "packed.safetensors")["model.norm.weight"]
    assert torch.equal(stored, other.model.norm.weight)
    own_methods(model)


def test_a_model_that_was_cut_off_half_way_is_not_saved_as_a_dense_one(tiny_model: TinyModel, tmp_path: Path) -> None:
    model = tiny_model("llama")

    def stop(name: str, value: float, /, **where: int | str) -> None:
        if where.get("block") == 1:
            raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        ptq161.quantize(model, TOKENS, ptq161.RTN(), on_metric=stop)
    model.save_pretrained(tmp_path / "half")
    again = opened(tmp_path / "half")
    assert packed_linears(again).keys() == packed_linears(model).keys() != set()
    with torch.no_grad():
        assert torch.equal(again(TOKENS).logits, model(TOKENS).logits)


def test_a_tilde_is_the_home_folder(
    original: Callable[..., Path], tokenizer: PreTrainedTokenizerFast, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    model = ptq161.quantize(opened(original()), TOKENS, ptq161.RTN())
    monkeypatch.setenv("HOME", str(tmp_path))
    monkeypatch.chdir(tmp_path)
    assert ptq161.save(model, tokenizer, "~/packed") == tmp_path / "packed" / "packed.safetensors"
    assert packed_linears(ptq161.load("~/packed")[0])
    assert ptq161.export("~/packed", "~/dense") == tmp_path / "dense"
    assert not (tmp_path / "~").exists()
