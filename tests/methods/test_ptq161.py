"""PTQ1.61: its free functions against golden vectors, formulas and edges."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch import Tensor, nn

from ptq161.errors import UserError
from ptq161.methods.ptq161 import (
    block_loss,
    dequantized_weight,
    initial_scales,
    pack_weight,
    quantize_salient,
    salient_mask,
)
from ptq161.methods.ptq161.trainable import BinaryLinear
from ptq161.packed.bits import unpack_plane
from ptq161.packed.uniform import uniform_codes, uniform_parameters, uniform_values
from tests.methods.layers import assert_golden


@pytest.fixture
def vectors(golden_dir: Path) -> dict[str, Tensor]:
    with np.load(golden_dir / "reference_vectors.npz") as file:
        return {key[7:]: torch.from_numpy(file[key]) for key in file if key.startswith("ptq161.")}


# golden vectors


def test_golden_mask_and_scales(vectors: dict[str, Tensor]) -> None:
    mask = salient_mask(vectors["X"].abs().amax(0), 0.2)
    assert torch.equal(mask, vectors["mask"])
    assert int(mask.sum()) == int(0.2 * mask.numel()) + 1
    mean, scale = initial_scales(vectors["W"], mask)
    torch.testing.assert_close(mean, vectors["mean"])
    torch.testing.assert_close(scale, vectors["scale"])


def test_golden_weight(vectors: dict[str, Tensor]) -> None:
    parts = [vectors[key] for key in ("W", "mask", "mean", "scale", "r1", "r2")]
    assert_golden(dequantized_weight(*parts), vectors["q"])
    assert_golden(pack_weight(*parts, scale_dtype="float32").dequantize(), vectors["q"])
    half = pack_weight(*parts).dequantize()
    assert (half - vectors["q"]).norm() / vectors["q"].norm() < 5e-3


# the mask


def test_ratio_zero_is_an_empty_mask() -> None:
    assert not salient_mask(torch.rand(10), 0).any()


@given(st.integers(2, 200), st.floats(0.001, 0.999), st.integers(0, 2**32))
def test_the_largest_channels_are_salient(n: int, ratio: float, seed: int) -> None:
    scale = torch.rand(n, generator=torch.Generator().manual_seed(seed)) + 0.1
    mask = salient_mask(scale, ratio)
    assert mask.dtype == torch.bool and mask.shape == (n,)
    assert 1 <= int(mask.sum()) <= n - 1
    assert scale[mask].min() >= scale[~mask].max()
    if len(scale.unique()) == n:
        assert int(mask.sum()) == min(int(ratio * n) + 1, n - 1)


def test_ties_with_the_last_salient_channel_are_salient() -> None:
    mask = salient_mask(torch.tensor([1.0, 3, 2, 2, 2, 1, 1, 1, 1, 1]), 0.2)
    assert mask.nonzero().flatten().tolist() == [1, 2, 3, 4]


def test_one_channel_stays_binary_where_all_tie() -> None:
    for scale in (torch.zeros(6), torch.ones(6), torch.full((6,), 1e-9)):
        assert salient_mask(scale, 0.2).tolist() == [True] * 5 + [False]
    assert not salient_mask(torch.ones(1), 0.5).any()


@pytest.mark.parametrize("ratio", [0.99, 0.9999999])
def test_the_smallest_channel_stays_binary_near_one(ratio: float) -> None:
    assert salient_mask(torch.tensor([2.0, 1, 3, 4]), ratio).tolist() == [True, False, True, True]


@pytest.mark.parametrize("ratio", [-0.1, 1.0, 1.5, float("nan")])
def test_ratios_outside_are_refused(ratio: float) -> None:
    with pytest.raises(UserError, match=r"mask_ratio=.*: use a value in \[0, 1\)"):
        salient_mask(torch.ones(4), ratio)


@pytest.mark.parametrize("value", [float("nan"), float("inf")])
@pytest.mark.parametrize("ratio", [0.0, 0.2])
def test_activations_that_are_not_finite_are_refused(value: float, ratio: float) -> None:
    with pytest.raises(UserError, match="the activations are NaN or infinite"):
        salient_mask(torch.tensor([1.0, value, 2.0]), ratio)


# initial scales


def test_scales_by_hand() -> None:
    weight = torch.tensor([[1.0, -3, 9, 2], [-1, -1, 9, -4]])
    mean, scale = initial_scales(weight, torch.tensor([False, False, True, False]))
    torch.testing.assert_close(mean, torch.tensor([[0.0], [-2.0]]))
    torch.testing.assert_close(scale, torch.tensor([[2.0], [2.0]]))


def test_zero_weights_do_not_count() -> None:
    weight = torch.tensor([[0.0, 4, 7, 0, 2], [0, 0, 7, 0, 0]])
    mean, scale = initial_scales(weight, torch.tensor([False, False, True, False, False]))
    assert mean.tolist() == scale.tolist() == [[3.0], [0.0]]


def test_an_empty_row_dequantizes_to_zeros() -> None:
    mask = torch.tensor([False, False, True])
    weight = torch.zeros(1, 3)
    mean, scale = initial_scales(weight, mask)
    assert not dequantized_weight(weight, mask, mean, scale, torch.ones(1, 1), torch.ones(1, 3)).any()


def test_scales_of_half_precision_weights_are_float32() -> None:
    weight = torch.randn(4, 300).bfloat16()
    mean, scale = initial_scales(weight, torch.zeros(300, dtype=torch.bool))
    assert mean.dtype == scale.dtype == torch.float32
    torch.testing.assert_close(mean, weight.float().mean(1, keepdim=True))


# the quantized weight


def parts_of(weight: Tensor, mask: Tensor) -> list[Tensor]:
    generator = torch.Generator().manual_seed(5)
    shapes = (weight.shape[0], 1), (1, weight.shape[1])
    angles = [1 + 0.2 * torch.randn(shape, generator=generator) for shape in shapes]
    return [weight, mask, *initial_scales(weight, mask), *angles]


def formula(
    weight: Tensor, mask: Tensor, mean: Tensor, scale: Tensor, row_angle: Tensor, column_angle: Tensor
) -> Tensor:
    """The quantized weight as the paper writes it, differentiable in scales and angles."""
    sign = torch.where(weight - mean >= 0, 1.0, -1.0).to(scale.dtype)
    codes, step, zero = quantize_salient(weight, mask)
    salient = torch.zeros_like(weight)
    if codes.numel():
        salient[:, mask] = uniform_values(codes, step, zero)
    return torch.where(mask, salient.to(scale.dtype), (row_angle @ column_angle) * (scale * sign + mean))


@pytest.mark.parametrize("ratio", [0.0, 0.2, 0.9])
def test_dequantized_weight_is_the_papers_formula(ratio: float) -> None:
    parts = parts_of(torch.randn(6, 50) * 0.1, salient_mask(torch.rand(50), ratio))
    torch.testing.assert_close(dequantized_weight(*parts), formula(*parts), rtol=1e-6, atol=1e-7)


def test_the_sign_of_zero_is_plus() -> None:
    """A weight that equals its row's mean, and a zero weight in a row of mean zero."""
    weight = torch.tensor([[1.0, 2, 3], [-1, 0, 1]])
    mask = torch.zeros(3, dtype=torch.bool)
    mean, scale = initial_scales(weight, mask)
    signs = dequantized_weight(weight, mask, torch.zeros(2, 1) + mean, scale, torch.ones(2, 1), torch.ones(1, 3)) - mean
    assert torch.equal(signs.sign(), torch.tensor([[-1.0, 1, 1], [-1, 1, 1]]))
    layer = binary_linear(weight, mask)
    assert torch.equal(layer.sign, torch.tensor([[-1.0, 1, 1], [-1, 1, 1]]))


