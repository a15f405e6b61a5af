"""What surrounds a binarized linear's products: the compiled operators compute what torch's do."""

from __future__ import annotations

import itertools

import pytest
import torch
from torch import Tensor

from ptq161.kernels import binary_product, native

SHAPES = [(1, 1, 1), (7, 97, 30), (130, 576, 192)]
DTYPES = [torch.float32, torch.bfloat16]


def all_parts(shape: tuple[int, int, int], given: torch.dtype, dtype: torch.dtype) -> list[Tensor]:
    """Return the results of all four operators for ``n`` tokens, ``in`` and ``out`` features, half of them salient."""
    n, n_in, n_out = shape
    generator = torch.Generator().manual_seed(0)

    def normal(*size: int) -> Tensor:
        return torch.randn(size, generator=generator)

    x, column = normal(n, n_in).to(given), normal(n_in)
    salient = torch.arange(0, n_in, 2)
    column[salient] = 0.0
    binary = torch.ones(n_in)
    binary[salient] = 0.0
    inputs = binary_product.inputs(x, column, salient, dtype)
    grad, products = normal(n, n_out).to(dtype), normal(n, n_out).to(dtype)
    sums = binary_product.output_sums(grad, products, inputs[2])
    sign, kept = normal(n_out, n_in).sign() * binary, normal(n_out, n_in) * (1 - binary)
    rows = normal(n_out, 1).to(dtype), normal(n_out, 1).to(dtype)
    weight = binary_product.effective_weight(sign.to(dtype), kept.to(dtype), *rows, binary)
    gradients = binary_product.input_gradients(normal(n, n_in).to(dtype), inputs[0], column, given)
    return [*inputs, *sums, weight, *gradients]


@pytest.mark.parametrize(("given", "dtype"), list(itertools.product(DTYPES, DTYPES)))
@pytest.mark.parametrize("shape", SHAPES)
def test_compiled_operators_are_those_of_torch(
    shape: tuple[int, int, int], given: torch.dtype, dtype: torch.dtype, request: pytest.FixtureRequest
) -> None:
    assert native.load("binary_product")
    found = all_parts(shape, given, dtype)
    request.getfixturevalue("torch_alone")
    expected = all_parts(shape, given, dtype)
    assert [(part.shape, part.dtype) for part in found] == [(part.shape, part.dtype) for part in expected]
    assert all(torch.equal(a, b) for a, b in zip(found[:2], expected[:2], strict=True))  # element by element
    size = 1.0 if dtype == torch.float32 else shape[0] ** 0.5
    for a, b in zip(found[2:], expected[2:], strict=True):
        # torch rounds each product to bfloat16 before it is summed.
        torch.testing.assert_close(a, b, rtol=2e-2 if dtype == torch.bfloat16 else 1e-4, atol=0.03 * size)


def test_sums_of_tokens_are_exact_where_they_can_be() -> None:
    n = 300  # several chunks, the last one not full
    grad = torch.arange(n).remainder(7).unsqueeze(1).bfloat16()
    products = torch.full((n, 1), 2.0, dtype=torch.bfloat16)
    rest = torch.stack([torch.zeros(n), torch.arange(n).remainder(3)], 1).bfloat16()
    of_products, of_total = binary_product.output_sums(grad, products, rest)
    assert float(of_products) == 2 * sum(i % 7 for i in range(n))
    assert float(of_total) == sum((i % 7) * (i % 3) for i in range(n))
    of_column, _ = binary_product.input_gradients(grad, products, torch.ones(1), torch.float32)
    assert float(of_column) == float(of_products)


@pytest.mark.parametrize("threads", [1, 2, 3])
def test_bits_do_not_depend_on_threads(threads: int) -> None:
    expected = all_parts(SHAPES[-1], torch.float32, torch.bfloat16)
    before = torch.get_num_threads()
    torch.set_num_threads(threads)
    try:
        found = all_parts(SHAPES[-1], torch.float32, torch.bfloat16)
    finally:
        torch.set_num_threads(before)
    assert all(torch.equal(a, b) for a, b in zip(found, expected, strict=True))


def test_a_value_that_is_no_number_stays_one() -> None:
    x = torch.tensor([[float("nan"), float("inf"), -float("inf"), 3.0e38]])
    rounded, *_ = binary_product.inputs(x, torch.ones(4), torch.tensor([0]), torch.bfloat16)
    assert torch.equal(rounded.isnan(), x.isnan()) and torch.equal(rounded[0, 1:], x[0, 1:].bfloat16())


def test_float16_and_other_orders_of_memory_take_torch(request: pytest.FixtureRequest) -> None:
    x, column = torch.randn(5, 8), torch.ones(8)
    half = binary_product.inputs(x, column, torch.tensor([1]), torch.float16)
    assert [part.dtype for part in half] == [torch.float16] * 3
    turned = binary_product.inputs(x.T.contiguous().T, column, torch.tensor([1]), torch.float32)
    for a, b in zip(turned, binary_product.inputs(x, column, torch.tensor([1]), torch.float32), strict=True):
        torch.testing.assert_close(a, b)
