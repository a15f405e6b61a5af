"""Restoring as a whole: what it changes and what not, that it helps, and that it goes on where it was cut off."""

from __future__ import annotations

import copy
import dataclasses
import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor
from transformers import PreTrainedModel, PreTrainedTokenizerFast

import ptq161
from ptq161.errors import UserError
from ptq161.methods.base import ignore_metric
from ptq161.methods.gptq import GPTQ
from ptq161.methods.ptq161 import PTQ161
from ptq161.methods.rtn import RTN
from ptq161.models.architectures import quantized_linears
from ptq161.packed.masks import salient_masks
from ptq161.preprocess.restoration import Restoration
from ptq161.preprocess.rounds import restore
from ptq161.preprocess.student import make_student
from ptq161.preprocess.training import train
from tests.conftest import TINY
from tests.preprocess.conftest import loss_of, sequences, short, text_tokens

TinyModel = Callable[..., PreTrainedModel]
CALIBRATION = sequences(4, seed=7)
TRAINING = sequences(6, seed=8)
COARSE = RTN(bits=2)
QUICK = PTQ161(epochs=1, batch_size=2)


def restored(model: PreTrainedModel, restoration: Restoration, method: Any = COARSE, **options: Any) -> PreTrainedModel:
    return restore(model, TRAINING, CALIBRATION, method, restoration, **options)[0]


def same(a: PreTrainedModel, b: PreTrainedModel) -> bool:
    mine, theirs = a.state_dict(), b.state_dict()
    return mine.keys() == theirs.keys() and all(torch.equal(mine[name], theirs[name]) for name in mine)


@pytest.mark.parametrize("objective", ["lm", "kl", "kl_hidden"])
@pytest.mark.parametrize("update", ["lora", "full"])
def test_a_restored_model_quantizes_better(
    pretrained: Callable[[], PreTrainedModel], tiny_tokenizer: PreTrainedTokenizerFast, update: str, objective: str
) -> None:
    model = pretrained()
    unseen, calibration = text_tokens(tiny_tokenizer, 700, 16), text_tokens(tiny_tokenizer, 500, 8)
    training = text_tokens(tiny_tokenizer, 100, 160)
    before = loss_of(ptq161.quantize(copy.deepcopy(model), calibration, QUICK), unseen)
    restoration = short(
        update=update, objective=objective, lr=3e-3, steps=60, batch_size=8, seq_len=64, rank=16, alpha=16.0
    )
    merged, _ = restore(model, training, calibration, QUICK, restoration)
    after = loss_of(ptq161.quantize(merged, calibration, QUICK), unseen)
    full = loss_of(model, unseen)
    assert full + 1 < before  # there is something to restore
    assert after < full + 0.6 * (before - full)


@pytest.mark.parametrize("update", ["lora", "full"])
@pytest.mark.parametrize("architecture", TINY)
def test_every_architecture(tiny_model: TinyModel, architecture: str, update: str) -> None:
    model = tiny_model(architecture)
    before = copy.deepcopy(model.state_dict())
    losses: list[float] = []

    def keep_loss(name: str, value: float, /, **where: int | str) -> None:
        if name == "preprocess_loss":
            losses.append(value)

    # One batch over and over: it must be learned.
    one = TRAINING[:2]
    restoration = short(update=update, steps=6)
    merged, _ = restore(model, one, CALIBRATION, COARSE, restoration, on_metric=keep_loss)
    assert losses[-1] < losses[0]
    torch.testing.assert_close(model.state_dict(), before, rtol=0, atol=0)
    assert {p.dtype for p in merged.parameters()} == {torch.float32} and not merged.training
    assert not any(p.requires_grad is False for p in merged.parameters())
    assert all(isinstance(linear, torch.nn.Linear) for _, linear in quantized_linears(merged))
    packed = ptq161.quantize(merged, CALIBRATION, COARSE)
    assert torch.isfinite(packed(CALIBRATION).logits).all()


def test_rounds_build_on_each_other(tiny_model: TinyModel) -> None:
    model = tiny_model("llama")
    once = restored(model, short())
    emitted: list[tuple[str, int | str]] = []
    twice = restored(
        model, short(rounds=2), on_metric=lambda name, value, /, **where: emitted.append((name, where["round"]))
    )
    assert not same(once, twice)
    assert {round_ for name, round_ in emitted if name == "preprocess_loss"} == {0, 1}
    assert {round_ for name, round_ in emitted if name == "preprocess_quantize_nbytes"} == {0, 1}
    assert len([name for name, _ in emitted if name == "preprocess_loss"]) == 2 * 4


