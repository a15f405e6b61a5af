"""Metis' arithmetic: its products against the vectors, and what its quantizers remember."""

from __future__ import annotations

from functools import partial
from pathlib import Path

import pytest
import torch
from torch import Tensor, nn
from torch.utils.flop_counter import FlopCounterMode

from ptq161.errors import UserError
from ptq161.preprocess.restoration import Restoration
from ptq161.training.arithmetic.base import Arithmetic, Quantizer
from ptq161.training.arithmetic.blockfloat import quantize
from ptq161.training.arithmetic.linears import TrainedLinear, quantizer_buffers
from ptq161.training.arithmetic.metis import FORMATS, SpectralQuantizer, check_ranks
from ptq161.training.arithmetic.product import linear
from ptq161.training.arithmetic.registry import arithmetic_of
from ptq161.training.arithmetic.spectral import quantize_spectral, truncated_svd
from tests.preprocess.conftest import short
from tests.training.arithmetic.test_blockfloat import golden
from tests.training.arithmetic.test_spectral import assert_near, rounding, with_large_singular_values


def settings(**changes: object) -> Restoration:
    return short(**{"arithmetic": "metis", "update": "full", "spectral_rank": 3, "refresh_every": 4} | changes)


def direct(format: str) -> Quantizer:
    return lambda matrix, dim: quantize(matrix, format)


def spectral(format: str, rank: int) -> Quantizer:
    return lambda matrix, dim: quantize_spectral(matrix, truncated_svd(matrix, rank), rounding(format))


@pytest.mark.parametrize("case", ["fp4", "fp8", "fp4_spectral_backward", "fp4_spectral_both"])
def test_golden_vectors_of_a_linear(golden_dir: Path, case: str) -> None:
    shared, expected = golden(golden_dir, "linear"), golden(golden_dir, f"linear.{case}")
    format, split = {"fp4": "fp4e2m1", "fp8": "fp8e4m3"}[case[:3]], spectral("fp4e2m1", int(shared["rank"]))
    of_input = split if case.endswith("both") else direct(format)
    of_gradient = split if "spectral" in case else direct(format)
    arithmetic = Arithmetic(of_input, direct(format), of_gradient, quantizes_once=True)
    x, weight, bias = (shared[name].requires_grad_() for name in ("X", "W", "bias"))
    y = linear(x, weight, arithmetic, bias=bias)
    dx, dw, db = torch.autograd.grad(y, (x, weight, bias), shared["grad_out"])
    for name, found in {"y": y, "grad_x": dx, "grad_w": dw, "grad_bias": db}.items():
        if name in expected:
            assert_near(found.detach(), expected[name])


@pytest.mark.parametrize("format", FORMATS)
@pytest.mark.parametrize("of", ["format", "arithmetic"])
def test_all_operands_are_in_the_stated_format(of: str, format: str) -> None:
    weight, x, gradient = torch.randn(32, 64), torch.randn(40, 64), torch.randn(40, 32)
    arithmetic = arithmetic_of(settings(**{of: format}, spectral_rank=0), weight)
    expected = partial(quantize, format=FORMATS[format], as_released=False)
    assert torch.equal(arithmetic.input(x, 1), expected(x))
    assert torch.equal(arithmetic.weight(weight, 1), expected(weight))
    assert torch.equal(arithmetic.gradient(gradient, 1), expected(gradient))
    assert arithmetic.quantizes_once


@pytest.mark.parametrize("rank", [0, 3])
def test_random_rounding_keeps_the_products_on_average(rank: int) -> None:
    weight, x = torch.randn(32, 64), torch.randn(40, 64)
    arithmetic = arithmetic_of(settings(spectral_rank=rank, stochastic_rounding=True), weight)
    draws = torch.stack([arithmetic.input(x, 1) @ arithmetic.weight(weight, 1).T for _ in range(150)])
    exact = x @ weight.T
    assert (draws.mean(0) - exact).norm() < 0.2 * (draws[0] - exact).norm()


def trained(**changes: object) -> TrainedLinear:
    return TrainedLinear(nn.Linear(64, 32, bias=False), settings(**changes))