def test_salient_range() -> None:
    """Over the row, a large binary weight widens the grid of the salient ones; over the salient part it does not."""
    weight = torch.tensor([[10.0, 0.1, -0.2, 0.3], [-8, 0.4, 0.2, 0.1]])
    mask = torch.tensor([False, True, True, True])
    for choice, ranged in (("row", weight), ("salient", weight[:, mask])):
        codes, scale, zero = quantize_salient(weight, mask, 4, choice)
        expected = uniform_parameters(ranged, 4, scale_dtype="float32")
        assert torch.equal(scale, expected[0]) and torch.equal(zero, expected[1])
        assert torch.equal(codes, uniform_codes(weight[:, mask], *expected, 4))
    row, salient = (
        (dequantized_weight(*parts_of(weight, mask), 4, choice)[:, mask] - weight[:, mask]).abs().max()
        for choice in ("row", "salient")
    )
    assert salient < 0.03 < row
    with pytest.raises(UserError, match=r"method\.salient_range=column: use one of row, salient"):
        quantize_salient(weight, mask, 4, "column")


def test_codes_are_chosen_against_the_stored_scale() -> None:
    weight = torch.randn(50, 64)
    mask = torch.ones(64, dtype=torch.bool)
    mask[0] = False
    codes, scale, zero = quantize_salient(weight, mask, 4, scale_dtype="float16")
    assert torch.equal(scale, scale.half().float())
    grid = scale[:, :, None] * (torch.arange(16) - zero[:, :, None])
    nearest = (weight[:, 1:, None] - grid).abs().amin(-1)
    torch.testing.assert_close((uniform_values(codes, scale, zero) - weight[:, 1:]).abs(), nearest)