def test_the_second_round_starts_from_the_first_ones_result(tiny_model: TinyModel) -> None:
    """Targets that training does not touch are the twice quantized weights."""
    model = tiny_model("llama")
    merged = restored(model, short(rounds=2, targets=["q"]))
    plain = ptq161.quantize(copy.deepcopy(model), CALIBRATION, COARSE)
    name = "model.layers.0.mlp.down_proj"
    linear = plain.get_submodule(name)
    torch.testing.assert_close(merged.get_submodule(name).weight, linear.dequantize(), rtol=1e-4, atol=1e-5)


def test_the_first_mask_stays(tiny_model: TinyModel) -> None:
    model = tiny_model("llama")
    first = salient_masks(ptq161.quantize(copy.deepcopy(model), CALIBRATION, QUICK))
    restoration = short(mask="first", rounds=2, lr=5e-2)
    merged, masks = restore(model, TRAINING, CALIBRATION, QUICK, restoration)
    assert masks is not None
    torch.testing.assert_close(masks, first)
    fresh = salient_masks(ptq161.quantize(copy.deepcopy(merged), CALIBRATION, QUICK))
    assert any(not torch.equal(fresh[name], first[name]) for name in first)
    kept = salient_masks(ptq161.quantize(merged, CALIBRATION, QUICK, salient_masks=masks))
    torch.testing.assert_close(kept, first)


def test_fresh_masks_are_not_handed_on(tiny_model: TinyModel) -> None:
    assert restore(tiny_model("llama"), TRAINING, CALIBRATION, QUICK, short())[1] is None


def test_a_method_without_salient_channels_keeps_none(tiny_model: TinyModel) -> None:
    first, fresh = (
        restore(tiny_model("llama"), TRAINING, CALIBRATION, GPTQ(), short(mask=mask, rounds=2))
        for mask in ("first", "fresh")
    )
    assert first[1] is None
    assert same(first[0], fresh[0])


# --- determinism and resuming -----------------------------------------------------------------------------------------


class KilledError(Exception):
    """Stands for a kill."""


def killing(step: int, round_: int = 0) -> Callable[..., None]:
    def on_metric(name: str, value: float, /, **where: int | str) -> None:
        if name == "preprocess_loss" and (where["round"], where["step"]) == (round_, step):
            raise KilledError

    return on_metric


@pytest.mark.parametrize("update", ["lora", "full"])
@pytest.mark.parametrize(("round_", "step"), [(0, 0), (0, 2), (0, 3), (0, 4), (1, 1), (1, 3)])
def test_a_killed_training_ends_in_the_same_bytes(
    tiny_model: TinyModel, tmp_path: Path, update: str, round_: int, step: int
) -> None:
    model = tiny_model("llama")
    restoration = short(update=update, steps=5, rounds=2, dropout=0.2, accumulation=2)
    whole, killed, resumed = [], [], []  # (name, value, round, step)
    expected = restored(model, restoration, on_metric=recording(whole))
    with pytest.raises(KilledError):
        restored(model, restoration, folder=tmp_path, on_metric=both(recording(killed), killing(step, round_)))
    torch.manual_seed(99)  # whatever the next process has drawn before
    found = restored(model, restoration, folder=tmp_path, on_metric=recording(resumed))
    assert same(found, expected)
    assert resumed == whole  # the record of the run that went on holds the whole curve
    assert killed == whole[: len(killed)]


def test_a_killed_training_in_an_arithmetic_ends_in_the_same_bytes(tiny_model: TinyModel, tmp_path: Path) -> None:
    """Gradients that are rounded at random draw from the generator whose state a checkpoint keeps."""
    model = tiny_model("llama")
    restoration = short(steps=5, arithmetic="gse", bits=6, stochastic_rounding=True)
    expected = restored(model, restoration)
    with pytest.raises(KilledError):
        restored(model, restoration, folder=tmp_path, on_metric=killing(3))
    torch.manual_seed(99)
    assert same(restored(model, restoration, folder=tmp_path), expected)
    assert not same(restored(model, short(steps=5, arithmetic="gse", bits=6)), expected)


