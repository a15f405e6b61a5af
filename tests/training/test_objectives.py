"""The objectives against plain autograd over all logits at once."""

from __future__ import annotations

import copy
from collections.abc import Callable

import pytest
import torch
from torch import Tensor
from torch.nn import functional as F
from transformers import PreTrainedModel

from ptq161.preprocess.restoration import Restoration
from ptq161.training.losses import _logits, frozen_copy, objective
from ptq161.training.objectives import chunked_mean, cross_entropy_sum, divergence_sum, relative_error
from tests.conftest import TINY

TinyModel = Callable[..., PreTrainedModel]
TOKENS = torch.randint(3, 256, (3, 40), generator=torch.Generator().manual_seed(4))
CPU = torch.device("cpu")


def gradients(model: PreTrainedModel, loss: Tensor) -> dict[str, Tensor]:
    trained = {n: p for n, p in model.named_parameters() if "layers" in n}
    return dict(zip(trained, torch.autograd.grad(loss, trained.values()), strict=True))


@pytest.mark.parametrize("chunk", [1, 7, 10, 64])
def test_chunks_change_neither_the_loss_nor_its_gradient(chunk: int) -> None:
    hidden, head = torch.randn(10, 6, requires_grad=True), torch.randn(20, 6, requires_grad=True)
    labels = torch.randint(20, (10,))
    whole = F.cross_entropy(hidden @ head.T, labels)

    def loss_sum(hidden: Tensor, labels: Tensor) -> Tensor:
        return cross_entropy_sum(hidden @ head.T, labels)

    chunked = chunked_mean(loss_sum, hidden, labels, parameters=[head], chunk=chunk)
    torch.testing.assert_close(chunked, whole)
    # The factor is what a later sum with another loss, or accumulation, multiplies it by.
    expected, found = (torch.autograd.grad(0.3 * loss, (hidden, head)) for loss in (whole, chunked))
    torch.testing.assert_close(found, expected)


def test_few_logits_live_at_a_time() -> None:
    seen: list[int] = []

    def loss_sum(hidden: Tensor) -> Tensor:
        seen.append(hidden.shape[0])
        return hidden.square().sum()

    hidden = torch.randn(10, 4, requires_grad=True)
    chunked_mean(loss_sum, hidden, chunk=4).backward()
    assert seen == [4, 4, 2]  # once each: nothing is computed again in the backward pass


def test_divergence_is_the_textbooks() -> None:
    student, teacher = torch.randn(5, 9), torch.randn(5, 9)
    p, q = teacher.softmax(-1), student.softmax(-1)
    torch.testing.assert_close(divergence_sum(student, teacher), (p * (p / q).log()).sum())
    assert divergence_sum(teacher, teacher).item() == 0


def test_relative_error_counts_tokens_alike() -> None:
    teacher = torch.tensor([[1000.0, 0.0], [0.0, 1.0]])
    student = torch.tensor([[1000.0, 500.0], [0.0, 1.5]])
    assert relative_error(student, teacher).item() == 0.25
    assert relative_error(teacher, teacher).item() == 0
    assert relative_error(torch.zeros(1, 2), torch.zeros(1, 2)).item() == 0


@pytest.mark.parametrize("architecture", TINY)
def test_logits_are_the_models_own(tiny_model: TinyModel, architecture: str) -> None:
    model = tiny_model(architecture)
    with torch.no_grad():
        output = model(TOKENS, output_hidden_states=True)
        torch.testing.assert_close(_logits(model, output.hidden_states[-1]), output.logits)


@pytest.mark.parametrize("architecture", ["llama", "gemma2", "opt"])
def test_lm_is_the_librarys_loss(tiny_model: TinyModel, architecture: str) -> None:
    model = tiny_model(architecture)
    loss = objective(model, None, Restoration())(TOKENS)
    expected = model(TOKENS, labels=TOKENS).loss
    torch.testing.assert_close(loss, expected)
    torch.testing.assert_close(gradients(model, loss), gradients(model, expected))


@pytest.mark.parametrize("name", ["kl", "kl_hidden"])
@pytest.mark.parametrize("architecture", ["llama", "gemma2"])
def test_distillation_against_plain_autograd(tiny_model: TinyModel, architecture: str, name: str) -> None:
    model, teacher = tiny_model(architecture), tiny_model(architecture, seed=1)
    loss = objective(model, teacher, Restoration(objective=name, hidden_weight=0.7))(TOKENS)
    student_out, teacher_out = (m(TOKENS, output_hidden_states=True) for m in (model, teacher))
    expected = (
        (teacher_out.logits.softmax(-1) * (teacher_out.logits.log_softmax(-1) - student_out.logits.log_softmax(-1)))
        .sum(-1)
        .mean()
    )
    if name == "kl_hidden":
        pairs = list(zip(student_out.hidden_states, teacher_out.hidden_states, strict=True))[1:]
        expected = expected + 0.7 * sum(((s - t).square().sum(-1) / t.square().sum(-1)).mean() for s, t in pairs) / len(
            pairs
        )
    torch.testing.assert_close(loss, expected)
    torch.testing.assert_close(gradients(model, loss), gradients(model, expected))


@pytest.mark.parametrize("name", ["kl", "kl_hidden"])
@pytest.mark.parametrize("architecture", TINY)
def test_the_teacher_itself_has_no_loss(tiny_model: TinyModel, architecture: str, name: str) -> None:
    model = tiny_model(architecture)
    loss = objective(copy.deepcopy(model), frozen_copy(model, torch.float32, CPU), Restoration(objective=name))(TOKENS)
    assert abs(loss.item()) < 1e-6


def test_the_teacher_gets_no_gradient(tiny_model: TinyModel) -> None:
    model = tiny_model("llama")
    teacher = frozen_copy(tiny_model("llama", seed=1), torch.float32, CPU)
    objective(model, teacher, Restoration(objective="kl_hidden"))(TOKENS).backward()
    assert all(p.grad is None for p in teacher.parameters())
    assert all(p.grad is not None for n, p in model.named_parameters() if "layers" in n)
