"""Whole models on a GPU: quantized, loaded, run and trained there, with the results of the CPU."""

from __future__ import annotations

import copy
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from torch import Tensor
from transformers import AutoModelForCausalLM, PreTrainedModel, PreTrainedTokenizerFast

import ptq161
from ptq161.finetune.training import distil
from ptq161.packed.model import densify, packed_linears, sha256_of_packed
from ptq161.preprocess.rounds import restore
from tests.conftest import every_method
from tests.finetune import conftest as tiny
from tests.preprocess.conftest import sequences, short

pytestmark = pytest.mark.gpu
TinyModel = Callable[..., PreTrainedModel]
METHODS = every_method(bits=2, epochs=1)
TOKENS = sequences(4)


def logits(model: PreTrainedModel, tokens: Tensor = TOKENS) -> Tensor:
    with torch.no_grad():
        found: Tensor = model(tokens.to(model.device)).logits.float().cpu()
    return found


@pytest.mark.parametrize("name", METHODS)
def test_every_method(tiny_model: TinyModel, name: str) -> None:
    """Its error is that of the CPU, whose codes may differ by sums in another order."""
    full = logits(tiny_model("llama"))
    on_cpu = ptq161.quantize(tiny_model("llama"), TOKENS, METHODS[name])
    packed = ptq161.quantize(tiny_model("llama"), TOKENS, METHODS[name], device="cuda")
    found = logits(packed)
    assert found.isfinite().all()
    expected = float((logits(on_cpu) - full).norm())
    assert float((found - full).norm()) == pytest.approx(expected, rel=0.1)
    # The same bytes on the GPU, through its kernels or dense.
    torch.testing.assert_close(logits(packed.to("cuda")), found, rtol=1e-3, atol=1e-3 * float(found.abs().max()))


@pytest.mark.parametrize("name", ["ptq161", "waterfill", "rtn"])
def test_tokens_are_those_of_the_dense_copy(tiny_model: TinyModel, name: str) -> None:
    packed = ptq161.quantize(tiny_model("llama"), TOKENS, METHODS[name]).to("cuda")
    dense = copy.deepcopy(packed)
    densify(dense)
    prompt, settings = TOKENS[:1, :8].cuda(), {"max_new_tokens": 24, "do_sample": False}
    found = packed.generate(prompt, attention_mask=torch.ones_like(prompt), **settings)
    assert torch.equal(found, dense.generate(prompt, attention_mask=torch.ones_like(prompt), **settings))


def test_a_checkpoint_is_loaded_to_the_gpu(
    tiny_model: TinyModel, tiny_tokenizer: PreTrainedTokenizerFast, tmp_path: Path
) -> None:
    packed = ptq161.quantize(tiny_model("llama"), TOKENS, METHODS["ptq161"], device="cuda").to("cuda")
    ptq161.save(packed, tiny_tokenizer, tmp_path)
    loaded, _ = ptq161.load(tmp_path)
    torch.testing.assert_close(logits(loaded.to("cuda")), logits(packed))
    placed = AutoModelForCausalLM.from_pretrained(tmp_path, device_map="cuda")
    assert {buffer.device.type for layer in packed_linears(placed).values() for buffer in layer.buffers()} == {"cuda"}
    torch.testing.assert_close(logits(placed), logits(packed))


@pytest.mark.parametrize("update", ["scales", "codes"])
def test_finetuning_helps(update: str) -> None:
    packed, held_out = tiny.packed_model("waterfill"), tiny.tokens()[:4]
    before = tiny.divergence(packed, held_out)
    after = distil(packed, tiny.full_model(), tiny.tokens(), tiny.short(update=update), device="cuda")
    assert tiny.divergence(after, held_out) < 0.95 * before


@pytest.mark.parametrize("update", ["lora", "full"])
def test_restoring_takes_steps(tiny_model: TinyModel, update: str) -> None:
    losses: list[float] = []

    def on_metric(name: str, value: float, /, **_: int | str) -> None:
        if name == "preprocess_loss":
            losses.append(value)

    restored, _ = restore(
        tiny_model("llama"), TOKENS, TOKENS, METHODS["ptq161"], short(update=update), device="cuda", on_metric=on_metric
    )
    assert len(losses) == 4 and losses[-1] < losses[0]
    assert logits(restored).isfinite().all()


class KilledError(Exception):
    """Ends a training in between."""


def test_a_killed_training_goes_on_with_the_same_random_numbers(tiny_model: TinyModel, tmp_path: Path) -> None:
    settings = short(dropout=0.5, steps=4, checkpoint_every=2)

    def restored(**options: object) -> PreTrainedModel:
        return restore(tiny_model("llama"), TOKENS, TOKENS, METHODS["rtn"], settings, device="cuda", **options)[0]  # type: ignore[arg-type]  # options of its own

    def kill(name: str, _: float, /, **where: int | str) -> None:
        if name == "preprocess_loss" and where["step"] == 2:
            raise KilledError

    whole = restored()
    with pytest.raises(KilledError):
        restored(folder=tmp_path, on_metric=kill)
    torch.manual_seed(99)  # whatever the next process has drawn before
    resumed = restored(folder=tmp_path)
    torch.testing.assert_close(resumed.state_dict(), whole.state_dict(), rtol=1e-4, atol=1e-5)


def test_bytes_are_the_same_each_time(tiny_model: TinyModel) -> None:
    found = [
        sha256_of_packed(ptq161.quantize(tiny_model("llama"), TOKENS, METHODS["ptq161"], device="cuda"))
        for _ in range(2)
    ]
    assert found[0] == found[1]