def test_a_killed_training_in_a_spectral_arithmetic_ends_in_the_same_bytes(
    tiny_model: TinyModel, tmp_path: Path
) -> None:
    """Its subspace is older than the checkpoint that it goes on from."""
    model = tiny_model("llama")
    settings = {"update": "full", "arithmetic": "metis", "spectral_rank": 3, "stochastic_rounding": True}
    restoration = short(steps=5, refresh_every=3, **settings)
    expected = restored(model, restoration)
    with pytest.raises(KilledError):
        restored(model, restoration, folder=tmp_path, on_metric=killing(3))
    torch.manual_seed(99)
    assert same(restored(model, restoration, folder=tmp_path), expected)
    assert not same(restored(model, short(steps=5, refresh_every=1, **settings)), expected)
    assert same(restored(model, dataclasses.replace(restoration, gradient_checkpointing=True)), expected)


def recording(emitted: list[Any]) -> Callable[..., None]:
    def on_metric(name: str, value: float, /, **where: int | str) -> None:
        if name in ("preprocess_loss", "preprocess_lr"):
            emitted.append((name, value, where))

    return on_metric


def both(first: Callable[..., None], second: Callable[..., None]) -> Callable[..., None]:
    def on_metric(name: str, value: float, /, **where: int | str) -> None:
        first(name, value, **where)
        second(name, value, **where)

    return on_metric


def test_a_finished_training_is_not_run_again(tiny_model: TinyModel, tmp_path: Path) -> None:
    model = tiny_model("llama")
    expected = restored(model, short(), folder=tmp_path)
    (file,) = tmp_path.glob("round_0.pt")
    written = file.stat().st_mtime_ns
    assert set(torch.load(file)) == {"done", "rows", "trained"}  # no optimizer state is kept for good
    assert same(restored(model, short(), folder=tmp_path), expected)
    assert file.stat().st_mtime_ns == written


def test_nothing_but_the_seed_counts(tiny_model: TinyModel) -> None:
    model = tiny_model("llama")
    torch.manual_seed(1)
    before = torch.get_rng_state()
    first = restored(model, short(dropout=0.2), seed=3)
    assert torch.equal(torch.get_rng_state(), before)
    torch.manual_seed(2)
    assert same(restored(model, short(dropout=0.2), seed=3), first)
    assert not same(restored(model, short(dropout=0.2), seed=4), first)


def test_gradient_checkpointing_changes_nothing(tiny_model: TinyModel) -> None:
    model = tiny_model("llama")
    plain, frugal = (restored(model, short(gradient_checkpointing=on)) for on in (False, True))
    torch.testing.assert_close(plain.state_dict(), frugal.state_dict())


def test_bfloat16_with_gradient_checkpointing(tiny_model: TinyModel) -> None:
    model = tiny_model("llama")
    exact = restored(model, short(steps=1))
    close = restored(model, short(steps=1, compute_dtype="bfloat16", gradient_checkpointing=True))
    for name, weight in exact.state_dict().items():
        error = (close.state_dict()[name] - weight).norm() / weight.norm()
        assert error < 0.05, name


# --- refusals ---------------------------------------------------------------------------------------------------------


def refused(call: Callable[[], object]) -> str:
    with pytest.raises(UserError) as caught:
        call()
    return str(caught.value)


def test_another_trainings_folder_is_refused(tiny_model: TinyModel, tmp_path: Path) -> None:
    model = tiny_model("llama")
    restored(model, short(), folder=tmp_path)
    for changes, key, was, now in (
        ({"lr": 0.5}, "preprocess.lr", "0.01", "0.5"),
        ({"steps": 5}, "preprocess.steps", "4", "5"),
        ({"objective": "kl"}, "preprocess.objective", "lm", "kl"),
    ):
        sentence = refused(lambda changes=changes: restored(model, short(**changes), folder=tmp_path))
        assert sentence == (
            f"{tmp_path} belongs to another computation ({key} is {now} here and {was} there): "
            "use another folder, or delete it."
        )
    assert "seed is 1 here and 0 there" in refused(lambda: restored(model, short(), folder=tmp_path, seed=1))
    assert "method.bits is 3 here and 2 there" in refused(
        lambda: restored(model, short(), RTN(bits=3), folder=tmp_path)
    )
    assert "quantization.weights is" in refused(lambda: restored(tiny_model("llama", seed=1), short(), folder=tmp_path))
    assert "training_tokens is" in refused(
        lambda: restore(model, TRAINING[:3], CALIBRATION, COARSE, short(), folder=tmp_path)
    )
    restored(model, short(checkpoint_every=3, save_merged=True), folder=tmp_path)  # what changes no weight


