"""Products from packed bytes: those of the dequantized weight, on every instruction set, and no byte read beside it."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from torch import Tensor

from ptq161.kernels import packed_rows
from ptq161.packed import linear
from ptq161.packed.linear import PackedLinear, int8_product, tiled_product
from ptq161.packed.weight import PackedWeight
from tests.kernels.packed_weights import MAKERS, OTHERS, SHAPES, structured_binary, uniform, vector

EXACT = [("vector with everything", False), ("billm", False), ("gse 5 bits", False)]
"""A weight of each further source of operators, without activations of eight bits."""


def product(packed: PackedWeight, x: Tensor, bias: Tensor | None = None, **settings: int) -> Tensor:
    y = packed.rows_product(x, bias, **settings)
    assert y is not None and y.dtype == x.dtype
    return y


def error(y: Tensor, expected: Tensor, magnitudes: Tensor) -> float:
    """The largest difference, relative to the sum of magnitudes."""
    return float(((y.double() - expected).abs() / magnitudes).max())


@pytest.mark.parametrize("shape", SHAPES)
@pytest.mark.parametrize("kind", MAKERS)
def test_products_are_those_of_the_dequantized_weight(kind: str, shape: tuple[int, int]) -> None:
    torch.manual_seed(0)
    packed = MAKERS[kind](*shape)
    weight, bias = packed.dequantize().double(), torch.randn(shape[0])
    for rows, dtype in [(1, torch.float32), (2, torch.bfloat16), (7, torch.float32)]:
        x = torch.randn(rows, shape[1]).to(dtype)
        expected = x.double() @ weight.T + bias.to(dtype).double()
        magnitudes = x.double().abs() @ weight.abs().T + bias.double().abs() + 0.01
        rounded = int8_product(packed, x, bias.to(dtype)).double()
        limit = 2e-6 if dtype == torch.float32 else 2**-8
        for level in range(packed_rows.HIGHEST + 1):
            y = product(packed, x, bias.to(dtype), level=level)
            assert error(y, expected, magnitudes) < limit, (rows, level)
            y = product(packed, x, bias.to(dtype), level=level, int8=True)
            assert error(y, rounded, magnitudes) < 2 * limit, (rows, level)


@pytest.mark.parametrize("shape", SHAPES)
@pytest.mark.parametrize("kind", OTHERS)
def test_products_in_float32_are_those_of_the_dequantized_weight(kind: str, shape: tuple[int, int]) -> None:
    torch.manual_seed(0)
    packed = OTHERS[kind](*shape)
    weight, bias = packed.dequantize().double(), torch.randn(shape[0])
    for rows, dtype in [(1, torch.float32), (2, torch.bfloat16), (7, torch.float32)]:
        x = torch.randn(rows, shape[1]).to(dtype)
        expected = x.double() @ weight.T + bias.to(dtype).double()
        magnitudes = x.double().abs() @ weight.abs().T + bias.double().abs() + 0.01
        y = product(packed, x, bias.to(dtype))
        assert error(y, expected, magnitudes) < (2e-6 if dtype == torch.float32 else 2**-8), rows
    assert packed.rows_product(x, None, int8=True) is None


@pytest.mark.parametrize("shape", SHAPES)
@pytest.mark.parametrize("kind", MAKERS | OTHERS)
def test_the_dense_form_has_the_bits_of_torch(kind: str, shape: tuple[int, int]) -> None:
    torch.manual_seed(0)
    packed = (MAKERS | OTHERS)[kind](*shape)
    weight = packed.dequantize()
    for dtype in packed_rows.DTYPES["cpu"]:
        assert torch.equal(packed.dense(dtype), weight.to(dtype))
        if shape[0] > 4:
            tile = packed.tile(2, 5, dtype)
            assert tile is not None and torch.equal(tile, weight[2:5].to(dtype))
    assert packed.dense(torch.float16).dtype == torch.float16


@pytest.mark.parametrize("kind", MAKERS)
def test_segments_are_the_weight(kind: str) -> None:
    torch.manual_seed(0)
    packed = MAKERS[kind](12, 200)
    parts, weight = packed.segments(), torch.zeros(12, 200)
    assert parts is not None
    for part in parts:
        weight[:, part.columns] = (part.scale * part.codes + part.shift) * part.factor
    torch.testing.assert_close(weight * 2.0**packed.exponent, packed.dequantize(), rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize(("kind", "int8"), [("structured_binary", False), ("structured_binary", True), *EXACT])
def test_a_row_is_the_same_whatever_is_beside_it_and_however_many_threads(kind: str, int8: bool) -> None:
    torch.manual_seed(0)
    packed, x = (MAKERS | OTHERS)[kind](1201, 515), torch.randn(64, 515)
    expected, before = product(packed, x, int8=int8), torch.get_num_threads()
    try:
        for threads in (1, 2, 3, 4):
            torch.set_num_threads(threads)
            for rows in (1, 2, 3, 5, 64):
                assert torch.equal(product(packed, x[:rows], int8=int8), expected[:rows]), (threads, rows)
    finally:
        torch.set_num_threads(before)


def test_activations_of_eight_bits_are_close() -> None:
    torch.manual_seed(0)
    packed, x = structured_binary(96, 1536), torch.randn(4, 1536)
    exact, rounded = product(packed, x), product(packed, x, int8=True)
    assert 1e-4 < float((rounded - exact).norm() / exact.norm()) < 0.02


@pytest.mark.parametrize("int8", [False, True])
@pytest.mark.parametrize("value", [float("nan"), float("inf")])
def test_a_value_that_is_no_number_is_seen(value: float, int8: bool) -> None:
    x = torch.randn(2, 97)
    x[1, 17] = value
    y = product(structured_binary(8, 97), x, int8=int8)
    assert y[0].isfinite().all() and not y[1].isfinite().any()


def test_zeros_stay_zeros() -> None:
    for int8 in (False, True):
        assert not product(structured_binary(8, 97), torch.zeros(1, 97), int8=int8).any()


@pytest.mark.parametrize("shape", [(0, 97), (97,), (2, 1, 3, 97)])
def test_any_shape_of_rows(shape: tuple[int, ...]) -> None:
    packed, x = structured_binary(8, 97), torch.randn(shape)
    torch.testing.assert_close(product(packed, x), x @ packed.dequantize().T, rtol=1e-4, atol=1e-4)


def test_what_is_not_served_is_left_to_others() -> None:
    x = torch.randn(1, 96)
    for packed in (uniform(4, 96, bits=8), uniform(4, 96, bits=3, group_size=4), structured_binary(4, 96, bits=8)):
        assert packed.rows_product(x, None) is None
        torch.testing.assert_close(PackedLinear(packed)(x), x @ packed.dequantize().T)
    assert uniform(4, 96, bits=2).rows_product(x.half(), None) is None


def test_tensors_that_do_not_fit_are_refused() -> None:
    packed, x = structured_binary(8, 97), torch.randn(1, 97)
    tensors = packed.state_dict()
    for name in tensors:
        short = packed.with_tensors({name: tensors[name][..., :-1].contiguous()})
        with pytest.raises(RuntimeError):
            short.rows_product(x, None)
    more = packed.with_tensors({"mask": torch.full_like(packed.mask, 255)})
    with pytest.raises(RuntimeError, match="fewer binary channels than are stored"):
        more.rows_product(x, None)
    with pytest.raises(RuntimeError, match="bias"):
        packed.rows_product(x, torch.zeros(7))


@pytest.mark.parametrize("kind", ["structured_binary", "uniform 2 bits groups", "awq", "allotted", *OTHERS])
def test_torch_can_trace_the_operators(kind: str) -> None:
    packed = (MAKERS | OTHERS)[kind](12, 200)
    operands = packed.operands()
    assert operands is not None and packed_rows.usable(torch.float32, torch.zeros(1), operands.source)
    settings = (*operands.settings, operands.factor)
    products, dense = (getattr(torch.ops.ptq161, f"{operands.format}_{name}") for name in ("rows", "dense"))
    how, part = ((False, packed_rows.HIGHEST), ()) if kind in MAKERS else ((), (2, 7))
    torch.library.opcheck(
        products.default, (torch.randn(2, 3, 200), *operands.tensors, torch.randn(12), *settings, *how)
    )
    torch.library.opcheck(dense.default, (*operands.tensors, *settings, torch.bfloat16, *part))


@pytest.mark.parametrize(
    ("kind", "rows"), [("structured_binary", 2), ("structured_binary", 40), ("vector", 40), ("gse 5 bits", 2)]
)
def test_torch_can_compile_a_layer(kind: str, rows: int) -> None:
    layer, x = PackedLinear((MAKERS | OTHERS)[kind](64, 97), torch.randn(64)), torch.randn(rows, 97)
    assert torch.equal(torch.compile(layer, backend="eager", fullgraph=True)(x), layer(x))


@pytest.mark.parametrize("kind", OTHERS)
def test_tensors_of_another_weight_are_refused(kind: str) -> None:
    packed, x = OTHERS[kind](12, 97), torch.randn(1, 97)
    for name, tensor in packed.state_dict().items():
        short = packed.with_tensors({name: tensor.flatten()[:-1].clone()})
        with pytest.raises(RuntimeError):
            short.rows_product(x, None)


def test_an_index_without_a_centroid_is_seen() -> None:
    packed = vector(12, 97, v=6, k=5)
    wrong = packed.with_tensors({"indices": torch.full_like(packed.indices, 255)})
    assert product(wrong, torch.ones(1, 97)).isnan().all()


@pytest.mark.parametrize("kind", OTHERS)
def test_many_rows_take_tiles_of_the_weight(kind: str, monkeypatch: pytest.MonkeyPatch) -> None:
    torch.manual_seed(0)
    monkeypatch.setattr(linear, "_TILE_WEIGHTS", 4 * 97)
    # In float64, as a tile's sums may be taken in another order than those of the whole weight.
    packed, x = OTHERS[kind](13, 97), torch.randn(20, 97).double()
    torch.testing.assert_close(tiled_product(packed, x), x @ packed.dequantize().double().T)
    rows = [packed.tile(start, min(start + 4, 13), torch.float32) for start in range(0, 13, 4)]
    tiles = [row for row in rows if row is not None]
    assert len(tiles) in (0, 4)  # none of a format whose rows cannot be read alone
    assert not tiles or torch.equal(torch.cat(tiles), packed.dense(torch.float32))
    assert tiled_product(packed, x.float()).dtype == torch.float32


@pytest.mark.parametrize("kind", ["structured_binary", "uniform 3 bits", "allotted"])
def test_without_a_compiler_torch_gives_the_same(kind: str, monkeypatch: pytest.MonkeyPatch) -> None:
    torch.manual_seed(0)
    layer, x = PackedLinear(MAKERS[kind](64, 515), torch.randn(64)), torch.randn(3, 515)
    exact = layer(x)
    layer.int8 = True
    rounded = layer(x)
    monkeypatch.setattr(packed_rows, "usable", lambda *_, **__: False)
    torch.testing.assert_close(layer(x), rounded, rtol=1e-4, atol=1e-3)
    layer.int8 = False
    torch.testing.assert_close(layer(x), exact, rtol=1e-4, atol=1e-3)


PROGRAM = """
import os
import torch
from ptq161.kernels import native, packed_rows
from ptq161.kernels.codebook import cluster_sums, codebook_weight, nearest
from ptq161.kernels.divergence import divergence
from ptq161.methods.codes import LatentLinear
from ptq161.methods.ptq161 import block_loss
from ptq161.methods.ptq161.coding import binary_grid
from ptq161.methods.ptq161.trainable import BinaryLinear
from ptq161.packed.bits import index_bits, pack_indices
from tests.kernels.packed_weights import MAKERS, OTHERS, SHAPES

