"""Distilling as a whole: that it helps, what it changes and what not, and that it goes on where it was cut off."""

from __future__ import annotations

import copy
import dataclasses
import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from transformers import PreTrainedModel, PreTrainedTokenizerFast

import ptq161
from ptq161.errors import UserError
from ptq161.finetune.distillation import Distillation
from ptq161.finetune.student import make_student
from ptq161.finetune.training import distil
from ptq161.methods.coded import coded_weight
from ptq161.packed.model import packed_linears, sha256_of_packed
from ptq161.packed.trainable import scale_tensors
from ptq161.training.losses import objective
from tests.conftest import TINY
from tests.finetune.conftest import LEARNABLE, METHODS, divergence, full_model, packed_model, short, tokens

TinyModel = Callable[..., PreTrainedModel]
CPU = torch.device("cpu")
CASES = [(method, "scales") for method in METHODS] + [(method, "codes") for method in LEARNABLE]


def finetuned(method: str, distillation: Distillation, **options: Any) -> PreTrainedModel:
    return distil(packed_model(method), full_model(), tokens(), distillation, **options)


def keeping(kept: list[Any], *names: str) -> Callable[..., None]:
    def on_metric(name: str, value: float, /, **where: int | str) -> None:
        if name in names:
            kept.append((name, value, where))

    return on_metric


@pytest.mark.parametrize(("method", "update"), CASES)
def test_what_is_held_out_is_closer_in_as_many_bytes(method: str, update: str) -> None:
    before, full = packed_model(method), copy.deepcopy(full_model().state_dict())
    held_out, losses = tokens()[:4], []
    after = finetuned(method, short(update=update), on_metric=keeping(losses, "finetune_held_out_loss"))
    torch.testing.assert_close(full_model().state_dict(), full, rtol=0, atol=0)
    assert losses[0][1] == pytest.approx(divergence(before, held_out), rel=1e-4)
    found = divergence(after, held_out)
    assert found < 0.95 * losses[0][1]
    # What is measured is what is stored, but for rounding scales to float16.
    assert found == pytest.approx(min(value for _, value, _ in losses), rel=2e-2)
    pairs = {name: (layer.packed, packed_linears(after)[name].packed) for name, layer in packed_linears(before).items()}
    assert pairs.keys() == packed_linears(after).keys()
    for old, new in pairs.values():
        assert (new.nbytes, new.settings()) == (old.nbytes, old.settings())
        for field, tensor in old.state_dict().items():
            is_scale = field in scale_tensors(old)
            assert is_scale or update == "codes" or torch.equal(new.state_dict()[field], tensor)
    if update == "codes":
        flips = [coded_weight(old).codes != coded_weight(new).codes for old, new in pairs.values()]
        assert 0 < sum(int(flip.sum()) for flip in flips) < 0.3 * sum(flip.numel() for flip in flips)


@pytest.mark.parametrize("update", ["scales", "codes"])
@pytest.mark.parametrize("architecture", TINY)
def test_every_architecture(tiny_model: TinyModel, architecture: str, update: str) -> None:
    model, losses = tiny_model(architecture), []
    packed = ptq161.quantize(tiny_model(architecture), tokens()[:2], METHODS["waterfill"])
    others = {name: p.clone() for name, p in packed.named_parameters() if "norm" not in name}
    settings = short(update=update, lr=3e-2, steps=8, held_out=0, warmup_share=0.0)
    found = distil(packed, model, tokens()[:4], settings, on_metric=keeping(losses, "finetune_loss"))
    assert found is packed and losses[-1][1] < losses[0][1]
    torch.testing.assert_close({n: p for n, p in packed.named_parameters() if n in others}, others, rtol=0, atol=0)
    assert torch.isfinite(packed(tokens()[:2]).logits).all() and not packed.training


