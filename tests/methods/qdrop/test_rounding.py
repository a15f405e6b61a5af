"""Learned rounding: the authors' results, and autograd's gradients."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from torch import Tensor

from ptq161.methods.qdrop import (
    hard_weight,
    initial_alpha,
    lsq_quantize,
    rectified_sigmoid,
    round_loss,
    soft_weight,
    temperature,
)
from ptq161.packed.activations import quantized_activations
from tests.methods.qdrop.test_ranges import golden

CLOSE = {"rtol": 1e-5, "atol": 1e-7}


@pytest.mark.parametrize("bits", [2, 3, 4])
def test_golden_rounding(golden_dir: Path, bits: int) -> None:
    vectors = golden(golden_dir, f"weight{bits}")
    weight, grid = vectors["W"], (vectors["scale"], vectors["zero_point"], bits)
    alpha0 = initial_alpha(weight, *grid)
    torch.testing.assert_close(alpha0, vectors["alpha0"], **CLOSE)
    torch.testing.assert_close(soft_weight(weight, alpha0, *grid), vectors["soft0"], **CLOSE)
    alpha = vectors["alpha1"].requires_grad_()
    torch.testing.assert_close(rectified_sigmoid(alpha), vectors["h1"], **CLOSE)
    soft = soft_weight(weight, alpha, *grid)
    torch.testing.assert_close(soft, vectors["soft1"], **CLOSE)
    soft.backward(vectors["grad_out"])
    torch.testing.assert_close(alpha.grad, vectors["grad_alpha1"], **CLOSE)
    torch.testing.assert_close(hard_weight(weight, alpha.detach(), *grid), vectors["hard1"], **CLOSE)
    for beta in (20, 8, 2):
        torch.testing.assert_close(round_loss(alpha.detach(), beta), vectors[f"round_loss_b{beta}"], **CLOSE)


@pytest.mark.parametrize("kind", ["two_sided4", "two_sided2", "positive4", "positive2"])
def test_golden_activations(golden_dir: Path, kind: str) -> None:
    vectors = golden(golden_dir, f"act_{kind}")
    x, scale = vectors["X"].requires_grad_(), vectors["scale"].requires_grad_()
    q = lsq_quantize(x, scale, vectors["zero_point"], int(kind[-1]))
    torch.testing.assert_close(q, vectors["q"], **CLOSE)
    q.backward(vectors["grad_out"])
    torch.testing.assert_close(x.grad, vectors["grad_x"], **CLOSE)
    torch.testing.assert_close(scale.grad, vectors["grad_scale"], **CLOSE)


def test_golden_temperature(golden_dir: Path) -> None:
    vectors = golden(golden_dir, "temperature")
    found = [temperature(count, 2000) for count in vectors["count"].tolist()]
    assert found == pytest.approx(vectors["b"].tolist(), rel=1e-12)


@pytest.mark.parametrize("beta", [2.0, 3.5, 20.0])
def test_the_gradient_of_the_rounding_loss_is_autograd_s(beta: float) -> None:
    alpha = (3 * torch.randn(200, generator=torch.Generator().manual_seed(0))).requires_grad_()
    h = (1.2 * alpha.sigmoid() - 0.1).clamp(0, 1)
    expected = (1 - (2 * h - 1).abs() ** beta).sum()
    (gradient,) = torch.autograd.grad(0.3 * expected, alpha)
    loss = round_loss(alpha, beta)
    torch.testing.assert_close(loss, expected)
    (0.3 * loss).backward()
    torch.testing.assert_close(alpha.grad, gradient, rtol=1e-5, atol=1e-7)


def test_one_scale_for_all_and_one_for_each_column() -> None:
    weight, alpha = torch.randn(3, 4), torch.randn(3, 4)
    one, zero = torch.full((1,), 0.3), torch.tensor([2])
    expected = soft_weight(weight, alpha, one, zero, 3)
    assert torch.equal(soft_weight(weight, alpha, one.expand(3), zero.expand(3), 3), expected)
    assert torch.equal(soft_weight(weight, alpha, one.expand(3, 4), zero.expand(3, 4), 3), expected)


def test_a_scale_that_underflows_to_zero_stands_for_zeros() -> None:
    weight, zero = torch.tensor([[1e-9, -1e-9]]), torch.zeros(1)
    alpha = initial_alpha(weight, zero, zero, 2)
    assert torch.isfinite(alpha).all()
    assert not soft_weight(weight, alpha, zero, zero, 2).any() and not hard_weight(weight, alpha, zero, zero, 2).any()


def test_half_precision_activations_keep_their_dtype() -> None:
    x = torch.randn(5, 6, generator=torch.Generator().manual_seed(1)).bfloat16().requires_grad_()
    y = quantized_activations(x, torch.full((1,), 0.1), torch.tensor([8], dtype=torch.uint8), 4)
    y.sum().backward()
    assert y.dtype == torch.bfloat16 and x.grad is not None and x.grad.dtype == torch.bfloat16
    inside: Tensor = ((x.detach().float() / 0.1).round() + 8).clamp(0, 15) == (x.detach().float() / 0.1).round() + 8
    assert torch.equal(x.grad.bool(), inside) and inside.any() and not inside.all()
