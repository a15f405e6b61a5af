"""A tiny model that was trained, its quantized forms, and short trainings of these."""

from __future__ import annotations

import copy
import functools
from typing import Any

import torch
from torch import Tensor
from transformers import PreTrainedModel

import ptq161
from ptq161.finetune.distillation import Distillation
from ptq161.methods.base import Method
from tests.conftest import _tiny_model, _tiny_tokenizer, every_method
from tests.preprocess.conftest import text_tokens

METHODS: dict[str, Method] = every_method(bits=2, epochs=0) | {
    "waterfill": ptq161.Waterfill(level="linear", epochs=0, batch_size=2),
    "ptq161": ptq161.PTQ161(epochs=0),
}
del METHODS["fp8"]  # which leaves a finetuning nothing to gain
LEARNABLE = ("waterfill", "ptq161")


def short(**changes: Any) -> Distillation:
    """A training of 6 steps in float32."""
    settings: dict[str, Any] = {"lr": 1e-2, "code_lr": 1e-2, "steps": 6, "batch_size": 4, "seq_len": 32}
    settings |= {"held_out": 4, "held_out_every": 2, "patience": None, "checkpoint_every": 2}
    return Distillation(**settings | changes)


@functools.cache
def tokens(n: int = 24) -> Tensor:
    return text_tokens(_tiny_tokenizer(), 100, n, 32)


@functools.cache
def full_model() -> PreTrainedModel:
    """Trained for a moment, so that its distributions say something."""
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        model = _tiny_model("llama").train()
        optimizer = torch.optim.AdamW(model.parameters(), lr=3e-3)
        for step in range(60):
            batch = tokens(64)[torch.arange(8 * step, 8 * step + 8) % 64]
            model(batch, labels=batch).loss.backward()
            optimizer.step()
            optimizer.zero_grad()
    return model.eval()


@functools.cache
def _packed(method: str) -> PreTrainedModel:
    return ptq161.quantize(copy.deepcopy(full_model()), tokens()[:4], METHODS[method])


def packed_model(method: str) -> PreTrainedModel:
    """A copy of the model as a method has quantized it."""
    return copy.deepcopy(_packed(method))


def divergence(packed: PreTrainedModel, sequences: Tensor) -> float:
    """KL of the full-precision model's distributions and the quantized model's, in nats a token."""
    with torch.no_grad():
        teacher, student = (model(sequences).logits.log_softmax(-1) for model in (full_model(), packed))
        return float((teacher.exp() * (teacher - student)).sum(-1).mean())