def test_gradients_of_scales_are_those_of_a_dense_model() -> None:
    """The chain rule by hand: the gradient of a row's scale is that of the dense weight times the weight, over it."""
    packed = packed_model("rtn")
    settings = short(train_norms=False)
    student = make_student(packed, full_model(), settings, CPU)
    objective(student.model, full_model(), settings)(tokens()[:2]).backward()
    dense = copy.deepcopy(packed)
    for name, layer in packed_linears(packed).items():
        linear = nn.Linear(layer.in_features, layer.out_features, bias=False)
        linear.weight = nn.Parameter(layer.dequantize())
        dense.set_submodule(name, linear)
    objective(dense, full_model(), settings)(tokens()[:2]).backward()
    for name in packed_linears(packed):
        weight = dense.get_parameter(f"{name}.weight")
        assert weight.grad is not None
        expected = (weight.grad * weight).sum(1, keepdim=True)  # a gain of one doubles the scale
        found = student.model.get_parameter(f"{name}.gains.scales").grad
        torch.testing.assert_close(found, expected, rtol=1e-3, atol=1e-6)


def test_norms_are_trained_relative_to_their_factor(tiny_model: TinyModel) -> None:
    packed = ptq161.quantize(tiny_model("gemma2"), tokens()[:2], METHODS["rtn"])
    names = [name for name, _ in packed.named_parameters() if "norm" in name]
    before = {name: packed.get_parameter(name).detach().clone() for name in names}
    distil(packed, tiny_model("gemma2"), tokens()[:8], short())
    moved = [float((packed.get_parameter(name).detach() - before[name]).abs().max()) for name in names]
    assert min(moved) > 0  # zero stands for a factor of one there
    student = make_student(packed_model("rtn"), full_model(), short(), CPU)
    assert len(student.norms) == 2 * 2 + 1
    kept = finetuned("rtn", short(train_norms=False))
    assert torch.equal(kept.model.norm.weight, packed_model("rtn").model.norm.weight)


def test_no_update_is_kept_where_none_helps() -> None:
    losses: list[Any] = []
    settings = short(lr=30.0, steps=4, warmup_share=0.0, max_grad_norm=1e6)
    after = finetuned("rtn", settings, on_metric=keeping(losses, "finetune_held_out_loss"))
    assert min(value for _, value, _ in losses) == losses[0][1]
    assert sha256_of_packed(after) == sha256_of_packed(packed_model("rtn"))


def test_patience_ends_a_training_early() -> None:
    losses: list[Any] = []
    settings = short(lr=30.0, steps=40, warmup_share=0.0, max_grad_norm=1e6, patience=2)
    on_metric = keeping(losses, "finetune_loss", "finetune_held_out_loss")
    finetuned("rtn", settings, on_metric=on_metric)
    assert [where["step"] for name, _, where in losses if name == "finetune_held_out_loss"] == [0, 2, 4]
    assert len([name for name, *_ in losses if name == "finetune_loss"]) == 4


def test_held_out_sequences_are_never_trained_on(monkeypatch: pytest.MonkeyPatch) -> None:
    trained: list[Tensor] = []

    def recording(*arguments: Any) -> Callable[[Tensor], Tensor]:
        loss_of = objective(*arguments)

        def keep(batch: Tensor) -> Tensor:
            if torch.is_grad_enabled():
                trained.append(batch)
            return loss_of(batch)

        return keep

    monkeypatch.setattr("ptq161.finetune.training.objective", recording)
    finetuned("rtn", short(steps=10))
    seen = {tuple(row) for row in torch.cat(trained).tolist()}
    assert seen == {tuple(row) for row in tokens()[4:].tolist()}


def test_the_hidden_states_may_be_part_of_the_objective() -> None:
    losses: list[Any] = []
    finetuned("rtn", short(objective="kl_hidden", steps=4), on_metric=keeping(losses, "finetune_held_out_loss"))
    assert losses[-1][1] < losses[0][1] and losses[0][1] > divergence(packed_model("rtn"), tokens()[:4])


