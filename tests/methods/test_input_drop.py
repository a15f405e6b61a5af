"""``input_drop``, of every method that learns block by block: off by default, and then as if it were not there."""

from __future__ import annotations

import dataclasses
from collections.abc import Callable

import pytest
import torch
from torch import nn
from transformers import PreTrainedModel

import ptq161
from ptq161.errors import UserError
from ptq161.files.hashing import sha256_of_tensors
from ptq161.methods import blockwise
from ptq161.methods.base import Window, ignore_metric
from ptq161.methods.blockwise import mixed_inputs

TOKENS = torch.randint(3, 256, (4, 16), generator=torch.Generator().manual_seed(4))
METHODS = {
    "ptq161": ptq161.PTQ161(epochs=1, batch_size=2, angle_lr=1e-2),
    "ptq161, learned codes": ptq161.PTQ161(epochs=1, batch_size=2, codes="learned", code_lr=0.1, held_out=0.0),
    "omniquant": ptq161.OmniQuant(epochs=1, batch_size=2, lr=0.5),
    "waterfill": ptq161.Waterfill(epochs=1, level="linear", batch_size=2, code_lr=0.1, held_out=0.0),
    "vptq": ptq161.VPTQ(vector_length=2, centroids=8, iterations=2, refit_steps=2, refit_lr=0.05, batch_size=2),
}


def window(samples: int = 3) -> Window:
    block = nn.Sequential(nn.Linear(8, 8, bias=False))
    return Window(
        first_block=0,
        blocks=[block],
        input_groups=[["0.0"]],
        linears={"0.0": block[0]},
        quant_inputs=torch.zeros(samples, 50, 8),
        full_outputs=None,
        activations={},
        salient_masks=None,
        run_block=lambda i, hidden: block(hidden),
        generator=lambda stage: torch.Generator().manual_seed(1),
        on_metric=ignore_metric,
        device=torch.device("cpu"),
        full_inputs=torch.arange(1.0, samples + 1).view(-1, 1, 1).expand(samples, 50, 8),
    )


@pytest.mark.parametrize("drop", [0.1, 0.5, 0.9])
def test_a_share_of_the_elements_is_that_of_the_other_chain(drop: float) -> None:
    mixed = mixed_inputs(window(), torch.tensor([2, 0]), drop, torch.Generator().manual_seed(0))
    for sample, value in zip(mixed, (3.0, 1.0), strict=True):
        assert set(sample.unique().tolist()) == {0.0, value}
        assert abs(float((sample == value).float().mean()) - drop) < 4 * (drop * (1 - drop) / 400) ** 0.5


def test_at_zero_no_random_number_is_drawn() -> None:
    generator = torch.Generator().manual_seed(0)
    before = generator.get_state()
    assert not mixed_inputs(window(), slice(0, 2), 0.0, generator).any()
    assert torch.equal(generator.get_state(), before)


def run(model: PreTrainedModel, method: object) -> str:
    return sha256_of_tensors(ptq161.quantize(model, TOKENS, method).state_dict())


@pytest.mark.parametrize("name", METHODS)
def test_every_method_takes_it(
    name: str, tiny_model: Callable[..., PreTrainedModel], monkeypatch: pytest.MonkeyPatch
) -> None:
    method = METHODS[name]
    plain = run(tiny_model("llama"), method)
    dropped = run(tiny_model("llama"), dataclasses.replace(method, input_drop=0.5))
    assert plain != dropped == run(tiny_model("llama"), dataclasses.replace(method, input_drop=0.5))
    # By default inputs are those of the quantized chain, however they are mixed.
    monkeypatch.setattr(blockwise, "mixed_inputs", _quantized_chain)
    monkeypatch.setattr("ptq161.methods.codes.learn.mixed_inputs", _quantized_chain)
    assert run(tiny_model("llama"), method) == plain


def _quantized_chain(window: Window, batch: slice, *_: object) -> torch.Tensor:
    return window.to_device(window.quant_inputs[batch])


@pytest.mark.parametrize("name", METHODS)
@pytest.mark.parametrize("drop", [-0.1, 1.5, float("nan")])
def test_what_is_no_probability(name: str, drop: float) -> None:
    with pytest.raises(UserError, match=r"method\.input_drop=.*: use a probability in \[0, 1\]\.$"):
        dataclasses.replace(METHODS[name], input_drop=drop)
