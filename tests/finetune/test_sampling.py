"""Sampled text: its distribution, its first tokens, and that it follows from the generator alone."""

from __future__ import annotations

from collections.abc import Callable

import pytest
import torch
from transformers import PreTrainedModel, PreTrainedTokenizerFast

from ptq161.errors import UserError
from ptq161.finetune.sampling import first_token, sample_text
from ptq161.seeding import draw
from tests.conftest import TINY

TinyModel = Callable[..., PreTrainedModel]


def generator(seed: int = 0) -> torch.Generator:
    return torch.Generator().manual_seed(seed)


def test_the_same_generator_says_the_same(tiny_model: TinyModel) -> None:
    model = tiny_model("llama")
    first = sample_text(model, 5, 12, generator(), first=0, batch_size=2)
    assert first.shape == (5, 12) and first.dtype == torch.int64 and not first[:, 0].any()
    torch.manual_seed(7)
    before = torch.get_rng_state()
    assert torch.equal(sample_text(model, 5, 12, generator(), first=0, batch_size=2), first)
    assert torch.equal(torch.get_rng_state(), before) and not model.training
    assert not torch.equal(sample_text(model, 5, 12, generator(1), first=0, batch_size=2), first)
    assert len({tuple(row) for row in first.tolist()}) == 5


def test_without_a_first_token_each_sequence_draws_one(tiny_model: TinyModel) -> None:
    found = sample_text(tiny_model("llama"), 40, 2, generator())
    assert len(set(found[:, 0].tolist())) > 20


@pytest.mark.parametrize("architecture", TINY)
def test_the_cache_changes_nothing(tiny_model: TinyModel, architecture: str) -> None:
    """Each token is drawn as from the model's logits over the whole sequence before it."""
    model = tiny_model(architecture)
    found = sample_text(model, 3, 40, generator(), first=5)  # longer than the sliding window
    drawing = generator()
    with torch.no_grad():
        probabilities = model(found).logits.float().softmax(-1)
    for i in range(1, 40):
        drawn = draw(probabilities[:, i - 1], drawing)
        assert torch.equal(drawn, found[:, i])


def test_frequencies_are_the_models(tiny_model: TinyModel) -> None:
    model = tiny_model("llama")
    found = sample_text(model, 4000, 2, generator(), first=9, batch_size=4000)[:, 1]
    with torch.no_grad():
        expected = model(torch.tensor([[9]])).logits[0, 0].softmax(-1)
    counts = torch.bincount(found, minlength=256) / 4000
    assert float((counts - expected).abs().max()) < 4 * float((expected.max() / 4000).sqrt())


def test_the_tokenizer_says_where_texts_begin(tiny_tokenizer: PreTrainedTokenizerFast) -> None:
    assert first_token(tiny_tokenizer) == 0
    backend = tiny_tokenizer.backend_tokenizer
    assert first_token(PreTrainedTokenizerFast(tokenizer_object=backend, eos_token="</s>")) == 1
    assert first_token(PreTrainedTokenizerFast(tokenizer_object=backend)) is None


def test_a_model_without_a_head_is_refused(tiny_model: TinyModel) -> None:
    with pytest.raises(UserError, match="has no head"):
        sample_text(tiny_model("llama").model, 1, 4, generator())
