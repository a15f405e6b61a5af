"""Training text, packed into sequences without padding.

Training text is never evaluation text: the embedded passages share no run of 13 words with the perplexity corpora
(BoolQ, LAMBADA), the hub's texts are training splits, and the file of ``eval.text_file`` is refused
(:mod:`ptq161.run.preflight`).
"""

from __future__ import annotations

import logging
from collections.abc import Iterable, Iterator, Sequence
from pathlib import Path

import torch
from torch import Tensor
from transformers import PreTrainedTokenizerBase

from ptq161.data.embedded import passages
from ptq161.data.hub_text import HUB_TEXTS, hub_documents
from ptq161.data.text import encode, read_text
from ptq161.errors import UserError
from ptq161.seeding import stage_generator
from ptq161.training.settings import Training

log = logging.getLogger(__name__)

# Documents are read until there are this many characters for each token that is needed: more than tokenizers take.
_CHARACTERS_PER_TOKEN = 8


def training_tokens(
    tokenizer: PreTrainedTokenizerBase, training: Training, seed: int, *, hub_root: Path | None = None
) -> Tensor:
    """Return the training sequences: the documents of all corpora in random order, one after the other.

    Args:
        tokenizer: adds its special tokens to each document, and its end token after it where it has one.
        training: corpora, sequence length, and number of sequences; fewer are returned where the text is shorter,
            and training then repeats them.
        seed: of the run; the order of the documents follows from it.
        hub_root: local copy in place of the hub (see :func:`ptq161.data.hub_text.hub_documents`).

    Returns:
        int64 ``[n, seq_len]``.

    Raises:
        UserError: a text cannot be fetched or read, or the texts together are shorter than one sequence.
    """
    wanted = training.sequences * training.seq_len
    tokens = _encoded(tokenizer, _until(_shuffled(training, seed, hub_root), _CHARACTERS_PER_TOKEN * wanted))
    n = min(len(tokens) // training.seq_len, training.sequences)
    if n == 0:
        group = training.names.group
        raise UserError(
            f"{group}.seq_len={training.seq_len} is more than the {len(tokens)} tokens of "
            f"{group}.corpora={training.corpora_read}: set {group}.seq_len to at most {len(tokens)}."
        )
    if n < training.sequences:
        log.info("training takes %d sequences and the text has %d: they are repeated", training.sequences, n)
    return tokens[: n * training.seq_len].view(n, training.seq_len)


def _shuffled(training: Training, seed: int, hub_root: Path | None) -> Iterator[str]:
    """Yield the documents of all corpora in random order."""
    sources: list[Sequence[str]] = [_documents(name, training, hub_root) for name in training.corpora_read]
    ends = torch.tensor([len(source) for source in sources]).cumsum(0)
    for index in torch.randperm(
        int(ends[-1]), generator=stage_generator(seed, f"{training.names.stage} text")
    ).tolist():
        source = int(torch.searchsorted(ends, index, right=True))
        yield sources[source][index - (int(ends[source - 1]) if source else 0)]


def _documents(name: str, training: Training, hub_root: Path | None) -> Sequence[str]:
    group = training.names.group
    if name in HUB_TEXTS:
        instead = f"use {group}.corpora=[squad,drop,coqa], or {group}.corpora=[text_file] {group}.text_file=FILE"
        documents: Sequence[str] = hub_documents(name, "train", instead, hub_root)["text"]
        return documents
    if name == "text_file":
        return [read_text(f"{group}.text_file", training.text_file)]
    return passages(name)


def _until(documents: Iterator[str], characters: int) -> Iterator[str]:
    for document in documents:
        yield document
        characters -= len(document)
        if characters <= 0:
            return


def _encoded(tokenizer: PreTrainedTokenizerBase, documents: Iterable[str]) -> Tensor:
    """Tokenize documents, each with its end token where the tokenizer has one; int64 ``[n]``."""
    end = [] if tokenizer.eos_token_id is None else [torch.tensor([tokenizer.eos_token_id])]
    parts = [part for document in documents for part in (encode(tokenizer, document), *end)]
    return torch.cat(parts) if parts else torch.empty(0, dtype=torch.int64)
