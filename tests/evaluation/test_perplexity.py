"""Perplexity against a computation by hand, its windows, and its refusals."""

import math

import pytest
import torch

from ptq161.errors import UserError
from ptq161.evaluation.likelihood import check_windows, perplexity


@pytest.fixture
def tokens():
    return torch.randint(3, 256, (83,), generator=torch.Generator().manual_seed(1))


def losses_by_hand(model, tokens, seq_len):
    """Mean negative log-likelihood of each full window, one forward pass and one probability at a time."""
    losses = []
    for start in range(0, len(tokens) - seq_len + 1, seq_len):
        window = tokens[start : start + seq_len]
        with torch.no_grad():
            probabilities = torch.softmax(model(window[None]).logits[0].double(), -1)
        picked = [-math.log(probabilities[i, window[i + 1]]) for i in range(seq_len - 1)]
        losses.append(sum(picked) / len(picked))
    return losses


@pytest.mark.parametrize("batch_size", [1, 3, 100])
def test_by_hand(tiny_model, tokens, batch_size):
    model = tiny_model("llama")
    losses = losses_by_hand(model, tokens, 16)
    assert len(losses) == 5  # 83 tokens: the last three are dropped
    found = perplexity(model, tokens, 16, batch_size=batch_size)
    mean = sum(losses) / 5
    assert found.value == pytest.approx(math.exp(mean), rel=1e-5)
    spread = math.sqrt(sum((loss - mean) ** 2 for loss in losses) / 4 / 5)
    assert found.standard_error == pytest.approx(found.value * spread, rel=1e-3)
    assert (found.seq_len, found.n_windows, found.n_tokens) == (16, 5, 80)


def test_papers_average(tiny_model, tokens):
    """The released evaluation codes sum mean * seq_len over the windows and divide by windows * seq_len."""
    model, seq_len = tiny_model("llama"), 20
    total = sum(torch.tensor(loss) * seq_len for loss in losses_by_hand(model, tokens, seq_len))
    assert perplexity(model, tokens, seq_len).value == pytest.approx(math.exp(total / (4 * seq_len)), rel=1e-5)


def test_max_windows_takes_the_first(tiny_model, tokens):
    model = tiny_model("llama")
    assert perplexity(model, tokens, 16, max_windows=2) == perplexity(model, tokens[:32], 16)
    assert perplexity(model, tokens, 16, max_windows=1).standard_error is None


def test_low_precision_keeps_dtype_and_takes_the_loss_in_float32(tiny_model, tokens):
    model = tiny_model("llama").bfloat16()
    found = perplexity(model, tokens, 16, batch_size=1)
    with torch.no_grad():
        logits = [model(window[None]).logits for window in tokens[:80].view(5, 16)]
    assert model.dtype == logits[0].dtype == torch.bfloat16
    by_hand = [
        torch.nn.functional.cross_entropy(one[0, :-1].float(), window[1:])
        for one, window in zip(logits, tokens[:80].view(5, 16), strict=True)
    ]
    assert found.value == pytest.approx(math.exp(sum(map(float, by_hand)) / 5), rel=1e-6)


def test_uniform_model_scores_its_vocabulary(tiny_model, tokens):
    model = tiny_model("llama")
    torch.nn.init.zeros_(model.lm_head.weight)
    assert perplexity(model, tokens, 16).value == pytest.approx(256, rel=1e-6)


def test_long_rows_are_chunked(tiny_model):
    """More rows of logits than one float32 chunk holds."""
    model = tiny_model("llama")
    tokens = torch.randint(3, 256, (1536,), generator=torch.Generator().manual_seed(2))
    found = perplexity(model, tokens, 512, batch_size=3)
    assert found.value == pytest.approx(math.exp(sum(losses_by_hand(model, tokens, 512)) / 3), rel=1e-5)


def test_refusals(tiny_model, tokens):
    model = tiny_model("llama")
    with pytest.raises(UserError, match=r"eval\.seq_len=84: the text has only 83 tokens"):
        perplexity(model, tokens, 84)
    with pytest.raises(UserError, match=r"eval\.seq_len=513: the model takes at most 512 tokens"):
        perplexity(model, tokens.repeat(10), 513)
    check_windows(10, 10, None)
    with torch.no_grad():
        model.lm_head.weight[5] = math.nan
    with pytest.raises(UserError, match="window 0 is not finite"):
        perplexity(model, tokens, 16)