def step(layer: TrainedLinear, x: Tensor, repeat: int = 1) -> None:
    for _ in range(repeat):
        y = layer(x)
    y.square().sum().backward()


def bases(layer: TrainedLinear) -> dict[str, Tensor]:
    return {name: buffer.clone() for name, buffer in quantizer_buffers(layer).items() if name.endswith("basis")}


@pytest.mark.parametrize("accumulation", [1, 2])
def test_subspaces_are_kept_between_their_estimates(accumulation: int) -> None:
    layer = trained(accumulation=accumulation)
    seen = []
    for _ in range(9 * accumulation):
        step(layer, torch.randn(50, 64))
        seen.append(bases(layer))
    assert len(seen[0]) == 3 and all(basis.any() for basis in seen[0].values())
    every = 4 * accumulation
    for name in seen[0]:
        changes = [i for i in range(1, len(seen)) if not torch.equal(seen[i][name], seen[i - 1][name])]
        assert changes == [every, 2 * every], name


def test_a_forward_pass_that_is_repeated_remembers_the_same() -> None:
    """As under gradient checkpointing, which repeats it with the same random numbers."""
    layers = [trained(), trained()]
    layers[1].load_state_dict(layers[0].state_dict())
    for i, x in enumerate(torch.randn(6, 50, 64)):
        for repeat, layer in enumerate(layers, start=1):
            torch.manual_seed(i)
            for _ in range(repeat - 1):
                with torch.random.fork_rng(devices=[]):
                    layer(x)
            step(layer, x)
    for name, buffer in quantizer_buffers(layers[0]).items():
        assert torch.equal(buffer, quantizer_buffers(layers[1])[name]), name
    assert torch.equal(layers[0].weight.grad, layers[1].weight.grad)  # type: ignore[arg-type]


def test_matrices_of_few_rows_or_none() -> None:
    """An expert gets as many tokens as choose it."""
    layer = trained(stochastic_rounding=True)
    for rows in (0, 1, 3, 50, 2):
        x = torch.randn(rows, 64, requires_grad=True)
        y = layer(x)
        y.sum().backward()
        assert y.shape == (rows, 32) and y.isfinite().all()
    quantizer = SpectralQuantizer(64, 3, rounding("fp4e2m1b"), 4, stochastic=False)
    x = torch.randn(2, 64)
    assert torch.equal(quantizer(x, 1), quantize(x, "fp4e2m1b"))


def test_what_is_not_finite_stays_so() -> None:
    quantizer = SpectralQuantizer(64, 3, rounding("nvfp4e2m1b", as_released=False), 4, stochastic=False)
    x = torch.randn(50, 64)
    x[1, 2] = float("nan")
    assert not quantizer(x, 1).isfinite().all() and not quantizer.basis.any()


def test_the_split_costs_less_than_a_third_of_the_products() -> None:
    """Of a step with a subspace that is kept, and over eight steps with the one that estimates it; default sizes."""
    source = nn.Linear(576, 576, bias=False)

    def flops(layer: nn.Module, steps: int) -> int:
        with FlopCounterMode(display=False) as counter:
            for _ in range(steps):
                layer(torch.randn(1024, 576, requires_grad=True)).sum().backward()
        return counter.get_total_flops()

    products = 8 * flops(source, 1)
    spectral = flops(TrainedLinear(source, settings(spectral_rank=9, refresh_every=8)), 8)
    assert spectral - products < products / 3
    assert spectral - products < products / 10  # singular values of small matrices are not counted


def test_the_product_is_nearer_where_one_scale_would_be_stretched() -> None:
    matrix = with_large_singular_values(power=5)
    found = SpectralQuantizer(128, 3, rounding("fp4e2m1", as_released=False), 8, stochastic=False)(matrix, 1)
    assert (found - matrix).norm() < 0.5 * (quantize(matrix, "fp4e2m1") - matrix).norm()


def test_a_rank_that_a_matrix_does_not_have() -> None:
    with pytest.raises(UserError, match=r"preprocess\.spectral_rank=32: a trained matrix has only 32 rows or columns"):
        trained(spectral_rank=32)
    check_ranks(settings(spectral_rank=31), [[32, 64]])
    check_ranks(settings(spectral_rank=64, arithmetic="gse"), [[32, 64]])
