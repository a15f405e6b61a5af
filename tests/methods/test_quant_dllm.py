from __future__ import annotations

import dataclasses
import itertools
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor
from transformers import PreTrainedModel

import ptq161
from ptq161.errors import UserError
from ptq161.methods import gptq
from ptq161.methods.compensation import inverse_factor, weighted_error
from ptq161.methods.layerwise import LayerwiseMethod
from ptq161.methods.quant_dllm import (
    QuantDLLM,
    _nearest_signs,
    allocate_orders,
    fit_block,
    importance,
    quantize_weight,
    salient_entries,
)
from tests.methods.layers import layer, packed_linears

BLOCKS = {"order1": 64, "order2": 64, "order3": 48, "mixed": 16, "short_last_block": 32, "dead": 32}
"""Case of the golden vectors -> columns per block."""


def golden(golden_dir: Path, case: str) -> dict[str, np.ndarray]:
    with np.load(golden_dir / "quant_dllm" / "vectors.npz") as vectors:
        return {key.removeprefix(f"{case}."): vectors[key] for key in vectors if key.startswith(f"{case}.")}


def tensor(values: np.ndarray) -> Tensor:
    return torch.from_numpy(values)


@pytest.mark.parametrize("case", BLOCKS)
def test_golden_vectors(golden_dir: Path, case: str) -> None:
    vectors, width = golden(golden_dir, case), BLOCKS[case]
    order, ratio = (2, 0.2) if case == "mixed" else (int(vectors["orders"][0]), 0.0)
    packed = quantize_weight(tensor(vectors["W"]), tensor(vectors["hessian"]), order, width, ratio, "float32")
    expected = tensor(vectors["q"])
    far = (packed.dequantize() - expected).abs() > 1e-4 * expected.abs().max()
    assert far.float().mean() <= 1e-3
    assert packed.column_orders()[::width].tolist() == vectors["orders"].tolist()


@pytest.mark.parametrize("case", BLOCKS)
def test_the_first_block_of_the_golden_vectors(golden_dir: Path, case: str) -> None:
    vectors, width = golden(golden_dir, case), BLOCKS[case]
    weight, factor = tensor(vectors["W"]), inverse_factor(tensor(vectors["hessian"]))
    pivots = factor.upper.diagonal()
    torch.testing.assert_close(pivots, tensor(vectors["factor_diagonal"]), rtol=1e-5, atol=1e-6)
    block = weight.masked_fill(factor.dead, 0.0)[:, :width]
    salient = salient_entries(importance(block, pivots[:width]))
    expected = np.unpackbits(vectors["salient"])[: weight.numel()].reshape(weight.shape)[:, :width]
    assert np.array_equal(salient.numpy(), expected.astype(bool))
    order = int(vectors["orders"][0])
    fit = fit_block(block, salient, torch.full((width,), order), "float32")
    for k in range(order):
        signs = vectors[f"first_block.sign_{k}"]
        assert np.array_equal(fit.signs[k].numpy()[signs != 0], signs[signs != 0] > 0)
        for name, found in (("row", fit.row_scales[k]), ("column", fit.column_scales[k])):
            torch.testing.assert_close(
                found.flatten(), tensor(vectors[f"first_block.{name}_scale_{k}"]), rtol=1e-4, atol=1e-6
            )


def test_the_golden_allocation_of_orders(golden_dir: Path) -> None:
    vectors = golden(golden_dir, "allocation")
    scores = tensor(vectors["importance"])
    for key, orders in vectors.items():
        if key.startswith("orders_"):
            assert allocate_orders(scores, float(key.removeprefix("orders_"))).tolist() == orders.tolist()
    mixed = golden(golden_dir, "mixed")
    assert allocate_orders(tensor(mixed["block_importance"]), 0.2).tolist() == mixed["orders"].tolist()


@pytest.mark.parametrize("order", [1, 2, 3])
def test_signs_are_the_nearest_combination_and_the_first_of_equal_ones(order: int) -> None:
    generator = torch.Generator().manual_seed(order)
    block = torch.randint(-6, 7, (30, 20), generator=generator).float()
    terms = [torch.randint(-3, 4, (30, 20), generator=generator).float() for _ in range(order)]
    combinations = list(itertools.product((-1.0, 1.0), repeat=order))
    sums = torch.stack([sum(s * t for s, t in zip(signs, terms, strict=True)) for signs in combinations])
    errors = (block - sums).abs().numpy()
    expected = np.array(combinations)[errors.argmin(0)]  # numpy's argmin is the first
    assert np.array_equal(torch.stack(_nearest_signs(block, terms), -1).numpy(), expected)


