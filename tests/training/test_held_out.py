"""Sequences that a training never sees: the best state, the early stop, and a killed training that continues."""

from __future__ import annotations

import copy
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from torch import Tensor
from transformers import PreTrainedModel

from ptq161.preprocess.restoration import Restoration
from ptq161.training.checkpoint import TrainingCheckpoint
from ptq161.training.held_out import HeldOut
from ptq161.training.loop import run_steps, trained_parameters
from ptq161.training.losses import objective
from tests.preprocess.conftest import sequences, short

TinyModel = Callable[..., PreTrainedModel]
CPU = torch.device("cpu")
TOKENS, UNSEEN = sequences(6), sequences(3, seed=1)
Rows = list[tuple[str, float, int]]


class Killed(Exception):
    """What ends a training in the middle."""


def run(
    model: PreTrainedModel,
    training: Restoration,
    held_out: HeldOut | None,
    file: Path | None = None,
    kill_at: int | None = None,
) -> Rows:
    """Train all parameters of a copy that the caller gave; the metrics but for the speed."""
    rows: Rows = []

    def on_metric(name: str, value: float, /, **where: int | str) -> None:
        assert where["round"] == 0
        if kill_at is not None and where["step"] == kill_at and name == "preprocess_loss":
            raise Killed
        if not name.endswith("per_second"):
            rows.append((name.removeprefix("preprocess_"), value, int(where["step"])))

    run_steps(
        model,
        torch.optim.AdamW(model.parameters(), lr=training.lr),
        objective(model, None, training),
        TOKENS,
        training,
        None if file is None else TrainingCheckpoint(file, training, CPU),
        on_metric=on_metric,
        seed=0,
        where={"round": 0},
        progress=False,
        held_out=held_out,
    )
    return rows


def losses(rows: Rows) -> dict[int, float]:
    return {step: value for name, value, step in rows if name == "held_out_loss"}


def loss_of(model: PreTrainedModel, tokens: Tensor) -> float:
    with torch.no_grad():
        return float(objective(model, None, short())(tokens))


def watched(every: int = 1, patience: int | None = None) -> HeldOut:
    return HeldOut(UNSEEN, every=every, patience=patience, batch_size=2)


def test_the_loss_is_the_mean_over_the_sequences(tiny_model: TinyModel) -> None:
    model = tiny_model("llama")
    measured = watched().measure(objective(model, None, short()), trained_parameters(model))
    assert measured == pytest.approx(loss_of(model, UNSEEN), rel=1e-5)


def test_it_is_measured_at_the_start_every_so_often_and_at_the_end(tiny_model: TinyModel) -> None:
    assert list(losses(run(tiny_model("llama"), short(steps=5), watched(every=2)))) == [0, 2, 4, 5]


def test_the_best_state_is_what_a_training_ends_with(tiny_model: TinyModel) -> None:
    # Random tokens hold nothing to learn: what is unseen gets worse.
    model = tiny_model("llama")
    start = {name: parameter.detach().clone() for name, parameter in trained_parameters(model).items()}
    found = losses(run(model, short(steps=6, lr=1e-2), watched()))
    best = min(found, key=lambda step: found[step])
    assert found[6] > found[best]
    assert loss_of(model, UNSEEN) == pytest.approx(found[best], rel=1e-5)
    if best == 0:
        assert all(torch.equal(parameter, start[name]) for name, parameter in trained_parameters(model).items())


@pytest.mark.parametrize("patience", [1, 2])
def test_a_training_that_gets_worse_ends_early(patience: int, tiny_model: TinyModel, tmp_path: Path) -> None:
    training, file = short(steps=20, lr=1e-2), tmp_path / "part.pt"
    model = tiny_model("llama")
    rows = run(model, training, watched(patience=patience), file)
    found = losses(rows)
    best = min(found, key=lambda step: found[step])
    assert max(found) == best + patience < 20
    # It is finished: another run has its metrics and its weights, and takes no step.
    again = tiny_model("llama")
    assert run(again, training, watched(patience=patience), file) == rows
    assert all(map(torch.equal, model.parameters(), again.parameters()))


@pytest.mark.parametrize("kill_at", [3, 5])
def test_a_killed_training_continues_to_the_same_bytes(kill_at: int, tiny_model: TinyModel, tmp_path: Path) -> None:
    training = short(steps=7, checkpoint_every=2)
    start, whole = tiny_model("llama"), tiny_model("llama")
    expected = run(whole, training, watched(every=3))
    with pytest.raises(Killed):
        run(copy.deepcopy(start), training, watched(every=3), tmp_path / "part.pt", kill_at)
    assert run(start, training, watched(every=3), tmp_path / "part.pt") == expected
    assert all(map(torch.equal, start.parameters(), whole.parameters()))
