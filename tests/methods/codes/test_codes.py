"""Learned codes: the grid, compensated codes, the latent linear, and the learning itself."""

from __future__ import annotations

import copy
import dataclasses
from collections.abc import Callable

import pytest
import torch
from torch import Tensor, nn
from transformers import PreTrainedModel

import ptq161
from ptq161.errors import UserError
from ptq161.methods.base import Method
from ptq161.methods.codes import CodeGrid, LatentLinear, compensated_codes, fit_grid
from ptq161.methods.codes.learn import block_error, relative_errors
from ptq161.packed.model import packed_linears, sha256_of_packed

TinyModel = Callable[..., PreTrainedModel]
TOKENS = torch.randint(3, 256, (8, 32), generator=torch.Generator().manual_seed(0))


MANY = torch.randint(3, 256, (64, 64), generator=torch.Generator().manual_seed(0))


def draw(*shape: int, seed: int = 0) -> Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed))


def grid_of(weight: Tensor, *, mean: bool = False) -> CodeGrid:
    bits = torch.tensor([1, 2, 4, 3])[torch.arange(weight.shape[1]) % 4]
    grid = fit_grid(weight, bits)
    return grid._replace(mean=0.1 * draw(weight.shape[0], 1, seed=5)) if mean else grid


# the grid


@pytest.mark.parametrize("mean", [False, True])
def test_positions_are_codes_on_the_grid_itself(mean: bool) -> None:
    weight = draw(6, 16)
    grid = grid_of(weight, mean=mean)
    codes = grid.nearest(weight)
    assert torch.equal(codes, codes.round()) and (codes >= 0).all() and (codes <= grid.levels).all()
    torch.testing.assert_close(grid.position(grid.values(codes)), codes, rtol=1e-4, atol=1e-4)
    assert torch.equal(grid.nearest(grid.values(codes)), codes)


def test_no_code_is_nearer_than_the_nearest() -> None:
    weight = draw(4, 8)
    grid = grid_of(weight)
    error = (grid.values(grid.nearest(weight)) - weight).abs()
    for code in range(16):
        there = torch.minimum(torch.full_like(weight, float(code)), grid.levels)
        assert (error <= (grid.values(there) - weight).abs() + 1e-6).all()


def test_factors_have_the_energies_of_rows_and_columns() -> None:
    weight = draw(64, 256) * torch.linspace(0.1, 3, 64).unsqueeze(1) * torch.linspace(0.5, 2, 256)
    grid = fit_grid(weight, torch.ones(256, dtype=torch.long))
    units = weight / (grid.row * grid.column)
    torch.testing.assert_close(units.square().mean(0), torch.ones(256), rtol=1e-3, atol=1e-3)
    torch.testing.assert_close(units.square().mean(1), torch.ones(64), rtol=1e-2, atol=1e-2)


def test_zero_rows_and_columns_stay_zero() -> None:
    weight = draw(6, 8)
    weight[1] = 0
    weight[:, 4] = 0
    grid = fit_grid(weight, torch.tensor([1, 2, 4, 3, 1, 2, 4, 3]))
    values = grid.values(grid.nearest(weight))
    assert torch.isfinite(values).all()
    assert (values[1] == 0).all() and (values[:, 4] == 0).all()


def test_compensation_lowers_the_weighted_error() -> None:
    weight, x = draw(32, 64), draw(512, 64, seed=1) @ draw(64, 64, seed=2)
    hessian = x.T @ x / len(x)
    grid = grid_of(weight)

    def error(codes: Tensor) -> float:
        difference = grid.values(codes) - weight
        return float((difference @ hessian @ difference.T).trace())

    codes = compensated_codes(weight, grid, hessian)
    assert torch.equal(codes, codes.round()) and (codes >= 0).all() and (codes <= grid.levels).all()
    assert error(codes) < 0.7 * error(grid.nearest(weight))


# the latent linear


