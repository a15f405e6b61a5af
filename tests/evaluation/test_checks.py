"""What a tokenizer's tokens say before a model is loaded."""

from __future__ import annotations

import re
from pathlib import Path

import pytest
import torch
from transformers import LlamaConfig, OPTConfig, PreTrainedTokenizerFast

from ptq161.errors import UserError
from ptq161.evaluation import open_evaluation
from ptq161.evaluation.checks import check_prompt, check_tokens, vocabulary_of
from ptq161.evaluation.settings import EvalConfig


@pytest.mark.parametrize("config", [LlamaConfig(vocab_size=100), OPTConfig(vocab_size=100)])
def test_the_vocabulary_is_that_of_the_embedding(config: LlamaConfig | OPTConfig) -> None:
    assert vocabulary_of(config) == 100


def test_the_vocabulary_of_a_model_around_a_language_model(tiny_model) -> None:  # type: ignore[no-untyped-def]
    model = tiny_model("gemma3")
    assert vocabulary_of(model.config) == len(model.get_input_embeddings().weight)


@pytest.mark.parametrize("tokens", [[0, 255], torch.tensor([[0, 1], [255, 2]]), [], torch.Tensor()])
def test_tokens_of_the_embedding_pass(tiny_tokenizer: PreTrainedTokenizerFast, tokens: list[int]) -> None:
    check_tokens(tiny_tokenizer, tokens, 256, "a text")


@pytest.mark.parametrize("tokens", [[0, 255], torch.tensor([[0, 1], [255, 2]])])
def test_tokens_beyond_it_are_named(tiny_tokenizer: PreTrainedTokenizerFast, tokens: list[int]) -> None:
    name = re.escape(repr(tiny_tokenizer.convert_ids_to_tokens(255)))
    with pytest.raises(UserError, match=rf"^a text has the token {name} \(255\), but .* only 255 rows: .*\.$"):
        check_tokens(tiny_tokenizer, tokens, 255, "a text")


@pytest.mark.parametrize("prompt", ["", "<s>", "</s><s>", "<pad>"])
def test_a_prompt_without_text_is_refused(tiny_tokenizer: PreTrainedTokenizerFast, prompt: str) -> None:
    with pytest.raises(UserError, match=r"has no token of text: give at least one word\.$"):
        check_prompt(tiny_tokenizer, prompt, 1, None, None)


@pytest.mark.parametrize("prompt", [" ", "é", "<s>a", "\n"])
def test_any_other_prompt_is_taken(tiny_tokenizer: PreTrainedTokenizerFast, prompt: str) -> None:
    check_prompt(tiny_tokenizer, prompt, 1, 512, 256)


@pytest.mark.parametrize(
    ("n_prompt", "n_tokens", "sentence"),
    [
        (8, 25, None),  # the last of them is not read
        (32, 1, None),
        (8, 26, "eval.sample_tokens=26: the model takes at most 32 tokens, 8 of which are the prompt; set "),
        (33, 1, "eval.sample_prompt has 33 tokens: the model takes at most 32; shorten it."),
    ],
)
def test_the_sample_fits_into_the_model(
    tiny_tokenizer: PreTrainedTokenizerFast, n_prompt: int, n_tokens: int, sentence: str | None
) -> None:
    if sentence is None:
        check_prompt(tiny_tokenizer, "a" * n_prompt, n_tokens, 32, 256)
        return
    with pytest.raises(UserError, match="^" + re.escape(sentence)):
        check_prompt(tiny_tokenizer, "a" * n_prompt, n_tokens, 32, 256)


@pytest.mark.parametrize(
    ("settings", "text"),
    [
        ({"corpora": ["text_file"]}, "eval.corpora=text_file"),
        ({"tasks": ["copa"], "limit": 2}, "eval.tasks=copa"),
        ({"tasks": ["lambada"], "limit": 2}, "eval.tasks=lambada"),
        ({"sample_prompt": "y"}, "eval.sample_prompt"),
    ],
)
def test_every_text_of_a_protocol_is_checked(
    tiny_tokenizer: PreTrainedTokenizerFast, tmp_path: Path, settings: dict[str, object], text: str
) -> None:
    (tmp_path / "text").write_text("y" * 64)
    vocabulary = int(tiny_tokenizer("e")["input_ids"][0]) + 1  # which leaves out most letters
    values = {"name": "test", "corpora": [], "tasks": [], "seq_len": 8, "sample_prompt": "a", **settings}
    config = EvalConfig(text_file=str(tmp_path / "text"), **values)  # type: ignore[arg-type]
    with pytest.raises(UserError, match=rf"^{re.escape(text)} has the token "):
        open_evaluation(tiny_tokenizer, config, 512, vocabulary)
    open_evaluation(tiny_tokenizer, config, 512, 256)


def test_an_empty_prompt_is_a_wrong_value() -> None:
    with pytest.raises(UserError, match=r"^eval\.sample_prompt is empty"):
        EvalConfig("test", [], 8, [], sample_prompt="")