@pytest.mark.parametrize(("method", "update"), [("rtn", "scales"), ("quip", "scales"), ("waterfill", "codes")])
def test_bfloat16_is_close(method: str, update: str) -> None:
    found = [
        divergence(finetuned(method, short(update=update, compute_dtype=dtype)), tokens()[:4])
        for dtype in ("float32", "bfloat16")
    ]
    assert found[1] == pytest.approx(found[0], rel=0.1)
    assert found[1] < 0.95 * divergence(packed_model(method), tokens()[:4])


def test_a_checkpoint_of_it_is_loaded_as_it_was(tmp_path: Path, tiny_tokenizer: PreTrainedTokenizerFast) -> None:
    after = finetuned("waterfill", short(update="codes"))
    ptq161.save(after, tiny_tokenizer, tmp_path / "checkpoint")
    loaded, _ = ptq161.load(tmp_path / "checkpoint")
    assert sha256_of_packed(loaded) == sha256_of_packed(after)


# --- determinism and resuming -----------------------------------------------------------------------------------------


class KilledError(Exception):
    """Stands for a kill."""


NAMES = ("finetune_loss", "finetune_lr", "finetune_held_out_loss")


@pytest.mark.parametrize("step", [0, 2, 3, 5])
@pytest.mark.parametrize("update", ["scales", "codes"])
def test_a_killed_training_ends_in_the_same_bytes(tmp_path: Path, update: str, step: int) -> None:
    settings = short(update=update, accumulation=2, batch_size=2, patience=4, held_out_every=1)
    whole: list[Any] = []
    expected = finetuned("waterfill", settings, on_metric=keeping(whole, *NAMES))

    def killing(name: str, value: float, /, **where: int | str) -> None:
        if (name, where.get("step")) == ("finetune_loss", step):
            raise KilledError

    with pytest.raises(KilledError):
        finetuned("waterfill", settings, folder=tmp_path, on_metric=killing)
    torch.manual_seed(99)  # whatever the next process has drawn before
    state, resumed = torch.get_rng_state(), list[Any]()
    found = finetuned("waterfill", settings, folder=tmp_path, on_metric=keeping(resumed, *NAMES))
    assert torch.equal(torch.get_rng_state(), state)
    assert sha256_of_packed(found) == sha256_of_packed(expected) != sha256_of_packed(packed_model("waterfill"))
    assert resumed == whole


def test_an_early_end_is_not_trained_on(tmp_path: Path) -> None:
    settings = short(lr=30.0, steps=40, warmup_share=0.0, max_grad_norm=1e6, patience=2)
    expected = finetuned("rtn", settings, folder=tmp_path)
    file = tmp_path / "distillation.pt"
    written, emitted = file.stat().st_mtime_ns, list[Any]()
    assert set(torch.load(file)) == {"done", "rows", "trained"}
    again = finetuned("rtn", settings, folder=tmp_path, on_metric=keeping(emitted, "finetune_loss"))
    assert sha256_of_packed(again) == sha256_of_packed(expected)
    assert file.stat().st_mtime_ns == written and len(emitted) == 4


def test_nothing_but_the_seed_counts() -> None:
    first = sha256_of_packed(finetuned("rtn", short(), seed=3))
    torch.manual_seed(2)
    assert sha256_of_packed(finetuned("rtn", short(), seed=3)) == first
    assert sha256_of_packed(finetuned("rtn", short(), seed=4)) != first


# --- refusals ---------------------------------------------------------------------------------------------------------


def refused(call: Callable[[], object]) -> str:
    with pytest.raises(UserError) as caught:
        call()
    return str(caught.value)


