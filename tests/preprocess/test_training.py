"""The loop: order, schedule, accumulation, and its progress bar."""

from __future__ import annotations

import itertools
import math
from collections.abc import Callable
from typing import Any

import pytest
import torch
from transformers import PreTrainedModel

import ptq161
from ptq161.errors import UserError
from ptq161.methods.rtn import RTN
from ptq161.preprocess.restoration import Restoration
from ptq161.preprocess.rounds import restore
from ptq161.preprocess.student import make_student
from ptq161.preprocess.training import train
from ptq161.training.checkpoint import TrainingCheckpoint
from ptq161.training.loop import _sequence_order, trained_parameters
from ptq161.training.losses import objective
from tests.preprocess.conftest import sequences, short

TinyModel = Callable[..., PreTrainedModel]
CPU = torch.device("cpu")
TOKENS = sequences(6)


def trained(model: PreTrainedModel, restoration: Restoration, emitted: dict[str, list[float]] | None = None) -> Any:
    packed = ptq161.quantize(model, TOKENS, RTN(bits=3))
    torch.manual_seed(0)
    student = make_student(packed, restoration, CPU)

    def on_metric(name: str, value: float, /, **where: int | str) -> None:
        assert where["round"] == 0
        if emitted is not None:
            assert where["step"] == len(emitted.setdefault(name, []))
            emitted[name].append(value)

    loss_of = objective(student, None, restoration)
    train(student, loss_of, TOKENS, restoration, None, on_metric=on_metric, seed=0, round_=0, progress=False)
    return {name: p.detach() for name, p in trained_parameters(student).items()}


def test_an_epoch_takes_each_sequence_once() -> None:
    order = _sequence_order(6, short(steps=5, batch_size=2), 0, 0)
    assert len(order) == 10
    assert sorted(order[:6].tolist()) == list(range(6)) and len(set(order[6:].tolist())) == 4
    assert not torch.equal(order, _sequence_order(6, short(steps=5, batch_size=2), 0, 1))
    assert not torch.equal(order, _sequence_order(6, short(steps=5, batch_size=2), 1, 0))


def test_a_regulariser_moves_what_it_weighs(tiny_model: TinyModel) -> None:
    """It adds to the loss; that of large numbers makes weights smaller."""
    settings = {"update": "full", "lr": 1e-3, "steps": 8, "regulariser_alpha2": 0.0}
    losses: dict[str, dict[str, list[float]]] = {"without": {}, "with": {}}
    without = trained(tiny_model("llama"), short(**settings), losses["without"])
    found = trained(tiny_model("llama"), short(regulariser=100.0, **settings), losses["with"])
    added = losses["with"]["preprocess_loss"][0] - losses["without"]["preprocess_loss"][0]
    packed = ptq161.quantize(tiny_model("llama"), TOKENS, RTN(bits=3))
    start = trained_parameters(make_student(packed, short(update="full"), CPU))
    assert added == pytest.approx(sum(100 * float(p.detach().square().mean()) for p in start.values()), rel=1e-3)
    assert all(found[name].norm() < without[name].norm() for name in found)


def test_the_rate_rises_and_falls_along_a_cosine(tiny_model: TinyModel) -> None:
    emitted: dict[str, list[float]] = {}
    trained(tiny_model("llama"), short(steps=10, lr=1e-3, warmup_share=0.2), emitted)
    rates = emitted["preprocess_lr"]
    assert rates[:3] == pytest.approx([0, 0.5e-3, 1e-3])
    assert rates[6] == pytest.approx(0.5e-3)  # half way
    assert all(a > b for a, b in itertools.pairwise(rates[2:])) and rates[-1] > 0
    assert len(emitted["preprocess_loss"]) == 10 and min(emitted["preprocess_tokens_per_second"]) > 0


def test_accumulation_is_a_larger_batch(tiny_model: TinyModel) -> None:
    whole: dict[str, list[float]] = {}
    parts: dict[str, list[float]] = {}
    large = trained(tiny_model("llama"), short(batch_size=4, steps=3), whole)
    small = trained(tiny_model("llama"), short(batch_size=1, accumulation=4, steps=3), parts)
    assert parts["preprocess_loss"] == pytest.approx(whole["preprocess_loss"], rel=1e-5)
    torch.testing.assert_close(small, large, rtol=1e-3, atol=1e-5)


def test_against_a_plain_loop(tiny_model: TinyModel) -> None:
    """AdamW on the library's loss with the gradient's norm held, step by step."""
    restoration = short(steps=3, warmup_share=0.0, max_grad_norm=0.1)
    found = trained(tiny_model("llama"), restoration)
    packed = ptq161.quantize(tiny_model("llama"), TOKENS, RTN(bits=3))
    torch.manual_seed(0)
    student = make_student(packed, restoration, CPU)
    parameters = trained_parameters(student)
    optimizer = torch.optim.AdamW(parameters.values(), lr=restoration.lr, weight_decay=0.0)
    for step, batch in enumerate(_sequence_order(6, restoration, 0, 0).view(3, 2)):
        optimizer.param_groups[0]["lr"] = restoration.lr * 0.5 * (1 + math.cos(math.pi * step / 3))
        student(TOKENS[batch], labels=TOKENS[batch]).loss.backward()
        torch.nn.utils.clip_grad_norm_(parameters.values(), 0.1)
        optimizer.step()
        optimizer.zero_grad()
    torch.testing.assert_close(found, {n: p.detach() for n, p in parameters.items()}, rtol=1e-3, atol=1e-5)


def test_the_bar_tells_loss_and_speed(tiny_model: TinyModel, capsys: pytest.CaptureFixture[str]) -> None:
    restore(tiny_model("llama"), TOKENS, TOKENS, RTN(bits=3), short(), progress=True)
    bar = capsys.readouterr().err
    assert "restore: 100%" in bar and "loss " in bar and "tokens/s" in bar


def test_a_full_disk_is_told(tiny_model: TinyModel, tmp_path: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    def full(*_: object) -> None:
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(torch, "save", full)
    with pytest.raises(UserError, match="because the disk is full; free space and run again"):
        restore(tiny_model("llama"), TOKENS, TOKENS, RTN(bits=3), short(), folder=tmp_path)


def test_a_checkpoint_is_due_every_so_often_and_at_the_end(tmp_path: Any) -> None:
    checkpoint = TrainingCheckpoint(tmp_path / "x.pt", short(steps=7, checkpoint_every=3), CPU)
    assert [done for done in range(1, 8) if checkpoint.is_due(done)] == [3, 6, 7]
