"""A model that is quantized out of its folder, block by block, against the same model quantized in memory."""

from __future__ import annotations

import errno
import json
import os
import shutil
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from torch import Tensor
from transformers import PreTrainedModel, PreTrainedTokenizerFast

import ptq161
from ptq161.errors import UserError
from ptq161.methods.base import Method, OnMetric
from ptq161.models.architectures import quantized_linears
from ptq161.models.loading import load_model, load_weights
from ptq161.models.settings import ModelConfig
from tests.conftest import TINY, every_method

METHODS = {
    name: method
    for name, method in every_method(bits=2, epochs=1).items()
    if name in ("rtn", "gptq", "ptq161", "vptq", "waterfill")
} | {"vptq, shared codebooks": ptq161.VPTQ(vector_length=2, centroids=16, codebook_per="input", iterations=5)}


def tokens(n: int = 3, seq_len: int = 32) -> Tensor:
    return torch.randint(0, 256, (n, seq_len), generator=torch.Generator().manual_seed(0))


def in_memory(folder: Path, out: Path, method: Method, **settings: object) -> Path:
    model = load_weights(ModelConfig(name="model", path=str(folder)))
    return ptq161.save(ptq161.quantize(model, tokens(), method, **settings), None, out)


def assert_same_folders(one: Path, other: Path) -> None:
    assert {path.name for path in one.iterdir()} == {path.name for path in other.iterdir()}
    for path in one.iterdir():
        assert path.read_bytes() == (other / path.name).read_bytes(), path.name


@pytest.mark.parametrize("architecture", TINY)
def test_every_architecture_gives_the_same_bytes(
    architecture: str, tiny_model: Callable[..., PreTrainedModel], tmp_path: Path
) -> None:
    tiny_model(architecture, n_blocks=2).bfloat16().save_pretrained(tmp_path / "model", max_shard_size="60KB")
    assert len(list((tmp_path / "model").glob("model-*.safetensors"))) > 1
    method = ptq161.RTN(bits=2)
    expected = in_memory(tmp_path / "model", tmp_path / "expected", method)
    found = ptq161.quantize_folder(tmp_path / "model", tokens(), method, tmp_path / "found")
    assert_same_folders(expected.parent, found.parent)


@pytest.mark.parametrize("name", METHODS)
def test_every_method_gives_the_same_bytes(
    name: str, tiny_model: Callable[..., PreTrainedModel], tmp_path: Path
) -> None:
    tiny_model("llama").half().save_pretrained(tmp_path / "model")
    expected = in_memory(tmp_path / "model", tmp_path / "expected", METHODS[name])
    found = ptq161.quantize_folder(tmp_path / "model", tokens(), METHODS[name], tmp_path / "found")
    assert_same_folders(expected.parent, found.parent)


@pytest.mark.parametrize("architecture", ["llama", "gemma2"])
@pytest.mark.parametrize("tied", [False, True])
def test_tied_and_untied_heads(
    architecture: str, tied: bool, tiny_model: Callable[..., PreTrainedModel], tmp_path: Path
) -> None:
    model = tiny_model(architecture)
    model.config.tie_word_embeddings = tied
    model.lm_head.weight = torch.nn.Parameter(model.lm_head.weight.detach().clone() + (0 if tied else 1))
    model.tie_weights()
    model.save_pretrained(tmp_path / "model")
    expected = in_memory(tmp_path / "model", tmp_path / "expected", ptq161.RTN(bits=2))
    found = ptq161.quantize_folder(tmp_path / "model", tokens(), ptq161.RTN(bits=2), tmp_path / "found")
    assert_same_folders(expected.parent, found.parent)


def test_windows_masks_metrics_and_tokenizer_are_those_of_quantize(
    tiny_model: Callable[..., PreTrainedModel], tiny_tokenizer: PreTrainedTokenizerFast, tmp_path: Path
) -> None:
    tiny_model("llama", n_blocks=3).save_pretrained(tmp_path / "model")
    tiny_tokenizer.save_pretrained(tmp_path / "model")
    masks = {
        name: torch.arange(linear.in_features) % 5 == 0
        for name, linear in quantized_linears(tiny_model("llama", n_blocks=3))
    }
    method = ptq161.PTQ161(epochs=1, block_size=2)
    emitted: list[list[tuple[object, ...]]] = [[], []]

    def listen(to: int) -> OnMetric:
        def on_metric(name: str, value: float, /, **where: int | str) -> None:
            if name != "seconds":
                emitted[to].append((name, value, where))

        return on_metric

    model, tokenizer = load_model(ModelConfig(name="model", path=str(tmp_path / "model")))
    model = ptq161.quantize(model, tokens(), method, salient_masks=masks, seed=3, on_metric=listen(0))
    expected = ptq161.save(model, tokenizer, tmp_path / "expected", nominal_bits=1.6)
    found = ptq161.quantize_folder(
        tmp_path / "model",
        tokens(),
        method,
        tmp_path / "found",
        salient_masks=masks,
        seed=3,
        on_metric=listen(1),
        nominal_bits=1.6,
    )
    assert_same_folders(expected.parent, found.parent)
    assert emitted[0] == emitted[1] != []


