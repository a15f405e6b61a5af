"""Folders as others leave them: code of strangers, pointers, no tokenizer, models around a language model."""

from __future__ import annotations

import json
import os
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from transformers import PreTrainedModel, PreTrainedTokenizerFast

from ptq161.errors import UserError
from ptq161.models.loading import load_model, load_tokenizer
from ptq161.models.settings import ModelConfig
from tests.conftest import WRAPPERS

TinyModel = Callable[..., PreTrainedModel]
POINTER = "version https://git-lfs.github.com/spec/v1\noid sha256:0\nsize 1\n"


@pytest.fixture
def folder(tiny_model_dir: Path, tmp_path: Path) -> Path:
    """A copy of the saved tiny Llama, to be changed."""
    return Path(shutil.copytree(tiny_model_dir, tmp_path / "model"))


def refused(folder: Path) -> str:
    with pytest.raises(UserError) as caught:
        load_model(ModelConfig(name="tiny", path=str(folder)))
    sentence = str(caught.value)
    assert "\n" not in sentence and sentence.endswith(".") and str(folder) in sentence
    return sentence


def change(file: Path, **values: Any) -> None:
    file.write_text(json.dumps(json.loads(file.read_text()) | values))


@pytest.mark.parametrize("model_type", ["mine", "llama"])
def test_code_of_the_folder_is_not_run(
    model_type: str, folder: Path, monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    ran = tmp_path / "ran"
    code = f"open({str(ran)!r}, 'w')\nfrom transformers import LlamaConfig as Config\n"
    (folder / "configuration_mine.py").write_text(code)
    change(folder / "config.json", model_type=model_type, auto_map={"AutoConfig": "configuration_mine.Config"})
    reader, writer = os.pipe()  # an answer that nobody waits for
    os.write(writer, b"yes\n" * 8)
    with os.fdopen(reader) as answers:
        monkeypatch.setattr("sys.stdin", answers)
        if model_type == "mine":
            assert "comes with code of its own (auto_map), and none of it is run" in refused(folder)
        else:  # transformers has this architecture itself
            load_model(ModelConfig(name="tiny", path=str(folder)))
    os.close(writer)
    assert not ran.exists()


def test_code_of_the_tokenizer_is_not_run(folder: Path) -> None:
    (folder / "tokenization_mine.py").write_text("raise SystemExit\n")
    (folder / "tokenizer.json").unlink()
    change(
        folder / "tokenizer_config.json",
        tokenizer_class="MineTokenizer",
        auto_map={"AutoTokenizer": [None, "tokenization_mine.MineTokenizer"]},
    )
    assert "code of its own" in refused(folder)


@pytest.mark.parametrize("file", ["model.safetensors", "tokenizer.json", "config.json"])
def test_pointers_of_git_lfs(file: str, folder: Path) -> None:
    (folder / file).write_text(POINTER)
    assert f"{file} is a pointer of git-lfs and not the file itself: run git lfs pull there" in refused(folder)


def test_a_folder_without_a_tokenizer(folder: Path) -> None:
    for file in folder.glob("token*"):
        file.unlink()
    assert "it has no usable tokenizer (" in refused(folder)


def test_more_blocks_than_there_are(folder: Path) -> None:
    with pytest.raises(UserError, match=r"model\.n_blocks=9: the model has 2 blocks\."):
        load_model(ModelConfig(name="tiny", path=str(folder), n_blocks=9))


@pytest.mark.parametrize("architecture", WRAPPERS)
def test_a_model_around_a_language_model_is_loaded_whole(
    architecture: str, tiny_model: TinyModel, tiny_tokenizer: PreTrainedTokenizerFast, tmp_path: Path
) -> None:
    original = tiny_model(architecture)
    original.save_pretrained(tmp_path)
    tiny_tokenizer.save_pretrained(tmp_path)
    config = ModelConfig(name="tiny", path=str(tmp_path), n_blocks=1)
    model, _ = load_model(config)
    assert type(model) is type(original)
    whole, _ = load_model(ModelConfig(name="tiny", path=str(tmp_path)))
    tokens = torch.randint(7, 256, (2, 8))
    with torch.no_grad():
        assert torch.equal(whole(tokens).logits, original(tokens).logits)
        assert torch.isfinite(model(tokens).logits).all()
    assert load_tokenizer(config)[1].model_type == architecture