@pytest.mark.parametrize("mean", [False, True])
@pytest.mark.parametrize("bias", [False, True])
def test_a_latent_linear_computes_what_its_codes_stand_for(mean: bool, bias: bool) -> None:
    linear = nn.Linear(16, 6, bias=bias)
    weight = linear.weight.detach()
    grid = grid_of(weight, mean=mean)
    codes = torch.minimum((grid.nearest(weight) + 1), grid.levels)
    layer = LatentLinear(linear, grid, codes, torch.float32)
    assert torch.equal(layer.codes(), codes)
    x = draw(5, 16)
    expected = x @ grid.values(codes).T + (0 if linear.bias is None else linear.bias)
    torch.testing.assert_close(layer(x), expected)
    with torch.no_grad():
        for parameter in (layer.row_gain, layer.column_gain, layer.scale_gain):
            parameter += 0.1 * torch.randn_like(parameter)
    expected = x @ layer.grid().values(codes).T + (0 if linear.bias is None else linear.bias)
    torch.testing.assert_close(layer(x), expected, rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("mean", [False, True])
def test_gradients_are_those_of_the_dense_expression(mean: bool) -> None:
    linear = nn.Linear(16, 6, bias=False)
    weight = linear.weight.detach()
    grid = grid_of(weight, mean=mean)
    layer = LatentLinear(linear, grid, grid.nearest(weight), torch.float32)
    x, target = draw(9, 16), draw(9, 6, seed=3)
    (layer(x) * target).sum().backward()
    rows, columns, scales = (
        torch.zeros_like(p).requires_grad_() for p in (layer.row_gain, layer.column_gain, layer.scale_gain)
    )
    free = grid._replace(
        row=grid.row * (1 + rows), column=grid.column * (1 + columns[0]), scale=grid.scale * (1 + scales)
    )
    dense = free.values(layer.codes())
    gradients = torch.autograd.grad((x @ dense.T * target).sum(), (rows, columns, scales, dense))
    for found, expected in zip((layer.row_gain, layer.column_gain, layer.scale_gain), gradients, strict=False):
        torch.testing.assert_close(found.grad, expected, rtol=1e-4, atol=1e-4)
    # Straight through: the code is taken to follow its latent one to one.
    torch.testing.assert_close(layer.latent.grad, gradients[3] * grid.scales(), rtol=1e-4, atol=1e-5)


def test_softened_codes_are_between_code_and_latent() -> None:
    linear = nn.Linear(16, 6, bias=False)
    weight = linear.weight.detach()
    grid = grid_of(weight)
    layer = LatentLinear(linear, grid, grid.nearest(weight), torch.float32)
    hard, x = layer.codes(), torch.eye(16)
    free = torch.minimum(layer.latent.detach().clamp(min=0), grid.levels)
    for share in (0.0, 0.25, 1.0):
        layer.softness = share
        expected = grid.values(hard + share * (free - hard))
        torch.testing.assert_close(layer(x).T, expected, rtol=1e-4, atol=1e-5)
        assert torch.equal(layer.codes(), hard)
        layer.latent.grad = None
        layer(x).sum().backward()
        assert layer.latent.grad is not None
        torch.testing.assert_close(layer.latent.grad, grid.scales().expand(6, 16), rtol=1e-4, atol=1e-5)


def test_latents_far_outside_the_grid_do_not_learn() -> None:
    linear = nn.Linear(4, 2, bias=False)
    grid = fit_grid(linear.weight.detach(), torch.tensor([1, 1, 2, 4]))
    layer = LatentLinear(linear, grid, grid.nearest(linear.weight.detach()), torch.float32)
    with torch.no_grad():
        layer.latent[0] = torch.tensor([-0.8, 1.7, 3.8, 15.8])
        layer.latent[1] = torch.tensor([-0.7, 1.7, 3.7, 15.7])
    layer(draw(3, 4)).sum().backward()
    assert layer.latent.grad is not None
    assert (layer.latent.grad[0] != 0).tolist() == [False, True, False, False]
    assert (layer.latent.grad[1] != 0).all()


# the losses and the learning


def test_the_losses() -> None:
    target = draw(2, 3, 4)
    assert float(block_error(target, target, target)) == 0
    assert float(relative_errors(torch.zeros_like(target), target)) == pytest.approx(2)
    assert float(relative_errors(torch.ones(1, 2), torch.zeros(1, 2))) > 0  # defined where there is no target
    # A massive token decides the first of the two errors alone.
    massive = target.clone()
    massive[0, 0] *= 1000
    off = massive.clone()
    off[0, 0] *= 1.1
    assert float(relative_errors(off, massive)) == pytest.approx(0.01 + 0.01 / 6, rel=1e-3)


def block_losses(model: PreTrainedModel, method: Method, name: str, tokens: Tensor = MANY) -> list[float]:
    found: list[float] = []

    def on_metric(metric: str, value: float, /, **where: int | str) -> None:
        if metric == name and where["block"] == 0:
            found.append(value)

    ptq161.quantize(model, tokens, method, on_metric=on_metric)
    return found


def test_learning_lowers_the_held_out_loss(tiny_model: TinyModel) -> None:
    method = ptq161.Waterfill(level="linear", epochs=6, batch_size=2, held_out=0.1)
    model = tiny_model("llama")
    losses = block_losses(model, method, "held_out_loss")
    assert len(losses) == 7  # the start, and each epoch
    assert min(losses) < 0.9 * losses[0]
    training = block_losses(tiny_model("llama"), method, "loss")
    assert len(training) == 6 and training[-1] < 0.8 * training[0]


def test_softened_codes_end_whole(tiny_model: TinyModel) -> None:
    """What is held out is measured on whole codes, and what is stored is the best of these."""
    soft = ptq161.Waterfill(level="linear", epochs=6, batch_size=2, held_out=0.1, softness=1.0)
    losses = block_losses(tiny_model("llama"), soft, "held_out_loss")
    plain = block_losses(tiny_model("llama"), dataclasses.replace(soft, softness=0.0), "held_out_loss")
    assert losses[0] == plain[0] and min(losses) < 0.9 * losses[0]
    assert losses[1:] != plain[1:]


@pytest.mark.parametrize(
    "method",
    [
        ptq161.Waterfill(level="linear", epochs=2, absorb_epochs=2, batch_size=2),
        ptq161.PTQ161(codes="learned", epochs=2, absorb_epochs=2, batch_size=2, learn_mean=True),
    ],
    ids=["waterfill", "ptq161"],
)
def test_what_is_still_float_absorbs_errors(tiny_model: TinyModel, method: Method) -> None:
    model = tiny_model("llama")
    losses = block_losses(model, method, "absorb_loss", MANY[:16])
    assert len(losses) == 6  # two epochs after q, k and v, two after o, two after gate and up
    again = tiny_model("llama")
    absorbed = block_losses(again, method, "held_out_loss", MANY[:16])
    assert min(absorbed) <= absorbed[0]
    assert sha256_of_packed(model) == sha256_of_packed(again)
    plain = ptq161.quantize(tiny_model("llama"), MANY[:16], dataclasses.replace(method, absorb_epochs=0))
    assert sha256_of_packed(model) != sha256_of_packed(plain)


def test_absorption_leaves_the_weights_of_the_window(tiny_model: TinyModel) -> None:
    """The full-precision chain goes on with the weights as they were: with no step, nothing is absorbed."""
    still = ptq161.Waterfill(level="linear", epochs=1, absorb_epochs=1, absorb_lr=0.0, code_lr=0.0, factor_lr=0.0)
    still = dataclasses.replace(still, batch_size=2)
    losses = block_losses(tiny_model("llama"), still, "held_out_loss", MANY[:16])
    assert losses[1] == pytest.approx(losses[0], rel=1e-6)


@pytest.mark.parametrize("softness", [-0.1, 1.1])
def test_a_softness_that_is_no_share(softness: float) -> None:
    with pytest.raises(UserError, match=rf"^method\.softness={softness}: use a share in \[0, 1\]\.$"):
        ptq161.Waterfill(softness=softness)


def test_the_best_state_is_kept(tiny_model: TinyModel) -> None:
    """With a rate that destroys the block, the compensated start is what is stored."""
    start = ptq161.quantize(
        tiny_model("llama"), TOKENS, ptq161.Waterfill(level="linear", codes="compensated", batch_size=2)
    )
    wild = ptq161.Waterfill(level="linear", epochs=1, batch_size=2, code_lr=5.0, factor_lr=0.5)
    kept = ptq161.quantize(tiny_model("llama"), TOKENS, wild)
    assert sha256_of_packed(kept) == sha256_of_packed(start)
    last = ptq161.quantize(tiny_model("llama"), TOKENS, ptq161.Waterfill(**{**wild.__dict__, "held_out": 0.0}))
    assert sha256_of_packed(last) != sha256_of_packed(start)


def test_what_is_stored_is_what_was_learned(tiny_model: TinyModel) -> None:
    """Packing rounds factors to float16 and nothing else."""
    method = ptq161.Waterfill(level="linear", epochs=2, batch_size=2, scale_dtype="float32")
    half = ptq161.Waterfill(level="linear", epochs=2, batch_size=2, scale_dtype="float16")
    exact, rounded = (packed_linears(ptq161.quantize(tiny_model("llama"), TOKENS, m)) for m in (method, half))
    name = "model.layers.0.self_attn.q_proj"
    difference = exact[name].dequantize() - rounded[name].dequantize()
    assert 0 < difference.norm() < 0.05 * exact[name].dequantize().norm()


def test_the_same_seed_gives_the_same_bytes(tiny_model: TinyModel) -> None:
    method = ptq161.Waterfill(level="linear", epochs=2, batch_size=2)
    models = [ptq161.quantize(tiny_model("llama"), TOKENS, method, seed=seed) for seed in (0, 0, 1)]
    first, again, other = (sha256_of_packed(model) for model in models)
    assert first == again != other


def test_a_loss_that_is_not_finite_names_block_and_rates(tiny_model: TinyModel) -> None:
    model = copy.deepcopy(tiny_model("llama"))
    method = ptq161.Waterfill(level="linear", epochs=3, batch_size=2, code_lr=0.0, factor_lr=1e38)
    with pytest.raises(ptq161.UserError, match=r"in block 0, epoch 0: lower method\.code_lr or method\.factor_lr\."):
        ptq161.quantize(model, TOKENS, method)