def test_another_trainings_folder_is_refused(tmp_path: Path) -> None:
    finetuned("rtn", short(), folder=tmp_path)
    for changes, part in (
        ({"lr": 0.5}, "finetune.lr is 0.5 here and 0.01 there"),
        ({"update": "codes"}, "format uniform"),
        ({"patience": 1}, "finetune.patience is 1 here"),
    ):
        assert part in refused(lambda changes=changes: finetuned("rtn", short(**changes), folder=tmp_path))
    assert "seed is 1 here and 0 there" in refused(lambda: finetuned("rtn", short(), folder=tmp_path, seed=1))
    assert "packed is" in refused(lambda: finetuned("billm", short(), folder=tmp_path))
    fewer = tokens()[:20]
    assert "tokens is" in refused(lambda: distil(packed_model("rtn"), full_model(), fewer, short(), folder=tmp_path))
    finetuned("rtn", short(checkpoint_every=3, score_before=False), folder=tmp_path)  # what changes no weight
    assert json.loads((tmp_path / "fingerprint.json").read_text())["finetune"]["steps"] == 6


def test_damaged_checkpoints_are_refused(tmp_path: Path) -> None:
    finetuned("rtn", short(), folder=tmp_path)
    file = tmp_path / "distillation.pt"
    file.write_bytes(file.read_bytes()[:1000])
    assert refused(lambda: finetuned("rtn", short(), folder=tmp_path)) == (
        f"{file} is damaged: delete it to train anew."
    )


def test_a_loss_that_is_not_finite_names_step_and_rate() -> None:
    settings = short(lr=1e30, warmup_share=0.0, held_out=0)
    sentence = refused(lambda: finetuned("rtn", settings))
    assert sentence.startswith("the loss of finetuning is nan, first seen in ")
    assert "(step " in sentence and sentence.endswith("at learning rate 9.33e+29: lower finetune.lr.")
    settings = dataclasses.replace(settings, update="codes")
    assert refused(lambda: finetuned("waterfill", settings)).endswith("lower finetune.lr or finetune.code_lr.")


def test_codes_that_cannot_be_learned_are_refused() -> None:
    assert refused(lambda: finetuned("rtn", short(update="codes"))) == (
        "finetune.update=codes: the codes of model.layers.0.self_attn.q_proj (format uniform) cannot be learned, only "
        "those of the formats allotted, structured_binary; use update=scales."
    )


def test_models_that_do_not_fit(tiny_model: TinyModel) -> None:
    packed, full = packed_model("rtn"), full_model()
    assert refused(lambda: distil(full, full, tokens(), short())) == (
        "the model to finetune has no packed linears: quantize it first."
    )
    assert "already quantized" in refused(lambda: distil(packed, packed, tokens(), short()))
    assert refused(lambda: distil(packed, tiny_model("llama", n_blocks=1), tokens(), short())).startswith(
        "the full-precision model (llama, 1 blocks, embedding [256, 64]) is not the one that was quantized (llama, 2 "
    )
    assert "has no head" in refused(lambda: distil(packed, full.model, tokens(), short()))


def test_tokens_that_do_not_fit() -> None:
    packed, full = packed_model("rtn"), full_model()
    assert refused(lambda: distil(packed, full, tokens()[:4], short())) == (
        "finetune.held_out=4 leaves nothing to train on: the text has 4 sequences; set finetune.held_out to at most 3, "
        "or give more text."
    )
    assert refused(lambda: finetuned("rtn", short(seq_len=1024))) == (
        "finetune.seq_len=1024: the model takes at most 512 tokens; set finetune.seq_len to at most 512."
    )
    assert "held-out tokens are of float32" in refused(
        lambda: finetuned("rtn", short(), held_out_tokens=torch.zeros(2, 32))
    )
    given = distil(packed, full, tokens()[:4], short(), held_out_tokens=tokens()[4:8])
    assert divergence(given, tokens()[4:8]) < divergence(packed_model("rtn"), tokens()[4:8])


def test_a_format_without_scales_has_norms_to_train() -> None:
    with pytest.raises(UserError, match=r"^finetune.train_norms=false: the format gse stores no scales"):
        finetuned("gse", short(train_norms=False))