def test_damaged_checkpoints_are_refused(tiny_model: TinyModel, tmp_path: Path) -> None:
    model = tiny_model("llama")
    restored(model, short(), folder=tmp_path)
    file = tmp_path / "round_0.pt"
    file.write_bytes(file.read_bytes()[:1000])
    assert refused(lambda: restored(model, short(), folder=tmp_path)).startswith(f"{file} is damaged: delete it")
    (tmp_path / "fingerprint.json").write_text("{")
    assert "fingerprint.json is damaged" in refused(lambda: restored(model, short(), folder=tmp_path))
    (tmp_path / "a_file").write_text("")
    below = tmp_path / "a_file" / "below"
    assert "give restore another folder" in refused(lambda: restored(model, short(), folder=below))


def test_the_fingerprint_is_readable(tiny_model: TinyModel, tmp_path: Path) -> None:
    restored(tiny_model("llama"), short(), folder=tmp_path)
    found = json.loads((tmp_path / "fingerprint.json").read_text())
    assert found["preprocess"]["rank"] == 4 and found["quantization"]["method"]["bits"] == 2


def test_a_loss_that_is_not_finite_names_where(tiny_model: TinyModel) -> None:
    sentence = refused(lambda: restored(tiny_model("llama"), short(update="full", lr=1e30, warmup_share=0.0, steps=9)))
    assert sentence.startswith("the loss of restorative training is nan, first seen in block 0 (round 0, step ")
    assert "at learning rate " in sentence and sentence.endswith("lower preprocess.lr.")


def test_a_loss_that_is_not_finite_names_the_block_it_comes_from(tiny_model: TinyModel) -> None:
    model = tiny_model("llama")
    student = make_student(ptq161.quantize(model, CALIBRATION, COARSE), short(), torch.device("cpu"))
    with torch.no_grad():
        student.model.layers[1].mlp.down_proj.weight.fill_(float("inf"))

    def loss_of(tokens: Tensor) -> Tensor:
        return student(tokens, labels=tokens).loss

    sentence = refused(
        lambda: train(
            student, loss_of, TRAINING, short(), None, on_metric=ignore_metric, seed=0, round_=0, progress=False
        )
    )
    assert "first seen in block 1 (round 0, step 0)" in sentence


def test_a_role_that_the_architecture_lacks(tiny_model: TinyModel) -> None:
    sentence = refused(lambda: restored(tiny_model("opt"), short(targets=["gate"])))
    assert sentence == ("preprocess.targets=['gate']: a opt model has no such linear; add one of q, k, v, o, up, down.")


@pytest.mark.parametrize(
    ("tokens", "part"),
    [
        (torch.zeros(0, 32, dtype=torch.int64), "training tokens have shape [0, 32]"),
        (torch.zeros(2, 32), "training tokens are of float32"),
        (torch.full((2, 32), 256), "outside the model's vocabulary of 256"),
        (torch.full((2, 32), -1), "outside the model's vocabulary of 256"),
    ],
)
def test_tokens_that_do_not_fit(tiny_model: TinyModel, tokens: Tensor, part: str) -> None:
    assert part in refused(lambda: restore(tiny_model("llama"), tokens, CALIBRATION, COARSE, short()))


def test_sequences_that_the_model_cannot_hold(tiny_model: TinyModel) -> None:
    sentence = refused(lambda: restored(tiny_model("llama"), short(seq_len=1024)))
    expected = "preprocess.seq_len=1024: the model takes at most 512 tokens; set preprocess.seq_len to at most 512."
    assert sentence == expected


def test_a_packed_model_is_refused(tiny_model: TinyModel) -> None:
    packed = ptq161.quantize(tiny_model("llama"), CALIBRATION, COARSE)
    assert "already quantized" in refused(lambda: restored(packed, short()))