del os.environ["LD_PRELOAD"]  # for this process alone, not the compiler
native._OPTIONS = (*native._OPTIONS, "-O0", "-fsanitize=address", "-fno-omit-frame-pointer")
assert all(map(native.load, [*packed_rows.SOURCES, "latent", "divergence", "token_sums", "binary_product", "codebook"]))
for kind, make in (MAKERS | OTHERS).items():
    for shape in (SHAPES[1], SHAPES[5]):
        packed, bias = make(*shape), torch.randn(shape[0])
        for rows in (1, 6):
            for level in range(packed_rows.HIGHEST + 1) if kind in MAKERS else [0]:
                for int8 in (False, True) if kind in MAKERS else [False]:
                    x = torch.randn(rows, shape[1])
                    assert packed.rows_product(x, bias, int8=int8, level=level).isfinite().all()
        assert torch.equal(packed.dense(torch.float32), packed.dequantize())
for dtype in (torch.float32, torch.bfloat16):
    for n, n_in, n_out in ((1, 1, 1), (67, 131, 33)):
        linear, mask = torch.nn.Linear(n_in, n_out), torch.arange(n_in) % 3 == 0
        layers = [BinaryLinear(linear, mask, salient_bits=4, salient_range="row", scale_dtype="float16",
                               compute_dtype=dtype)]
        grid = binary_grid(linear.weight.detach(), mask)
        layers.append(LatentLinear(linear, grid, grid.nearest(linear.weight.detach()), dtype))
        for layer in layers:
            output, target = layer(torch.randn(n, n_in, requires_grad=True)), torch.randn(n, n_out)
            block_loss(output, target, 2 * target).backward()
        assert divergence(output.detach(), target.to(dtype))[0].isfinite()
