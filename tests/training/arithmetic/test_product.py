"""The products of a linear: against the formulas with the same quantizers, and against plain gradients without any."""

from __future__ import annotations

from functools import partial

import pytest
import torch
from torch import Tensor, nn
from torch.nn import functional as F

from ptq161.training.arithmetic.base import Arithmetic, StatefulQuantizer
from ptq161.training.arithmetic.gse import round_to_grid
from ptq161.training.arithmetic.linears import FrozenLinear, LoraLinear, TrainedLinear, quantizer_buffers
from ptq161.training.arithmetic.product import freeze, linear
from ptq161.training.arithmetic.registry import ARITHMETICS
from tests.preprocess.conftest import short

GSE = Arithmetic(*(partial(round_to_grid, bits=bits) for bits in (8, 6, 5)))
S = 1.7


def tensors(*shapes: tuple[int, ...]) -> list[Tensor]:
    generator = torch.Generator().manual_seed(0)
    return [torch.randn(shape, generator=generator).requires_grad_() for shape in shapes]


def adapter(x: Tensor, base: Tensor, a: Tensor, b: Tensor, arithmetic: str) -> LoraLinear:
    settings = short(arithmetic=arithmetic, bits=6)
    return LoraLinear(FrozenLinear(base, None, settings, x.dtype), a, b, S, settings)


def test_without_quantizers_it_is_a_plain_linear() -> None:
    x, weight, bias, gradient = tensors((2, 5, 40), (6, 40), (6,), (2, 5, 6))
    plain = S * F.linear(x, weight) + bias
    expected = torch.autograd.grad(plain, (x, weight, bias), gradient)
    for once in (False, True):
        y = linear(x, weight, Arithmetic(quantizes_once=once), bias=bias, scale=S)
        torch.testing.assert_close(y, plain)
        torch.testing.assert_close(torch.autograd.grad(y, (x, weight, bias), gradient), expected)


def test_each_operand_is_quantized_along_the_summed_dimension() -> None:
    x, weight, gradient = tensors((70, 40), (6, 40), (70, 6))
    y = linear(x, weight, GSE, scale=S)
    dx, dw = torch.autograd.grad(y, (x, weight), gradient)
    qx, qw, qg = GSE.input, GSE.weight, GSE.gradient
    torch.testing.assert_close(y, S * qx(x, 1) @ qw(weight, 1).T)
    torch.testing.assert_close(dx, S * qg(gradient, 1) @ qw(weight, 0))
    torch.testing.assert_close(dw, S * qg(gradient, 0).T @ qx(x, 0))


def test_once_quantized_operands_enter_both_products() -> None:
    x, weight, gradient = tensors((70, 40), (6, 40), (70, 6))
    y = linear(x, weight, Arithmetic(GSE.input, GSE.weight, GSE.gradient, quantizes_once=True))
    dx, dw = torch.autograd.grad(y, (x, weight), gradient)
    qx, qw, qg = GSE.input(x, 1), GSE.weight(weight, 1), GSE.gradient(gradient, 1)
    torch.testing.assert_close((y, dx, dw), (qx @ qw.T, qg @ qw, qg.T @ qx))


@pytest.mark.parametrize("once", [False, True])
def test_a_frozen_weight_is_the_weight(once: bool) -> None:
    x, weight, gradient = tensors((70, 40), (6, 40), (70, 6))
    arithmetic = Arithmetic(GSE.input, GSE.weight, GSE.gradient, once)
    found, expected = (linear(x, w, arithmetic) for w in (freeze(weight, arithmetic, torch.float32), weight))
    assert torch.equal(found, expected)
    assert torch.equal(*(torch.autograd.grad(y, x, gradient)[0] for y in (found, expected)))


