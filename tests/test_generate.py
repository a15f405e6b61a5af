"""Text from a packed checkpoint: the same tokens as a loop of forward passes, and one sentence for what is wrong."""

from __future__ import annotations

import re
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from transformers import PreTrainedModel, PreTrainedTokenizerFast

import ptq161
from ptq161.generate import generate, main
from ptq161.packed.linear import dense_cache

PROMPT = "Once upon a time"


@pytest.fixture(scope="module")
def checkpoint(
    tiny_model: Callable[..., PreTrainedModel],
    tiny_tokenizer: PreTrainedTokenizerFast,
    tmp_path_factory: pytest.TempPathFactory,
) -> Path:
    place = tmp_path_factory.mktemp("generate") / "packed"
    tokens = torch.randint(3, 256, (2, 32), generator=torch.Generator().manual_seed(4))
    model = ptq161.quantize(tiny_model("llama"), tokens, ptq161.PTQ161(epochs=0))
    ptq161.save(model, tiny_tokenizer, place)
    return place


def greedy(model: PreTrainedModel, tokens: torch.Tensor, n: int) -> torch.Tensor:
    with torch.no_grad():
        for _ in range(n):
            tokens = torch.cat([tokens, model(tokens, use_cache=False).logits[:, -1:].argmax(-1)], dim=1)
    return tokens[0, -n:]


def test_tokens_are_those_of_the_dequantized_model(checkpoint: Path, capsys: pytest.CaptureFixture[str]) -> None:
    model, tokenizer = ptq161.load(checkpoint)
    found = generate(model, tokenizer, PROMPT, max_new_tokens=12)
    with dense_cache(model, torch.float32):
        expected = greedy(model, tokenizer(PROMPT, return_tensors="pt")["input_ids"], 12)
    assert found.tokens.tolist() == expected[: len(found.tokens)].tolist()
    assert found.prompt_tokens == len(PROMPT) and found.seconds > 0 and found.tokens_per_second > 0
    assert capsys.readouterr().out.strip() == tokenizer.decode(found.tokens).strip()


def test_sampling_depends_on_its_seed_alone(checkpoint: Path) -> None:
    model, tokenizer = ptq161.load(checkpoint)
    state = torch.get_rng_state()
    one, again, other = (
        generate(model, tokenizer, PROMPT, max_new_tokens=16, temperature=5.0, seed=seed).tokens.tolist()
        for seed in (0, 0, 1)
    )
    assert one == again != other
    assert torch.equal(torch.get_rng_state(), state)


@pytest.mark.parametrize("arguments", [[], ["--int8"], ["--temperature", "0.7", "--seed", "3"]])
def test_the_command_prints_text_and_figures(
    checkpoint: Path, arguments: list[str], capsys: pytest.CaptureFixture[str]
) -> None:
    assert main([str(checkpoint), PROMPT, "--max-new-tokens", "8", *arguments]) == 0
    out, err = capsys.readouterr()
    assert out.strip()
    pattern = r"16 tokens of prompt in [\d.]+ s, \d new at [\d.]+ tokens per second, \d+ threads, \d+ MB resident\.\n"
    assert re.fullmatch(pattern, err)


def test_a_format_without_activations_of_eight_bits_is_named(
    tiny_model: Callable[..., PreTrainedModel],
    tiny_tokenizer: PreTrainedTokenizerFast,
    tmp_path: Path,
    capsys: pytest.CaptureFixture[str],
) -> None:
    model = ptq161.quantize(tiny_model("llama"), torch.randint(3, 256, (2, 32)), ptq161.BiLLM())
    ptq161.save(model, tiny_tokenizer, tmp_path / "billm")
    assert main([str(tmp_path / "billm"), PROMPT, "--int8"]) == 1
    assert capsys.readouterr().err == "activations of eight bits: weights stored as 'billm' have no such product.\n"


@pytest.mark.parametrize(
    ("arguments", "sentence"),
    [
        (["--max-new-tokens", "0"], "--max-new-tokens 0: use at least 1."),
        (["--threads", "-1"], "--threads -1: use at least 1."),
        (["--temperature", "nan"], "--temperature nan: use a positive number, or --greedy."),
        (["--max-new-tokens", "600"], "are more than the 512 of the model."),
    ],
)
def test_a_bad_value_gets_one_sentence(
    checkpoint: Path, arguments: list[str], sentence: str, capsys: pytest.CaptureFixture[str]
) -> None:
    assert main([str(checkpoint), PROMPT, *arguments]) == 1
    err = capsys.readouterr().err
    assert sentence in err and err.count("\n") == 1


def test_a_folder_that_is_not_packed_gets_one_sentence(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert main([str(tmp_path), PROMPT]) == 1
    assert "no packed checkpoint" in capsys.readouterr().err
