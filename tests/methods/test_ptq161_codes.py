"""PTQ1.61 with codes beyond the nearest: compensated, learned, and with learned means."""

from __future__ import annotations

import dataclasses
from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from transformers import PreTrainedModel

import ptq161
from ptq161.errors import UserError
from ptq161.methods.codes import LatentLinear
from ptq161.methods.ptq161 import PTQ161, initial_scales, pack_weight, salient_mask
from ptq161.methods.ptq161.coding import binary_grid, pack_latent
from ptq161.models.architectures import quantized_linears
from ptq161.packed.structured_binary import StructuredBinaryWeight

TinyModel = Callable[..., PreTrainedModel]
TOKENS = torch.randint(3, 256, (64, 32), generator=torch.Generator().manual_seed(2))
LEARNED = PTQ161(codes="learned", epochs=3, batch_size=2)


def run(
    model: PreTrainedModel, method: PTQ161, tokens: Tensor = TOKENS
) -> tuple[dict[str, StructuredBinaryWeight], dict[tuple[str, int, int], float]]:
    metrics: dict[tuple[str, int, int], float] = {}

    def keep(name: str, value: float, /, **where: int | str) -> None:
        if "epoch" in where:
            metrics[name, int(where["block"]), int(where["epoch"])] = value

    ptq161.quantize(model, tokens, method, on_metric=keep)
    return {name: module.packed for name, module in quantized_linears(model)}, metrics


def same(one: StructuredBinaryWeight, other: StructuredBinaryWeight) -> bool:
    return all(torch.equal(t, other.state_dict()[name]) for name, t in one.state_dict().items())


@pytest.mark.parametrize("salient_range", ["row", "salient"])
@pytest.mark.parametrize("ratio", [0.0, 0.2])
def test_nearest_codes_on_the_grid_are_the_released_ones(ratio: float, salient_range: str) -> None:
    linear = nn.Linear(40, 12, bias=False)
    weight = linear.weight.detach()
    mask = salient_mask(torch.rand(40, generator=torch.Generator().manual_seed(0)), ratio)
    grid = binary_grid(weight, mask, 4, salient_range, "float16")
    packed = pack_latent(LatentLinear(linear, grid, grid.nearest(weight), torch.float32))
    ones = torch.ones(12, 1), torch.ones(1, 40)
    assert same(packed, pack_weight(weight, mask, *initial_scales(weight, mask), *ones, salient_range=salient_range))


def output_error(model: PreTrainedModel, full: PreTrainedModel) -> float:
    with torch.no_grad():
        target = full(TOKENS).logits
        return float((model(TOKENS).logits - target).square().sum() / target.square().sum())


def test_each_step_lowers_the_error_of_the_model(tiny_model: TinyModel) -> None:
    full = tiny_model("llama")
    errors = []
    for codes, epochs in (("rounded", 0), ("compensated", 0), ("learned", 8)):
        model = tiny_model("llama")
        run(model, PTQ161(codes=codes, epochs=epochs, batch_size=2, code_lr=0.05))
        errors.append(output_error(model, full))
    assert errors[0] > errors[1] > errors[2]


def test_learned_codes_start_from_compensated_ones(tiny_model: TinyModel) -> None:
    start, _ = run(tiny_model("llama"), dataclasses.replace(LEARNED, epochs=0))
    compensated, _ = run(tiny_model("llama"), PTQ161(codes="compensated", epochs=0, batch_size=2))
    assert all(same(weight, compensated[name]) for name, weight in start.items())
    learned, metrics = run(tiny_model("llama"), dataclasses.replace(LEARNED, code_lr=0.05))
    assert any(not torch.equal(weight.sign, start[name].sign) for name, weight in learned.items())
    assert any(not torch.equal(weight.codes, start[name].codes) for name, weight in learned.items())
    assert all(weight.nbytes == start[name].nbytes for name, weight in learned.items())
    assert min(metrics["held_out_loss", 0, epoch] for epoch in range(3)) < metrics["held_out_loss", 0, -1]


@pytest.mark.parametrize("codes", ["rounded", "learned"])
def test_means_move_where_they_are_learned(codes: str, tiny_model: TinyModel) -> None:
    # Angles stay, since a row's angle is stored in its mean.
    method = dataclasses.replace(LEARNED, codes=codes, learn_angles=False, held_out=0.0)
    still, _ = run(tiny_model("llama"), method)
    moved, _ = run(tiny_model("llama"), dataclasses.replace(method, learn_mean=True))
    start, _ = run(tiny_model("llama"), dataclasses.replace(method, epochs=0))
    for name, weight in start.items():
        assert torch.equal(still[name].mean, weight.mean) and torch.equal(still[name].column_angle, weight.column_angle)
        assert not torch.equal(moved[name].mean, weight.mean)
        assert not torch.equal(still[name].scale, weight.scale)


@pytest.mark.parametrize("codes", ["compensated", "learned"])
def test_rows_and_columns_of_zeros_stay_zero(codes: str, tiny_model: TinyModel) -> None:
    model = tiny_model("llama")
    linear = model.model.layers[0].mlp.up_proj
    with torch.no_grad():
        linear.weight[3] = 0
        linear.weight[:, 5] = 0
    packed, _ = run(model, dataclasses.replace(LEARNED, codes=codes, learn_mean=True))
    weight = packed["0.mlp.up_proj"].dequantize()
    assert (weight[3] == 0).all() and (weight[:, 5] == 0).all()


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"codes": "best"}, r"method\.codes=best: use one of rounded, compensated, learned"),
        ({"code_lr": -1.0}, r"method\.code_lr=-1\.0: use a finite learning rate"),
        ({"factor_lr": float("inf")}, r"method\.factor_lr=inf: use a finite learning rate"),
        ({"held_out": 0.6}, r"method\.held_out=0\.6: use a share of the windows from 0 to 0\.5"),
        ({"damping": -0.1}, r"method\.damping=-0\.1"),
    ],
)
def test_settings_out_of_range(settings: dict[str, Any], message: str) -> None:
    with pytest.raises(UserError, match=message):
        PTQ161(**settings)