def test_rounds_lower_the_weighted_error_and_more_terms_lower_it_further() -> None:
    block = torch.randn(40, 64) * torch.rand(40, 1)
    salient = torch.rand(40, 64) < 0.05
    weights = torch.where(salient, 3.0, 1.0)
    errors = []
    for order in (1, 2, 3):
        fit = fit_block(block, salient, torch.full((64,), order), "float32")
        errors.append(float((weights * (fit.values() - block).square()).sum()))
    start = block.abs().mean(1, keepdim=True) * block.sign()
    assert errors[0] < float((weights * (start - block).square()).sum())
    assert errors[1] < 0.4 * errors[0] and errors[2] < 0.4 * errors[1]


def test_a_zero_in_a_fit_of_order_one_is_stored_as_plus() -> None:
    block = torch.tensor([[1.0, -1.0, 0.0], [2.0, -2.0, 2.0]])
    fit = fit_block(block, torch.zeros(2, 3, dtype=torch.bool), torch.ones(3, dtype=torch.long), "float32")
    assert fit.signs[0, 0, 2]


def test_rows_and_columns_of_zeros_stay_zero() -> None:
    weight, hessian = layer(0, dead=7)
    weight[3] = 0
    for order in (1, 2, 3):
        values = quantize_weight(weight, hessian, order, 64).dequantize()
        assert not values[3].any() and not values[:, :7].any() and values.isfinite().all()


def test_the_block_of_a_single_entry() -> None:
    values = quantize_weight(torch.tensor([[0.5, -0.25]]), torch.eye(2), 1, 1).dequantize()
    torch.testing.assert_close(values, torch.tensor([[0.5, -0.25]]), rtol=1e-3, atol=1e-3)


def test_losses_go_to_later_blocks() -> None:
    weight, hessian = layer(1, in_features=256)
    alone = quantize_weight(weight, torch.diag(hessian.diagonal()), 2).dequantize()
    values = quantize_weight(weight, hessian, 2).dequantize()
    assert weighted_error(weight, values, hessian) < weighted_error(weight, alone, hessian)


def test_it_beats_gptq_at_two_bits_in_the_mean() -> None:
    ours = other = 0.0
    for weight, hessian in (layer(seed, in_features=256) for seed in range(5)):
        ours += weighted_error(weight, quantize_weight(weight, hessian).dequantize(), hessian)
        other += weighted_error(weight, gptq.quantize_weight(weight, hessian, 2).dequantize(), hessian)
    assert ours < other


@pytest.mark.parametrize("allocation", ["blocks", "columns"])
@pytest.mark.parametrize(("in_features", "column_block"), [(100, 24), (130, 16), (40, 7)])
def test_shapes_that_the_block_does_not_divide(in_features: int, column_block: int, allocation: str) -> None:
    weight, hessian = layer(3, in_features=in_features)
    packed = quantize_weight(weight, hessian, 2, column_block, 0.25, allocation=allocation)
    orders = packed.column_orders()
    assert orders.unique().tolist() == [1, 2, 3]
    if allocation == "columns":
        assert orders.float().mean() == 2
    assert (packed.dequantize() - weight).norm() < weight.norm()


def test_columns_of_one_block_may_have_different_orders() -> None:
    weight, hessian = layer(4)
    sizes = torch.randn(128).exp()  # of the inputs: as those of a model, some channels are far larger than others
    hessian = sizes * hessian * sizes.unsqueeze(1)
    mixed = quantize_weight(weight, hessian, 2, 128, 0.1, allocation="columns")
    orders = mixed.column_orders()
    assert [int((orders == order).sum()) for order in (1, 2, 3)] == [12, 104, 12]
    values = mixed.dequantize()
    per_column = [len(values[:, i].abs().unique()) for i in (orders == 1).nonzero().flatten().tolist()]
    assert max(per_column) <= 24  # one size per row
    plain = quantize_weight(weight, hessian, 2)
    assert weighted_error(weight, values, hessian) < 0.8 * weighted_error(weight, plain.dequantize(), hessian)


def test_measured_and_nominal_bits() -> None:
    weight, hessian = layer(5, out_features=576, in_features=576)
    sizes = [quantize_weight(weight, hessian, order).bits_per_weight for order in (1, 2, 3)]
    for order, bits in enumerate(sizes, 1):
        assert bits == pytest.approx(order * (1 + 16 * 5 / 576 + 16 / 576), abs=0.01)  # five blocks, the last one short
    assert [QuantDLLM(order=order).nominal_bits() for order in (1, 2, 3)] == [1, 2, 3]


