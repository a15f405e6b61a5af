"""The Triton kernels as they are compiled for a GPU, at the sizes of real models."""

from __future__ import annotations

import pytest
import torch

from ptq161.errors import UserError
from ptq161.kernels import packed_rows
from ptq161.packed.linear import PackedLinear, int8_product
from ptq161.packed.weight import PackedWeight
from tests.kernels.packed_weights import MAKERS

pytestmark = pytest.mark.gpu
CUDA = torch.device("cuda")
ONE_PER_FORMAT = ("structured_binary", "uniform 2 bits groups", "awq", "allotted")
LIMITS = {torch.float32: 2e-6, torch.bfloat16: 2**-8, torch.float16: 2**-10}


def made(kind: str, rows: int, columns: int) -> PackedWeight:
    with CUDA:
        return MAKERS[kind](rows, columns)


def check_product(packed: PackedWeight, rows: int, dtype: torch.dtype) -> None:
    x = torch.randn(rows, packed.in_features, device=CUDA).to(dtype)
    bias = torch.randn(packed.out_features, device=CUDA).to(dtype)
    y = packed.rows_product(x, bias)
    assert y is not None and y.dtype == dtype
    weight = packed.dequantize().double()
    expected = x.double() @ weight.T + bias.double()
    magnitudes = x.double().abs() @ weight.abs().T + bias.double().abs() + 0.01
    assert float(((y.double() - expected).abs() / magnitudes).max()) < LIMITS[dtype]


@pytest.mark.parametrize("kind", MAKERS)
def test_one_row_and_the_dense_form(kind: str) -> None:
    packed = made(kind, 4096, 4096)
    check_product(packed, 1, torch.bfloat16)
    assert torch.equal(packed.dense(torch.bfloat16), packed.dequantize().to(torch.bfloat16))


@pytest.mark.parametrize("kind", ONE_PER_FORMAT)
def test_more_rows_and_dtypes(kind: str) -> None:
    packed = made(kind, 4096, 11008)
    for rows, dtype in [(1, torch.float16), (2, torch.bfloat16), (5, torch.float32), (16, torch.float16)]:
        check_product(packed, rows, dtype)
    for dtype in packed_rows.DTYPES["cuda"]:
        assert torch.equal(packed.dense(dtype), packed.dequantize().to(dtype))


@pytest.mark.parametrize("shape", [(1, 1), (97, 97), (576, 192), (130, 515)])
@pytest.mark.parametrize("kind", ONE_PER_FORMAT)
def test_odd_shapes(kind: str, shape: tuple[int, int]) -> None:
    packed = made(kind, *shape)
    check_product(packed, 33, torch.float32)
    assert torch.equal(packed.dense(torch.float32), packed.dequantize())


@pytest.mark.parametrize("kind", ONE_PER_FORMAT)
@pytest.mark.parametrize("rows", [0, 2, 40])
def test_a_layer(kind: str, rows: int) -> None:
    packed = MAKERS[kind](576, 192)
    layer, x = PackedLinear(packed, torch.randn(576)), torch.randn(2, rows, 192)
    expected = layer(x)
    layer.to(CUDA)
    assert {buffer.device.type for buffer in layer.buffers()} == {"cuda"}
    torch.testing.assert_close(layer(x.to(CUDA)).cpu(), expected, rtol=1e-4, atol=1e-4)
    assert layer.half()(x.to(CUDA).half()).dtype == torch.float16


def test_a_layer_in_a_graph_and_compiled() -> None:
    layer, x = PackedLinear(made("structured_binary", 576, 192)).to(CUDA), torch.randn(1, 192, device=CUDA)
    expected = layer(x)
    assert torch.equal(torch.compile(layer, backend="eager", fullgraph=True)(x), expected)
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        y = layer(x)
    x.mul_(2)
    graph.replay()
    torch.testing.assert_close(y, 2 * expected)


def test_activations_of_eight_bits_are_torch_s() -> None:
    packed, x = made("structured_binary", 96, 192), torch.randn(3, 192, device=CUDA)
    assert packed.rows_product(x, None, int8=True) is None
    layer = PackedLinear(packed)
    layer.int8 = True
    assert torch.equal(layer(x), int8_product(packed, x))
    operands = packed.operands()
    assert operands is not None
    with pytest.raises(UserError, match="no operator for them on a GPU"):
        packed_rows.product(operands, x, None, int8=True)


def test_tensors_that_do_not_fit_are_refused() -> None:
    packed, x = made("structured_binary", 96, 192), torch.randn(1, 192, device=CUDA)
    short = packed.with_tensors({"sign": packed.state_dict()["sign"][:, :-1].contiguous()})
    with pytest.raises(RuntimeError, match="as the weight has it"):
        short.rows_product(x, None)


@pytest.mark.parametrize("kind", ONE_PER_FORMAT)
def test_torch_can_trace_the_operators(kind: str) -> None:
    packed = made(kind, 12, 200)
    operands = packed.operands()
    assert operands is not None and packed_rows.usable(torch.float32, torch.zeros(1, device=CUDA))
    settings = (*operands.settings, operands.factor)
    products, dense = (getattr(torch.ops.ptq161, f"{operands.format}_{name}") for name in ("rows", "dense"))
    x, bias = torch.randn(2, 3, 200, device=CUDA), torch.randn(12, device=CUDA)
    torch.library.opcheck(products.default, (x, *operands.tensors, bias, *settings, False, packed_rows.HIGHEST))
    torch.library.opcheck(dense.default, (*operands.tensors, *settings, torch.bfloat16))