for n, length, count, columns in ((1, 1, 2, 1), (33, 5, 7, 3)):
    table, vectors = torch.randn(count, length), torch.randn(n * columns, length)
    labels = nearest(vectors, table)
    assert cluster_sums(vectors, torch.ones(len(labels)).double(), labels, count)[0].sum() == n * columns
    codes = pack_indices(labels, index_bits(count))
    groups = torch.zeros(columns, dtype=torch.int64)
    shape = {"size": count, "out_features": (n - 1) * length + 1, "columns": columns}
    scales = torch.ones(shape["out_features"], 1, requires_grad=True)
    codebook_weight(table.requires_grad_(), codes, groups, scales, **shape).sum().backward()
print("clean")
"""


OTHER_INSTRUCTIONS = """
import torch
from ptq161.kernels import native
from tests.kernels.packed_weights import OTHERS

native._INSTRUCTIONS = dict.fromkeys(native._INSTRUCTIONS, ("-march=x86-64-v3", "-O1"))
for kind, make in OTHERS.items():
    packed = make(67, 131)
    if packed.operands().source != "binary_rows":
        continue  # the compiler's choice
    x, weight = torch.randn(5, 131), packed.dequantize()
    torch.testing.assert_close(packed.rows_product(x, None), x @ weight.T, rtol=1e-4, atol=1e-3)
    assert torch.equal(packed.dense(torch.float32), weight)
