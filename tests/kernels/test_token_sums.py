"""Sums of each token: by hand, against autograd, and the compiled ones the same as torch's on any number of threads."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor

from ptq161.kernels import native
from ptq161.kernels.token_sums import token_sums


def tensors(*shape: int, n_targets: int = 2) -> tuple[Tensor, list[Tensor]]:
    generator = torch.Generator().manual_seed(0)
    output, *targets = (torch.randn(shape, generator=generator) for _ in range(1 + n_targets))
    return output.requires_grad_(), targets


def value_and_gradient(output: Tensor, targets: list[Tensor]) -> tuple[Tensor, Tensor]:
    """Return a number that depends on every sum, each token's in its own way, and its gradient at the output."""
    sums = token_sums(output, targets)
    weights = torch.arange(1.0, 1.0 + sums.size.numel())
    value = (weights * sums.size).sum() + (weights * sums.errors.sqrt()).sum()
    value = value + (weights * sums.products / (1 + sums.target_sizes)).sum()
    return value.detach(), torch.autograd.grad(value, output)[0]


@pytest.mark.parametrize("n_targets", [0, 1, 2, 3])
@pytest.mark.parametrize("shape", [(1, 1), (5, 97), (2, 65, 576)])
def test_compiled_sums_are_those_of_torch(
    shape: tuple[int, ...], n_targets: int, request: pytest.FixtureRequest
) -> None:
    assert native.load("token_sums")
    output, targets = tensors(*shape, n_targets=n_targets)
    found, gradient = value_and_gradient(output, targets)
    request.getfixturevalue("torch_alone")
    expected, of_torch = value_and_gradient(output, targets)
    torch.testing.assert_close(found, expected, rtol=1e-5, atol=1e-4)
    torch.testing.assert_close(gradient, of_torch, rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize("alone", [False, True])
def test_gradients_are_those_of_autograd(alone: bool, request: pytest.FixtureRequest) -> None:
    if alone:
        request.getfixturevalue("torch_alone")
    output, targets = tensors(3, 4, 31)
    _, gradient = value_and_gradient(output, targets)
    weights = torch.arange(1.0, 13.0)
    flat, full, other = (x.flatten(0, 1) for x in (output, *targets))
    value = (weights * flat.square().sum(-1)).sum()
    for target in (full, other):
        value = value + (weights * (flat - target).square().sum(-1).sqrt()).sum()
        value = value + (weights * (flat * target).sum(-1) / (1 + target.square().sum(-1))).sum()
    torch.testing.assert_close(gradient, torch.autograd.grad(value, output)[0], rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize("threads", [1, 2, 3])
def test_bits_do_not_depend_on_threads(threads: int) -> None:
    output, targets = tensors(130, 576)
    expected = value_and_gradient(output, targets)
    before = torch.get_num_threads()
    torch.set_num_threads(threads)
    try:
        found = [*token_sums(output, targets), value_and_gradient(output, targets)[1]]
    finally:
        torch.set_num_threads(before)
    again = [*token_sums(output, targets), expected[1]]
    assert all(torch.equal(a, b) for a, b in zip(found, again, strict=True))


def test_half_precision_and_other_orders_of_memory_are_summed_in_float32() -> None:
    output = torch.randn(64, 5).T
    for dtype in (torch.bfloat16, torch.float64):
        sums = token_sums(output.to(dtype), [torch.zeros(5, 64)])
        assert sums.size.dtype == torch.float32
        torch.testing.assert_close(sums.errors[0], output.to(dtype).float().square().sum(-1))
