"""Adapters on a quantized model: that they learn a text, what stays, what is stored, and that a training goes on."""

from __future__ import annotations

import copy
import dataclasses
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from transformers import PreTrainedModel

import ptq161
from ptq161.errors import UserError
from ptq161.finetune.adapters import make_student, tune
from ptq161.finetune.tuning import Tuning
from ptq161.packed.adapted import AdaptedWeight
from ptq161.packed.model import packed_linears
from ptq161.training.losses import objective
from tests.conftest import TINY
from tests.finetune.conftest import packed_model, tokens

TinyModel = Callable[..., PreTrainedModel]
CPU = torch.device("cpu")


def short(**changes: Any) -> Tuning:
    """A training of 6 steps in integers of 8 bits."""
    settings: dict[str, Any] = {"rank": 8, "lr": 1e-2, "steps": 6, "batch_size": 4, "seq_len": 32}
    settings |= {"corpora": ["squad"], "held_out": 4, "held_out_every": 2, "checkpoint_every": 2}
    return Tuning(**settings | changes)


def loss_of(model: PreTrainedModel) -> float:
    with torch.no_grad():
        return float(objective(model, None, short())(tokens()[:4]))


def recording(emitted: dict[str, list[float]]) -> Callable[..., None]:
    def on_metric(name: str, value: float, /, **where: int | str) -> None:
        emitted.setdefault(name, []).append(value)

    return on_metric


@pytest.mark.parametrize("method", ["nf4", "gse", "quip", "vptq", "ptq161"])
def test_adapters_on_any_format(method: str) -> None:
    before, emitted = packed_model(method), {}
    after = tune(packed_model(method), tokens(), short(), on_metric=recording(emitted))
    held_out = emitted["finetune_held_out_loss"]
    assert held_out[0] == pytest.approx(loss_of(before), rel=0.02)  # the adapters are zero
    # What is measured is what is stored: without the integers of the training.
    assert loss_of(after) == pytest.approx(min(held_out), rel=0.02)
    assert loss_of(after) < 0.97 * loss_of(before)
    for name, layer in packed_linears(before).items():
        found = packed_linears(after)[name].packed
        assert isinstance(found, AdaptedWeight) and found.base.settings() == layer.packed.settings()
        for field, tensor in layer.packed.state_dict().items():
            assert torch.equal(found.base.state_dict()[field], tensor)
        assert found.nbytes == layer.packed.nbytes + 2 * 8 * (layer.in_features + layer.out_features)
    rest = {n: p for n, p in before.named_parameters()}
    torch.testing.assert_close(dict(after.named_parameters()), rest, rtol=0, atol=0)
    trained = 4 * 8 * sum(layer.in_features + layer.out_features for layer in packed_linears(before).values())
    assert emitted["finetune_trained_bytes"] == [trained] and emitted["finetune_optimizer_bytes"] == [2 * trained]
    assert emitted["finetune_base_bytes"] == [sum(x.packed.nbytes for x in packed_linears(before).values())]


@pytest.mark.parametrize("architecture", TINY)
def test_every_architecture(tiny_model: TinyModel, architecture: str) -> None:
    packed = ptq161.quantize(tiny_model(architecture), tokens()[:2], ptq161.RTN(bits=3))
    emitted: dict[str, list[float]] = {}
    tune(packed, tokens()[:4], short(held_out=0, steps=8, targets=["q", "down"]), on_metric=recording(emitted))
    assert emitted["finetune_loss"][-1] < emitted["finetune_loss"][0]
    formats = {name.rpartition(".")[2]: layer.packed.format for name, layer in packed_linears(packed).items()}
    assert {end for end, stored in formats.items() if stored == "adapted"} <= {"q_proj", "down_proj", "fc2"}
    assert torch.isfinite(packed(tokens()[:2]).logits).all() and not packed.training


@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
def test_the_start_is_the_quantized_model_in_integers(dtype: str) -> None:
    packed = packed_model("nf4")
    names = list(packed_linears(packed))
    student = make_student(packed, names, short(arithmetic="float", compute_dtype=dtype), CPU)
    trained = {name for name, p in student.named_parameters() if p.requires_grad}
    assert trained == {f"{name}.lora_{factor}" for name in names for factor in "AB"}
    expected = packed(tokens()[:2]).logits
    with torch.autocast("cpu", torch.bfloat16, enabled=dtype == "bfloat16"):
        found = student(tokens()[:2]).logits.float()
    assert (found - expected).norm() < (1e-5 if dtype == "float32" else 0.03) * expected.norm()


