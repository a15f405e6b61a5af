"""A tiny model that has learned something, and short trainings of it."""

from __future__ import annotations

import copy
from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor
from transformers import PreTrainedModel, PreTrainedTokenizerFast

from ptq161.preprocess.restoration import Restoration

TinyModel = Callable[..., PreTrainedModel]


def short(**changes: Any) -> Restoration:
    """A training of 4 steps in float32."""
    settings: dict[str, Any] = {"rank": 4, "dropout": 0.0, "lr": 1e-2, "steps": 4, "batch_size": 2, "seq_len": 32}
    settings |= {"accumulation": 1, "mask": "fresh", "checkpoint_every": 2}
    return Restoration(**settings | changes)


def sequences(n: int, seq_len: int = 32, seed: int = 0) -> Tensor:
    return torch.randint(3, 256, (n, seq_len), generator=torch.Generator().manual_seed(seed))


def text_tokens(tokenizer: PreTrainedTokenizerFast, start: int, n: int, seq_len: int = 64) -> Tensor:
    """Sentences about the numbers from ``start`` on, as ``[n, seq_len]``."""
    numbers = range(start, start + n * seq_len // 20)
    text = "".join(f"The number {i} follows {i - 1}, and {i + 1} comes next. " for i in numbers)
    return torch.tensor(tokenizer(text)["input_ids"])[: n * seq_len].view(n, seq_len)


@pytest.fixture(scope="session")
def pretrained(tiny_tokenizer: PreTrainedTokenizerFast) -> Callable[[], PreTrainedModel]:
    """Factory of copies of a tiny Llama that was trained on such sentences from scratch."""
    from tests.conftest import _tiny_model

    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        model = _tiny_model("llama")
        tokens = text_tokens(tiny_tokenizer, 100, 256)
        optimizer = torch.optim.AdamW(model.parameters(), lr=3e-3)
        model.train()
        for step in range(240):
            batch = tokens[torch.arange(16 * step, 16 * step + 16) % len(tokens)]
            model(batch, labels=batch).loss.backward()
            optimizer.step()
            optimizer.zero_grad()
        model.eval()
    return lambda: copy.deepcopy(model)


def loss_of(model: PreTrainedModel, tokens: Tensor) -> float:
    with torch.no_grad():
        return float(model(tokens, labels=tokens).loss)
