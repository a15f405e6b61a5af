"""A model in host memory whose blocks are worked on elsewhere: nothing forgets the device, on one that is not there."""

from __future__ import annotations

import copy
from collections.abc import Callable
from typing import Any

import pytest
import torch
from transformers import PreTrainedModel

import ptq161
from ptq161.finetune.adapters import tune
from ptq161.finetune.training import distil
from ptq161.methods.rtn import RTN
from ptq161.numerics import resolve_device
from ptq161.preprocess.rounds import restore
from tests.conftest import every_method
from tests.fake_cuda import OnGPU, fake_gpu
from tests.finetune import conftest as finetuned
from tests.finetune.test_adapters import short as short_tuning
from tests.preprocess.conftest import sequences, short

TinyModel = Callable[..., PreTrainedModel]
TOKENS = torch.randint(3, 256, (3, 16), generator=torch.Generator().manual_seed(0))
METHODS = every_method(bits=3, epochs=1) | {
    "qdrop": ptq161.QDrop(bits=3, steps=2, batch_size=2),
    "one level": ptq161.Waterfill(level="model", epochs=1, batch_size=2, absorb_epochs=1),
    "learned codes": ptq161.PTQ161(epochs=1, codes="learned"),
}
TRAININGS: dict[str, dict[str, Any]] = {
    "low rank": {},
    "full": {"update": "full", "objective": "kl_hidden"},
    "gsq_tuning": {"arithmetic": "gse", "base": "nf4"},
    "metis": {"update": "full", "arithmetic": "metis", "format": "nvfp4"},
}


DRAWN = ("low rank", "gsq_tuning")
"""Their adapters are drawn on the device."""


def assert_close(found: PreTrainedModel, expected: PreTrainedModel, least: float = 0.999) -> None:
    """The same model in host memory, but for codes that a sum rounded another way has turned over."""
    left, right = found.state_dict(), expected.state_dict()
    assert left.keys() == right.keys() and not any(isinstance(x, OnGPU) for x in left.values())
    a, b = (model(TOKENS).logits.flatten() for model in (found, expected))
    assert torch.cosine_similarity(a, b, dim=0) > least


def test_a_device_is_named_as_tensors_name_it() -> None:
    with fake_gpu() as device:
        assert resolve_device("auto") == resolve_device("cuda") == torch.device(device)


def test_the_gpu_that_is_not_there() -> None:
    with fake_gpu() as device:
        weight = torch.ones(2, 3, device=device, requires_grad=True)
        product = weight @ torch.arange(3.0, device=device)
        product.sum().backward()
        assert weight.grad is not None and weight.grad.device == weight.device == torch.device(device)
        assert weight.grad.cpu().tolist() == [[0, 1, 2], [0, 1, 2]]
        with pytest.raises(RuntimeError, match="two devices"):
            product + torch.ones(2)
        with pytest.raises(RuntimeError, match="generator of cpu"):
            torch.rand(2, device=device, generator=torch.Generator())
        with pytest.raises(TypeError, match="numpy"):
            product.detach().numpy()


@pytest.mark.parametrize("name", METHODS)
def test_every_method(tiny_model: TinyModel, name: str) -> None:
    expected = ptq161.quantize(tiny_model("llama", n_blocks=1), TOKENS, METHODS[name])
    with fake_gpu() as device:
        found = ptq161.quantize(tiny_model("llama", n_blocks=1), TOKENS, METHODS[name], device=device)
    assert_close(found, expected, least=0.9 if name == "quant_dllm" else 0.99)


@pytest.mark.parametrize(("method", "update"), [("rtn", "scales"), ("vptq", "scales"), ("waterfill", "codes")])
def test_distillation(method: str, update: str) -> None:
    packed, full, tokens = finetuned.packed_model(method), finetuned.full_model(), finetuned.tokens()
    settings = finetuned.short(update=update)
    expected = distil(copy.deepcopy(packed), full, tokens, settings)
    with fake_gpu() as device:
        found = distil(packed, full, tokens, settings, device=device)
    assert_close(found, expected)


def test_adapters() -> None:
    packed, tokens = finetuned.packed_model("ptq161"), finetuned.tokens()
    expected = tune(copy.deepcopy(packed), tokens, short_tuning())
    with fake_gpu() as device:
        found = tune(packed, tokens, short_tuning(), device=device)
    assert_close(found, expected)


@pytest.mark.parametrize("name", TRAININGS)
def test_preprocessing(tiny_model: TinyModel, name: str) -> None:
    settings = short(**TRAININGS[name])
    expected, _ = restore(tiny_model("llama", n_blocks=1), sequences(6), sequences(3), RTN(bits=3), settings)
    with fake_gpu() as device:
        found, _ = restore(
            tiny_model("llama", n_blocks=1), sequences(6), sequences(3), RTN(bits=3), settings, device=device
        )
    assert_close(found, expected, least=0.95 if name in DRAWN else 0.999)