# the trainable layer


def binary_linear(
    weight: Tensor, mask: Tensor, bias: Tensor | None = None, compute_dtype: torch.dtype = torch.float32
) -> BinaryLinear:
    linear = nn.Linear(weight.shape[1], weight.shape[0], bias=bias is not None)
    linear.weight.data = weight.clone()
    if bias is not None:
        linear.bias.data = bias.clone()
    linear.requires_grad_(False)
    settings = {"salient_bits": 4, "salient_range": "row", "scale_dtype": "float32"}
    return BinaryLinear(linear, mask, compute_dtype=compute_dtype, **settings)


TOLERANCE = {
    torch.float64: {"rtol": 1e-6, "atol": 1e-6},
    torch.float32: {"rtol": 1e-4, "atol": 1e-5},
    torch.bfloat16: {"rtol": 0.05, "atol": 0.15},
}


@pytest.mark.parametrize("dtype", list(TOLERANCE), ids=str)
@pytest.mark.parametrize("bias", [False, True])
@pytest.mark.parametrize("ratio", [0.0, 0.2, 0.9])
def test_output_and_gradients_are_those_of_the_dense_formula(bias: bool, ratio: float, dtype: torch.dtype) -> None:
    out_features, in_features = 10, 30
    weight = torch.randn(out_features, in_features) * 0.2
    mask = salient_mask(torch.rand(in_features), ratio)
    offset = torch.randn(out_features) if bias else None
    layer = binary_linear(weight, mask, offset, dtype)
    values = parts_of(weight, mask)
    with torch.no_grad():
        for parameter, value in zip((layer.scale, layer.row_angle, layer.column_angle), values[3:], strict=True):
            parameter.copy_(value)
    x = torch.randn(3, 7, in_features, dtype=torch.float64)
    direction = torch.randn(3, 7, out_features, dtype=torch.float64)

    mine = x.to(dtype, copy=True).requires_grad_()
    y = layer(mine)
    assert y.dtype == dtype
    y.backward(direction.to(dtype))

    learned = [value.double().requires_grad_() for value in values[3:]]
    theirs = x.clone().requires_grad_()
    dense = formula(weight, mask, values[2].double(), *learned)
    expected = nn.functional.linear(theirs, dense, None if offset is None else offset.double())
    expected.backward(direction)

    scale = 10 if dtype == torch.bfloat16 else 1  # sums over 21 tokens of bfloat16 products
    torch.testing.assert_close(y.double(), expected, **TOLERANCE[dtype])
    torch.testing.assert_close(mine.grad.double(), theirs.grad, **TOLERANCE[dtype])
    for parameter, reference in zip((layer.scale, layer.row_angle, layer.column_angle), learned, strict=True):
        assert parameter.grad.dtype == torch.float32
        tolerance = {key: value * scale for key, value in TOLERANCE[dtype].items()}
        torch.testing.assert_close(parameter.grad.double(), reference.grad, **tolerance)