def test_an_adapter_against_the_formulas() -> None:
    x, w, a, b, gradient = tensors((70, 40), (6, 40), (4, 40), (6, 4), (70, 6))
    layer = adapter(x, w, a, b, "gse")
    q = partial(round_to_grid, bits=6)
    y = layer(x)
    h = q(x, 1) @ q(a, 1).T
    torch.testing.assert_close(y, q(x, 1) @ q(w, 1).T + S * q(h, 1) @ q(b, 1).T)
    dh = S * q(gradient, 1) @ q(b, 0)
    expected = (
        q(gradient, 1) @ q(w, 0) + q(dh, 1) @ q(a, 0),
        q(dh, 0).T @ q(x, 0),
        S * q(gradient, 0).T @ q(h, 0),
    )
    torch.testing.assert_close(torch.autograd.grad(y, (x, layer.lora_A, layer.lora_B), gradient), expected)


def test_an_adapter_in_float_is_a_plain_one() -> None:
    x, w, a, b, gradient = tensors((3, 7, 40), (6, 40), (4, 40), (6, 4), (3, 7, 6))
    layer = adapter(x, w, a, b, "float")
    plain = F.linear(x, w) + S * F.linear(F.linear(x, a), b)
    torch.testing.assert_close(layer(x), plain)
    found = torch.autograd.grad(layer(x), (x, layer.lora_A, layer.lora_B), gradient)
    torch.testing.assert_close(found, torch.autograd.grad(plain, (x, a, b), gradient))
    torch.testing.assert_close(layer.delta(), S * b @ a)


def test_an_adapter_that_starts_at_zero_leaves_the_base() -> None:
    x, w, a = tensors((9, 40), (6, 40), (4, 40))
    layer = adapter(x, w, a, torch.zeros(6, 4), "gse")
    assert torch.equal(layer(x), layer.base(x))


def test_products_follow_the_autocast() -> None:
    x, weight = tensors((70, 40), (6, 40))
    with torch.autocast("cpu", torch.bfloat16):
        y = linear(x, weight, GSE)
    assert y.dtype == torch.bfloat16
    y.sum().backward()
    assert x.grad is not None and weight.grad is not None
    assert x.grad.dtype == weight.grad.dtype == torch.float32
    torch.testing.assert_close(y.float(), linear(x, weight, GSE), rtol=0.02, atol=0.05)


def test_no_tokens_at_all() -> None:
    """As for an expert that no token goes to."""
    x, weight = tensors((0, 40), (6, 40))
    linear(x, weight, GSE).sum().backward()
    assert weight.grad is not None and not weight.grad.any()


def test_a_trained_linear_keeps_its_parameters() -> None:
    source = nn.Linear(40, 6)
    layer = TrainedLinear(source, short(arithmetic="gse", bits=8))
    assert layer.weight is source.weight and layer.bias is source.bias
    x = torch.randn(9, 40, generator=torch.Generator().manual_seed(1))
    torch.testing.assert_close(layer(x), source(x), rtol=0.05, atol=0.05)
    assert not torch.equal(layer(x), source(x))


class Counting(StatefulQuantizer):
    """The identity, which counts how often it is called."""

    calls: Tensor

    def __init__(self) -> None:
        super().__init__()
        self.register_buffer("calls", torch.zeros((), dtype=torch.int64))

    def forward(self, matrix: Tensor, dim: int) -> Tensor:
        self.calls += 1
        return matrix


def test_what_quantizers_keep_is_found(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(ARITHMETICS, "gse", lambda settings, weight: Arithmetic(gradient=Counting()))
    x, w, a, b = tensors((9, 40), (6, 40), (4, 40), (6, 4))
    layer = adapter(x, w, a, b, "gse")
    layer(x).sum().backward()
    kept = quantizer_buffers(nn.ModuleDict({"q": layer}))
    # One for each matrix; the gradient of the base enters one product, the others two.
    assert {name: int(calls) for name, calls in kept.items()} == {
        "q.base.quantizers.0.calls": 1,
        "q.quantizers.0.0.calls": 2,
        "q.quantizers.1.0.calls": 2,
    }
