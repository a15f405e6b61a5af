import pytest
import torch
from torch import Tensor, nn

from ptq161.kernels import matmul
from ptq161.kernels.matmul import FastLinear


def tensors(*shape: int, out: int = 24, dtype: torch.dtype = torch.float32) -> tuple[Tensor, Tensor, Tensor]:
    generator = torch.Generator().manual_seed(sum(shape))
    sizes = (shape, (out, shape[-1]), (out,))
    x, weight, bias = (torch.randn(size, generator=generator).to(dtype) for size in sizes)
    return x, weight, bias


@pytest.mark.parametrize("shape", [(40,), (7, 40), (3, 7, 40), (0, 7, 40), (1, 1)])
@pytest.mark.parametrize("with_bias", [True, False])
def test_the_product_is_that_of_float32(shape: tuple[int, ...], with_bias: bool) -> None:
    x, weight, bias = tensors(*shape)
    expected = x.double() @ weight.double().T + (bias.double() if with_bias else 0)
    ours = matmul.linear(x, weight, bias if with_bias else None)
    assert ours.dtype == torch.float32 and ours.shape == expected.shape
    torch.testing.assert_close(ours.double(), expected, rtol=1e-5, atol=1e-5)


def test_tensors_in_another_order_of_memory() -> None:
    x, weight, _ = tensors(40, 24, out=40)
    expected = x.double().T @ weight.double()
    torch.testing.assert_close(matmul.linear(x.T, weight.T).double(), expected, rtol=1e-5, atol=1e-5)


def test_values_of_bfloat16_lose_nothing() -> None:
    x, weight, _ = (t.bfloat16().float() for t in tensors(300, 700, out=90))
    before = torch.backends.mkldnn.matmul.fp32_precision
    with matmul.bfloat16_operands():
        ours = matmul.linear(x, weight)
    assert ours.dtype == torch.float32 and torch.backends.mkldnn.matmul.fp32_precision == before
    torch.testing.assert_close(ours.double(), x.double() @ weight.double().T, rtol=0, atol=2e-4)  # sums of 700


def test_other_dtypes_go_to_torch() -> None:
    x, weight, bias = tensors(7, 40, dtype=torch.float64)
    assert torch.equal(matmul.linear(x, weight, bias), nn.functional.linear(x, weight, bias))


def test_linears_take_it_only_without_gradient(monkeypatch: pytest.MonkeyPatch) -> None:
    calls = []
    original = matmul.linear

    def counted(*args: Tensor) -> Tensor:
        calls.append(args)
        return original(*args)

    monkeypatch.setattr(matmul, "linear", counted)
    layer, x = nn.Linear(40, 24), torch.randn(3, 40)
    with FastLinear(), torch.no_grad():
        inside = layer(x)
    assert len(calls) == 1
    torch.testing.assert_close(inside, layer(x))
    with FastLinear():
        layer(x).sum().backward()
    assert len(calls) == 1 and layer.weight.grad is not None
