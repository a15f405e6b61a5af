"""What the tokens of a protocol say before a model is loaded: whether it can read them."""

from __future__ import annotations

from collections.abc import Iterable

import torch
from transformers import PretrainedConfig, PreTrainedTokenizerBase

from ptq161.errors import UserError


def vocabulary_of(config: PretrainedConfig) -> int:
    """Return the rows of a model's embedding: the ids below are tokens that it knows."""
    return int(config.get_text_config().vocab_size)


def check_tokens(
    tokenizer: PreTrainedTokenizerBase, tokens: torch.Tensor | Iterable[int], vocabulary: int, text: str
) -> None:
    """Check that the model's embedding has a row for each token.

    Args:
        tokenizer: names the token in the error.
        tokens: ids.
        vocabulary: rows of the embedding.
        text: what the tokens are of, for the error.

    Raises:
        UserError: it has not, as where tokens were added to the tokenizer and the embedding was not resized.
    """
    ids = tokens if isinstance(tokens, torch.Tensor) else torch.tensor(list(tokens), dtype=torch.int64)
    if ids.numel() and int(ids.max()) >= vocabulary:
        largest = int(ids.max())
        name = tokenizer.convert_ids_to_tokens(largest)
        raise UserError(
            f"{text} has the token {name!r} ({largest}), but the model's embedding has only {vocabulary} rows: use the "
            "model's own tokenizer, or resize the embedding."
        )


def check_prompt(
    tokenizer: PreTrainedTokenizerBase, prompt: str, n_tokens: int, longest: int | None, vocabulary: int | None
) -> None:
    """Check that a model can continue the prompt of the text sample.

    Args:
        tokenizer: the model's.
        prompt: ``eval.sample_prompt``.
        n_tokens: ``eval.sample_tokens``.
        longest: longest sequence that the model takes; None where nothing bounds it.
        vocabulary: rows of its embedding; None checks no token.

    Raises:
        UserError: the prompt has no token of text or one that the model does not know, or is too long.
    """
    tokens = list(tokenizer(prompt)["input_ids"])
    special = {*tokenizer.all_special_ids} - {tokenizer.unk_token_id}
    if not set(tokens) - special:
        raise UserError(f"eval.sample_prompt={prompt!r} has no token of text: give at least one word.")
    if vocabulary is not None:
        check_tokens(tokenizer, tokens, vocabulary, "eval.sample_prompt")
    room = None if longest is None else longest - len(tokens) + 1  # the last new token is not read
    if room is not None and room < 1:
        raise UserError(f"eval.sample_prompt has {len(tokens)} tokens: the model takes at most {longest}; shorten it.")
    if room is not None and n_tokens > room:
        raise UserError(
            f"eval.sample_tokens={n_tokens}: the model takes at most {longest} tokens, {len(tokens)} of which are the "
            f"prompt; set eval.sample_tokens to at most {room}."
        )