class KilledError(Exception):
    """Stands for a kill."""


def test_a_killed_training_ends_in_the_same_bytes(tmp_path: Path) -> None:
    settings = short(bits=5, stochastic_rounding=True, dropout=0.1, accumulation=2)
    expected = tune(packed_model("rtn"), tokens(), settings, seed=3)

    def kill(name: str, value: float, /, **where: int | str) -> None:
        if name == "finetune_loss" and where["step"] == 3:
            raise KilledError

    with pytest.raises(KilledError):
        tune(packed_model("rtn"), tokens(), settings, seed=3, folder=tmp_path, on_metric=kill)
    torch.manual_seed(99)
    found = tune(packed_model("rtn"), tokens(), settings, seed=3, folder=tmp_path)
    torch.testing.assert_close(found.state_dict(), expected.state_dict(), rtol=0, atol=0)
    with pytest.raises(UserError, match=r"belongs to another computation \(finetune.bits is 6 here and 5 there\)"):
        tune(packed_model("rtn"), tokens(), dataclasses.replace(settings, bits=6), seed=3, folder=tmp_path)


@pytest.mark.parametrize(
    ("values", "sentence"),
    [
        ({"arithmetic": "int8"}, "finetune.arithmetic=int8: use one of float, gse"),
        ({"bits": 1}, "finetune.bits=1: use 2 to 8."),
        ({"adapter_dtype": "bfloat16"}, "finetune.adapter_dtype=bfloat16: use one of float16, float32."),
        ({"targets": ["x"]}, "finetune.targets=x: use one of q, k, v, o, gate, up, down."),
        ({"corpora": ["text_file"]}, "finetune.corpora=[text_file] needs a file: set finetune.text_file=FILE."),
        ({"rank": 0}, "finetune.rank=0: use at least 1."),
        ({"patience": 0}, "finetune.patience=0: use at least 1."),
        ({"lr": 0.0}, "finetune.lr=0.0: use a finite number above 0."),
        ({"dropout": 1.0}, "finetune.dropout=1.0: use a share in [0, 1)."),
    ],
)
def test_settings_that_are_refused(values: dict[str, Any], sentence: str) -> None:
    with pytest.raises(UserError) as caught:
        short(**values)
    assert str(caught.value).startswith(sentence)


def test_models_that_are_refused(tiny_model: TinyModel) -> None:
    with pytest.raises(UserError, match=r"has no packed linears: quantize it first\.$"):
        tune(tiny_model("llama"), tokens(), short())
    tuned = tune(packed_model("rtn"), tokens(), short(steps=1, targets=["v"]))
    with pytest.raises(UserError, match=r"has adapters already \(at model.layers.0.self_attn.v_proj\)"):
        tune(copy.deepcopy(tuned), tokens(), short())
    with pytest.raises(UserError, match=r"finetune.seq_len=1024: the model takes at most 512 tokens"):
        tune(packed_model("rtn"), tokens(), short(seq_len=1024))


def test_rounded_activations_have_no_adapters(tiny_model: TinyModel) -> None:
    method = ptq161.QDrop(bits=4, activation_bits=8, steps=1)
    with pytest.raises(UserError, match="activations are quantized to 8 bits"):
        tune(ptq161.quantize(tiny_model("llama"), tokens()[:2], method), tokens(), short())


@pytest.mark.parametrize("settings", [{"format": "mxfp4"}, {"format": "nvfp4", "spectral_rank": 3}])
def test_adapters_in_floats_of_four_bits_learn(settings: dict[str, Any]) -> None:
    losses: list[float] = []

    def on_metric(name: str, value: float, /, **where: int | str) -> None:
        if name == "finetune_held_out_loss":
            losses.append(value)

    tune(copy.deepcopy(packed_model("rtn")), tokens(), short(arithmetic="metis", **settings), on_metric=on_metric)
    assert losses[-1] < 0.95 * losses[0]


def test_a_rank_that_an_adapter_does_not_have() -> None:
    with pytest.raises(UserError, match=r"finetune\.spectral_rank=8: a trained matrix has only 8 rows or columns"):
        tune(copy.deepcopy(packed_model("rtn")), tokens(), short(arithmetic="metis", spectral_rank=8))
