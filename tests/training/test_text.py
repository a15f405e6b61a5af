"""Training text: packed, in an order that follows from the seed, tokenized once, and seen by no evaluation."""

from __future__ import annotations

import json
import logging
from pathlib import Path

import pytest
import torch
from transformers import PreTrainedTokenizerFast

import ptq161.training.text as text
from ptq161.data.embedded import passages
from ptq161.data.hub_text import HUB_TEXTS
from ptq161.errors import UserError
from ptq161.preprocess.restoration import Restoration
from ptq161.training.text import training_tokens
from tests.preprocess.conftest import short

DOCUMENTS = {"squad": ["alpha beta", "gamma"], "coqa": ["delta epsilon zeta"], "drop": ["eta"]}
EMBEDDED = ["squad", "drop", "coqa"]


@pytest.fixture
def few(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(text, "passages", DOCUMENTS.__getitem__)


def settings(**changes: object) -> Restoration:
    values: dict[str, object] = {"corpora": EMBEDDED, "seq_len": 5, "steps": 3, "batch_size": 2}
    return short(**(values | changes))


def test_documents_follow_each_other_without_padding(few: None, tiny_tokenizer: PreTrainedTokenizerFast) -> None:
    tokens = training_tokens(tiny_tokenizer, settings(steps=9), seed=0)
    assert tokens.dtype == torch.int64 and tokens.shape[1] == 5
    joined = tiny_tokenizer.decode(tokens.flatten())
    found = joined.split("</s>")
    whole = [d for documents in DOCUMENTS.values() for d in documents]
    # All there once; what is less than a sequence at the end is left out.
    assert set(found[:-1]) <= set(whole) and len(found) in (len(whole), len(whole) + 1)
    assert len(joined) <= sum(len(d) for d in whole) + len("</s>") * len(whole)


def test_no_more_sequences_than_a_round_takes(few: None, tiny_tokenizer: PreTrainedTokenizerFast) -> None:
    assert training_tokens(tiny_tokenizer, settings(steps=1), seed=0).shape == (2, 5)


def test_the_order_follows_from_the_seed(few: None, tiny_tokenizer: PreTrainedTokenizerFast) -> None:
    def drawn(seed: int) -> list[list[int]]:
        return training_tokens(tiny_tokenizer, settings(), seed).tolist()

    assert drawn(0) == drawn(0)
    assert len({str(drawn(seed)) for seed in range(6)}) > 1
    before = torch.get_rng_state()
    drawn(1)
    assert torch.equal(torch.get_rng_state(), before)


def test_each_document_ends_with_the_end_token(few: None, tiny_tokenizer: PreTrainedTokenizerFast) -> None:
    other = PreTrainedTokenizerFast(tokenizer_object=tiny_tokenizer.backend_tokenizer, eos_token="<pad>")
    assert 2 in training_tokens(other, settings(), seed=0)
    without = PreTrainedTokenizerFast(tokenizer_object=tiny_tokenizer.backend_tokenizer)
    assert int(training_tokens(without, settings(), seed=0).min()) > 2


def test_too_little_text_repeats(
    few: None, tiny_tokenizer: PreTrainedTokenizerFast, caplog: pytest.LogCaptureFixture
) -> None:
    with caplog.at_level(logging.INFO):
        n = len(training_tokens(tiny_tokenizer, settings(steps=50), seed=0))
    assert n < 100
    assert f"training takes 100 sequences and the text has {n}: they are repeated" in caplog.text


def test_less_text_than_a_sequence_is_refused(few: None, tiny_tokenizer: PreTrainedTokenizerFast) -> None:
    with pytest.raises(UserError) as caught:
        training_tokens(tiny_tokenizer, settings(corpora=["drop"], seq_len=64), seed=0)
    assert str(caught.value) == (
        "preprocess.seq_len=64 is more than the 4 tokens of preprocess.corpora=['drop']: set preprocess.seq_len to at "
        "most 4."
    )


def test_a_file_and_its_absence(tiny_tokenizer: PreTrainedTokenizerFast, tmp_path: Path) -> None:
    file = tmp_path / "text.txt"
    file.write_text("abc " * 20)
    tokens = training_tokens(tiny_tokenizer, settings(corpora=["text_file"], text_file=str(file)), seed=0)
    assert tiny_tokenizer.decode(tokens[0]) == "abc a"
    with pytest.raises(UserError, match=r"^preprocess\.text_file=nowhere: there is no such file"):
        training_tokens(tiny_tokenizer, settings(corpora=["text_file"], text_file="nowhere"), seed=0)


def test_the_hubs_documents_are_read_no_further_than_needed(
    tiny_tokenizer: PreTrainedTokenizerFast, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    hub = HUB_TEXTS["redpajama"]
    (tmp_path / hub.repo).mkdir(parents=True)
    for part in hub.files["train"]:
        lines = (json.dumps({"text": f"{part} {i} " * 10}) for i in range(20))
        (tmp_path / hub.repo / part).write_text("\n".join(lines))
    encoded: list[str] = []
    encode = text.encode
    monkeypatch.setattr(
        text, "encode", lambda tokenizer, document: encoded.append(document) or encode(tokenizer, document)
    )
    tokens = training_tokens(tiny_tokenizer, settings(corpora=["redpajama"], seq_len=32), 0, hub_root=tmp_path)
    assert tokens.shape == (6, 32)
    assert sum(map(len, encoded)) < 2 * text._CHARACTERS_PER_TOKEN * tokens.numel()
    assert len({document.split()[0] for document in encoded}) > 2  # a mixture of its parts


def test_no_evaluation_sees_what_is_trained_on() -> None:
    trained = [passage for name in EMBEDDED for passage in passages(name)]
    for name in ("boolq", "lambada"):
        assert not runs_of_13_words(trained) & runs_of_13_words(passages(name))


def runs_of_13_words(texts: list[str]) -> set[tuple[str, ...]]:
    words = ("".join(c if c.isalnum() else " " for c in t.lower()).split() for t in texts)
    return {tuple(w[i : i + 13]) for w in words for i in range(len(w) - 12)}