def test_gradients_pass_a_numeric_check() -> None:
    """An independent view: the layer's own forward, shifted by a little, against its backward."""
    layer = binary_linear(torch.randn(4, 9), salient_mask(torch.rand(9), 0.2), torch.randn(4), torch.float64)
    x = torch.randn(5, 9, dtype=torch.float64)
    layer(x).square().sum().backward()
    for parameter in (layer.mean, layer.scale, layer.row_angle, layer.column_angle):
        for i in range(parameter.numel()):
            results = []
            for step in (1e-3, -1e-3):
                with torch.no_grad():
                    parameter.view(-1)[i] += step
                    results.append(float(layer(x).square().sum()))
                    parameter.view(-1)[i] -= step
            numeric = (results[0] - results[1]) / 2e-3
            assert float(parameter.grad.view(-1)[i]) == pytest.approx(numeric, rel=1e-2, abs=1e-2)


def test_the_layer_computes_what_it_packs() -> None:
    layer = binary_linear(torch.randn(6, 20), salient_mask(torch.rand(20), 0.2), torch.randn(6))
    with torch.no_grad():
        layer.scale.mul_(1.3), layer.row_angle.add_(0.1), layer.column_angle.sub_(0.2)
    x = torch.randn(8, 20)
    torch.testing.assert_close(layer(x), nn.functional.linear(x, layer.pack().dequantize(), layer.bias))


def test_a_learned_mean_leaves_the_signs() -> None:
    weight, mask = torch.randn(6, 20), salient_mask(torch.rand(20), 0.2)
    layer = binary_linear(weight, mask, torch.randn(6))
    signs = layer.pack().sign
    with torch.no_grad():
        layer.mean.add_(0.5)
    packed = layer.pack()
    assert torch.equal(packed.sign, signs)
    assert not torch.equal((weight[:, ~mask] >= layer.mean), unpack_plane(signs, int((~mask).sum())))
    x = torch.randn(8, 20)
    torch.testing.assert_close(layer(x), nn.functional.linear(x, packed.dequantize(), layer.bias))


# the objective


def test_loss_by_hand() -> None:
    y = torch.tensor([[[3.0, 4.0]]])
    full, homologous = torch.tensor([[[4.0, 3.0]]]), torch.tensor([[[3.0, 0.0]]])
    expected = 1.0 + 8.0 - np.log(24 / 25) - np.log(3 / 5)
    assert float(block_loss(y, full, homologous)) == pytest.approx(expected, rel=1e-6)
    assert float(block_loss(y, full, homologous, cosine=False)) == pytest.approx(9.0)


def test_cosines_are_averaged_before_the_logarithm_and_their_sign_is_dropped() -> None:
    y = torch.tensor([[[1.0, 0.0], [0.0, 1.0]]])
    other = torch.tensor([[[-1.0, 0.0], [-1.0, 0.0]]])
    mse = float((y - other).square().mean())
    assert float(block_loss(y, other, other)) == pytest.approx(2 * mse - 2 * np.log(0.5))


def test_loss_of_equal_outputs_is_zero() -> None:
    y = torch.randn(2, 5, 8)
    assert float(block_loss(y, y, y)) == pytest.approx(0, abs=1e-6)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_loss_is_float32(dtype: torch.dtype) -> None:
    tensors = [torch.randn(2, 5, 64).to(dtype) for _ in range(3)]
    loss = block_loss(*tensors)
    assert loss.dtype == torch.float32
    torch.testing.assert_close(loss, block_loss(*(tensor.float() for tensor in tensors)))


@pytest.mark.parametrize("cosine", [False, True])
def test_gradient_of_the_loss_against_finite_differences(cosine: bool) -> None:
    y, full, homologous = (torch.randn(2, 3, 4) for _ in range(3))
    y.requires_grad_()
    block_loss(y, full, homologous, cosine).backward()
    for i in range(y.numel()):
        step = torch.zeros(y.numel()).index_fill_(0, torch.tensor([i]), 1e-2).view_as(y)
        with torch.no_grad():
            difference = block_loss(y + step, full, homologous, cosine) - block_loss(y - step, full, homologous, cosine)
        assert float(y.grad.view(-1)[i]) == pytest.approx(float(difference) / 2e-2, rel=2e-2, abs=2e-2)