def test_a_folder_to_resume_from_is_that_of_quantize(
    tiny_model: Callable[..., PreTrainedModel], tmp_path: Path
) -> None:
    tiny_model("mixtral", n_blocks=3).save_pretrained(tmp_path / "model", max_shard_size="100KB")
    method, resume = ptq161.GPTQ(bits=2), tmp_path / "resume"
    expected = in_memory(tmp_path / "model", tmp_path / "expected", method, resume=resume)
    (resume / "block_00001.safetensors").unlink()
    for out, made in (("some_finished", {"block_00001.safetensors"}), ("all_finished", set())):
        before = {path.name: path.stat().st_mtime_ns for path in resume.iterdir()}
        found = ptq161.quantize_folder(tmp_path / "model", tokens(), method, tmp_path / out, resume=resume)
        assert_same_folders(expected.parent, found.parent)
        after = {path.name: path.stat().st_mtime_ns for path in resume.iterdir()}
        assert {name for name in after if after[name] != before.get(name)} == made


def test_what_is_wrong_is_said_before_the_work_begins(
    tiny_model: Callable[..., PreTrainedModel], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    whole, out = tmp_path / "whole", tmp_path / "out"
    tiny_model("llama", n_blocks=3).save_pretrained(whole, max_shard_size="100KB")
    monkeypatch.setattr("ptq161.driver.folders.quantize_blocks", lambda *_: pytest.fail("the work has begun"))

    shard = sorted(whole.glob("model-*.safetensors"))[1].name

    def refused(change: Callable[[Path], object], method: object = METHODS["rtn"]) -> str:
        folder = tmp_path / "model"
        shutil.rmtree(folder, ignore_errors=True)
        shutil.copytree(whole, folder)
        change(folder)
        with pytest.raises(UserError) as error:
            ptq161.quantize_folder(folder, tokens(), method, out)  # type: ignore[arg-type]
        assert not out.exists()
        return str(error.value)

    def without_tensor(folder: Path) -> None:
        index = json.loads((folder / "model.safetensors.index.json").read_text())
        del index["weight_map"]["model.layers.1.mlp.up_proj.weight"]
        (folder / "model.safetensors.index.json").write_text(json.dumps(index))

    def narrower(folder: Path) -> None:
        config = json.loads((folder / "config.json").read_text())
        (folder / "config.json").write_text(json.dumps(config | {"intermediate_size": 95}))

    def damaged(folder: Path) -> None:
        (folder / shard).write_bytes(b"not a file of tensors")

    assert f"has no {shard}, which model.safetensors.index.json names" in refused(lambda f: (f / shard).unlink())
    assert "tensor model.layers.1.mlp.up_proj.weight is missing" in refused(without_tensor)
    assert "by the config [64, 95]" in refused(narrower) or "by the config [95, 64]" in refused(narrower)
    assert "is damaged" in refused(damaged)
    assert "no config.json" in refused(lambda f: (f / "config.json").unlink())
    assert "only models of safetensors" in refused(lambda f: (f / "model.safetensors.index.json").unlink())
    assert "plans for the whole model" in refused(lambda _: None, ptq161.Waterfill())
    assert "is no method" in refused(lambda _: None, ptq161.RTN)


def test_a_weight_that_is_nan_is_named(tiny_model: Callable[..., PreTrainedModel], tmp_path: Path) -> None:
    model = tiny_model("llama")
    model.model.layers[1].mlp.up_proj.weight.data[3, 2] = torch.nan
    model.save_pretrained(tmp_path / "model")
    with pytest.raises(UserError, match=r"NaN or infinite in model\.layers\.1\.mlp\.up_proj\.weight"):
        ptq161.quantize_folder(tmp_path / "model", tokens(), METHODS["rtn"], tmp_path / "out")
    assert [path.name for path in tmp_path.iterdir()] == ["model"]


def test_a_full_disk_leaves_nothing(
    tiny_model: Callable[..., PreTrainedModel], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    tiny_model("llama").save_pretrained(tmp_path / "model")

    def full(*_: object) -> None:
        raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))

    monkeypatch.setattr("ptq161.driver.folders.write_tensors", full)
    with pytest.raises(UserError, match=r"the checkpoint cannot be written to .*out: .*No space left on device"):
        ptq161.quantize_folder(tmp_path / "model", tokens(), METHODS["rtn"], tmp_path / "out")
    assert [path.name for path in tmp_path.iterdir()] == ["model"]
