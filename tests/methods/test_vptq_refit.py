"""The refit of VPTQ's codebooks: what moves, at which rates, and what stays."""

from __future__ import annotations

import dataclasses
from collections.abc import Callable
from typing import Any

import pytest
import torch
from transformers import PreTrainedModel

import ptq161
from ptq161.errors import UserError
from ptq161.methods.vptq import VPTQ
from ptq161.packed.model import packed_linears as packed_of
from tests.methods.layers import packed_linears


def test_the_refit_lowers_the_loss_and_leaves_indices_and_bytes(tiny_model: Callable[..., PreTrainedModel]) -> None:
    losses: list[float] = []

    def on_metric(name: str, value: float, /, **where: int | str) -> None:
        if name == "loss" and where["block"] == 0:
            losses.append(value)

    tokens = torch.randint(3, 256, (6, 32), generator=torch.Generator().manual_seed(0))
    plain = VPTQ(vector_length=4, centroids=32, row_scales=True, batch_size=2)
    method = dataclasses.replace(plain, refit_steps=14)
    assert method.needs_full_chain and not plain.needs_full_chain
    before, after = (ptq161.quantize(tiny_model("llama"), tokens, m, on_metric=on_metric) for m in (plain, method))
    assert len(losses) == 5 and losses[-1] < 0.8 * losses[0]  # 3 steps an epoch, and 2 in the last
    for name, a in packed_of(before).items():
        if name.startswith("model.layers.0"):  # the inputs of the other differ
            b = packed_of(after)[name]
            assert a.packed.nbytes == b.packed.nbytes and a.packed.settings() == b.packed.settings()
            assert torch.equal(a.indices, b.indices) and not torch.equal(a.centroids, b.centroids)
            assert not torch.equal(a.row_scale, b.row_scale)


def test_a_refit_moves_scales_at_a_rate_of_their_own(tiny_model: Callable[..., PreTrainedModel]) -> None:
    tokens = torch.randint(3, 256, (4, 16), generator=torch.Generator().manual_seed(0))
    plain = VPTQ(vector_length=4, centroids=16, row_scales=True, normalize=True, batch_size=2)
    rates: list[dict[str, Any]] = [{}, {"refit_steps": 2}, {"refit_steps": 2, "refit_scale_lr": 2e-2}]
    rates += [{"refit_steps": 2, "refit_scale_lr": 0.0}, {"refit_steps": 2, "refit_lr": 0.0, "refit_scale_lr": 1e-2}]
    found = []
    for rate in rates:
        packed = packed_of(ptq161.quantize(tiny_model("llama"), tokens, dataclasses.replace(plain, **rate)))
        found.append(packed["model.layers.0.mlp.down_proj"].packed.state_dict())
    start, both, same, centroids, scales = found
    assert all(torch.equal(both[name], same[name]) for name in start)
    factors = ["row_scale", "column_scale", "column_offset"]
    for name in factors:
        assert torch.equal(start[name], centroids[name]) and not torch.equal(start[name], scales[name])
    assert torch.equal(start["centroids"], scales["centroids"])
    assert not torch.equal(start["centroids"], centroids["centroids"])


def test_the_rates_of_a_refit_fall_linearly(
    tiny_model: Callable[..., PreTrainedModel], monkeypatch: pytest.MonkeyPatch
) -> None:
    rates: list[list[float]] = []
    step = torch.optim.Adam.step

    def recorded(self: torch.optim.Adam, *args: Any, **kwargs: Any) -> Any:
        rates.append([group["lr"] for group in self.param_groups])
        return step(self, *args, **kwargs)

    monkeypatch.setattr(torch.optim.Adam, "step", recorded)
    tokens = torch.randint(3, 256, (4, 16), generator=torch.Generator().manual_seed(0))
    refitted: dict[str, Any] = {"refit_steps": 4, "refit_lr": 0.04, "refit_scale_lr": 0.008}
    method = VPTQ(vector_length=4, centroids=16, row_scales=True, batch_size=2, **refitted)
    model = ptq161.quantize(tiny_model("llama"), tokens, method)
    of_a_block = [[0.04, 0.008], [0.03, 0.006], [0.02, 0.004], [0.01, 0.002]]
    assert torch.allclose(torch.tensor(rates), torch.tensor(of_a_block * model.config.num_hidden_layers))


def test_a_refit_is_deterministic(tiny_model: Callable[..., PreTrainedModel]) -> None:
    method = VPTQ(vector_length=4, centroids=16, normalize=True, residual_centroids=4, batch_size=2, refit_steps=3)
    first, second = (packed_linears(tiny_model("llama"), method) for _ in range(2))
    assert all(torch.equal(first[name].dequantize(), second[name].dequantize()) for name in first)


def test_a_loss_that_is_not_finite_names_the_block(tiny_model: Callable[..., PreTrainedModel]) -> None:
    with pytest.raises(UserError, match=r"in block 0, epoch \d+: lower the method's learning rates"):
        packed_linears(
            tiny_model("llama"), VPTQ(vector_length=4, centroids=16, batch_size=2, refit_steps=9, refit_lr=1e30)
        )