def test_two_runs_agree() -> None:
    weight, hessian = layer(6)
    first, second = (quantize_weight(weight, hessian, 2, 16, 0.25).state_dict() for _ in range(2))
    assert all(torch.equal(first[name], second[name]) for name in first)


@pytest.mark.parametrize(
    "settings",
    [
        {"order": 0},
        {"order": 4},
        {"mixed_ratio": -0.1},
        {"mixed_ratio": 0.6},
        {"mixed_ratio": float("nan")},
        {"mixed_ratio": 0.1, "order": 3},
        {"allocation": "rows"},
        {"column_block": 0},
    ],
)
def test_settings_out_of_range(settings: dict[str, Any]) -> None:
    with pytest.raises(UserError, match=f"method.{next(iter(settings))}="):
        QuantDLLM(**settings)


def test_a_ratio_that_moves_nothing_is_refused() -> None:
    weight, hessian = layer(7)
    with pytest.raises(UserError, match=r"mixed_ratio=0.05 moves none of the 2 blocks of 64 columns: use .* 0.5\.$"):
        quantize_weight(weight, hessian, 2, 64, 0.05)
    with pytest.raises(UserError, match=r"moves none of the 128 columns: use a ratio of 0 or of at least 0\.00781\.$"):
        quantize_weight(weight, hessian, 2, 64, 0.001, allocation="columns")


def test_nan_weights_and_an_indefinite_hessian() -> None:
    with pytest.raises(UserError, match="NaN or infinite"):
        quantize_weight(torch.full((2, 4), float("nan")), torch.eye(4))
    with pytest.raises(UserError, match="not positive definite"):
        quantize_weight(torch.ones(2, 4), torch.eye(4) - 2 * torch.ones(4, 4))


@pytest.mark.parametrize("true_sequential", [True, False])
def test_a_model(tiny_model: Callable[..., PreTrainedModel], true_sequential: bool) -> None:
    method = QuantDLLM(order=1, true_sequential=true_sequential)
    linears = packed_linears(tiny_model("llama"), method)
    assert len(linears) == 14
    assert {linear.packed.format for linear in linears.values()} == {"row_column_binary"}


def test_linears_see_the_quantized_ones_before_them(tiny_model: Callable[..., PreTrainedModel]) -> None:
    """Only what no quantized linear comes before has the same statistics, and so the same bytes, either way."""
    both = [packed_linears(tiny_model("llama"), QuantDLLM(order=1, true_sequential=way)) for way in (True, False)]

    def same(path: str) -> bool:
        return torch.equal(*(linears[f"model.layers.0.{path}"].packed.dequantize() for linears in both))

    assert all(same(f"self_attn.{name}_proj") for name in "qkv")
    assert not any(same(path) for path in ("self_attn.o_proj", "mlp.up_proj", "mlp.down_proj"))


@dataclasses.dataclass(frozen=True)
class _Unchanged(QuantDLLM):
    """Looks at the model after the window, whose float linears have to be back."""

    def quantize_window(self, window: Any) -> Any:
        before = {name: window.blocks[0].get_submodule(name.split(".", 1)[1]) for name in window.linears}
        packed = super().quantize_window(window)
        after = {name: window.blocks[0].get_submodule(name.split(".", 1)[1]) for name in window.linears}
        assert all(type(after[name]) is type(module) for name, module in before.items())
        return packed


@pytest.mark.parametrize("factor", [1.0, 2.0**-30])
def test_weights_of_any_magnitude(tiny_model: Callable[..., PreTrainedModel], factor: float) -> None:
    """Rescaled weights give the same bytes, beside their exponents."""
    method: LayerwiseMethod = _Unchanged(order=1)
    plain = packed_linears(tiny_model("llama"), method)
    model = tiny_model("llama")
    with torch.no_grad():
        for decoder in model.model.layers:
            decoder.mlp.up_proj.weight *= factor
            decoder.mlp.down_proj.weight /= factor
    scaled = packed_linears(model, method)
    for name, expected in plain.items():
        unit = {"up_proj": factor, "down_proj": 1 / factor}.get(name.rsplit(".", 1)[1], 1.0)
        torch.testing.assert_close(scaled[name].packed.dequantize() / unit, expected.packed.dequantize())


def test_it_is_at_the_root_of_the_package() -> None:
    assert ptq161.QuantDLLM is QuantDLLM