print("same")
"""


@pytest.mark.slow
@pytest.mark.skipif(torch.backends.cpu.get_cpu_capability() != "AVX512", reason="AVX2 is what the other tests have")
def test_processors_without_avx512_have_the_same(tmp_path: Path) -> None:
    environment = os.environ | {"PTQ161_CACHE": str(tmp_path), "PYTHONPATH": str(Path(__file__).parents[2])}
    command = [sys.executable, "-c", OTHER_INSTRUCTIONS]
    done = subprocess.run(command, capture_output=True, text=True, env=environment, check=False)
    assert done.stdout == "same\n", done.stderr[-3000:]


@pytest.mark.slow
def test_no_byte_beside_the_tensors_is_read(tmp_path: Path) -> None:
    found = subprocess.run(["gcc", "-print-file-name=libasan.so"], capture_output=True, text=True, check=False)
    library = Path(found.stdout.strip())
    if not library.is_absolute():
        pytest.skip("gcc has no AddressSanitizer here")
    environment = os.environ | {
        "CXX": "g++",
        "PTQ161_CACHE": str(tmp_path),
        "LD_PRELOAD": str(library.resolve()),
        "ASAN_OPTIONS": "detect_leaks=0",
        "PYTHONPATH": str(Path(__file__).parents[2]),
    }
    done = subprocess.run([sys.executable, "-c", PROGRAM], capture_output=True, text=True, env=environment, check=False)
    assert done.stdout == "clean\n", done.stderr[-3000:]
