from __future__ import annotations

from collections.abc import Callable

import pytest
import torch
from torch import Tensor, nn
from transformers import PreTrainedModel

import ptq161
from ptq161.errors import UserError
from ptq161.methods import rtn
from ptq161.methods.omniquant import ClippedLinear, OmniQuant, reconstruction_loss
from ptq161.packed.linear import PackedLinear
from ptq161.packed.uniform import UniformWeight

TOKENS = torch.randint(0, 256, (6, 32), generator=torch.Generator().manual_seed(0))


def quantized(
    model: PreTrainedModel, method: OmniQuant
) -> tuple[dict[str, PackedLinear], dict[tuple[int, int], float]]:
    """Quantize a tiny model; return its packed linears, and the loss by block and epoch."""
    losses: dict[tuple[int, int], float] = {}

    def keep_loss(name: str, value: float, /, **where: int | str) -> None:
        if name == "loss":
            losses[int(where["block"]), int(where["epoch"])] = value

    ptq161.quantize(model, TOKENS, method, on_metric=keep_loss)
    return {name: module for name, module in model.named_modules() if isinstance(module, PackedLinear)}, losses


def released_weight(weight: Tensor, upper: Tensor, lower: Tensor, bits: int) -> Tensor:
    """The released quantizer's formulas, in plain autograd."""
    largest = 2**bits - 1
    high = upper.sigmoid() * weight.amax(-1, keepdim=True)
    low = lower.sigmoid() * weight.amin(-1, keepdim=True)
    scale = ((high - low) / largest).clamp(min=1e-5)
    zero_point = (-low / scale).round().detach()
    steps = weight / scale
    rounded = (steps.round() - steps).detach() + steps
    return ((rounded + zero_point).clamp(0, largest) - zero_point) * scale


@pytest.mark.parametrize("bits", [2, 3, 4, 8])
def test_values_and_gradients_of_the_released_quantizer(bits: int) -> None:
    linear = nn.Linear(40, 12)
    layer = ClippedLinear(linear, bits, scale_dtype="float32")
    generator = torch.Generator().manual_seed(bits)
    with torch.no_grad():
        for factor in (layer.upper_factor, layer.lower_factor):
            factor.copy_(3 * torch.randn(factor.shape, generator=generator))
    upper, lower = (f.detach().squeeze(-1).clone().requires_grad_() for f in (layer.upper_factor, layer.lower_factor))
    expected = released_weight(linear.weight.detach(), upper, lower, bits)
    actual = layer.rounded_weight()
    torch.testing.assert_close(actual, expected, atol=1e-6, rtol=1e-5)
    sensitivity = torch.randn(expected.shape, generator=generator)
    (expected * sensitivity).sum().backward()
    (actual * sensitivity).sum().backward()
    torch.testing.assert_close(layer.upper_factor.grad.squeeze(-1), upper.grad, atol=1e-5, rtol=1e-4)
    torch.testing.assert_close(layer.lower_factor.grad.squeeze(-1), lower.grad, atol=1e-5, rtol=1e-4)
    assert upper.grad.abs().min() > 0


@pytest.mark.parametrize("scale_dtype", ["float16", "float32"])
@pytest.mark.parametrize("group_size", [None, 16, 24])
def test_the_packed_weight_is_what_was_evaluated(group_size: int | None, scale_dtype: str) -> None:
    layer = ClippedLinear(nn.Linear(40, 12, bias=False), 2, group_size=group_size, scale_dtype=scale_dtype)
    with torch.no_grad():
        layer.upper_factor.copy_(torch.randn_like(layer.upper_factor))
        layer.lower_factor.copy_(torch.randn_like(layer.lower_factor))
    packed = layer.pack()
    torch.testing.assert_close(packed.dequantize(), layer.rounded_weight().detach(), atol=1e-6, rtol=1e-6)
    assert packed.scales.shape == (12, 1 if group_size is None else -(-40 // group_size))


def test_large_factors_are_round_to_nearest() -> None:
    linear = nn.Linear(40, 12)
    layer = ClippedLinear(linear, 3)
    with torch.no_grad():
        layer.upper_factor.fill_(100)
        layer.lower_factor.fill_(100)
    assert torch.equal(layer.pack().dequantize(), rtn.quantize_weight(linear.weight.detach(), 3).dequantize())


def test_the_loss_is_the_sum_over_the_targets() -> None:
    y, a, b = (torch.randn(2, 3, 4) for _ in range(3))
    torch.testing.assert_close(reconstruction_loss(y, a), (y - a).square().mean())
    torch.testing.assert_close(reconstruction_loss(y, a, b), (y - a).square().mean() + (y - b).square().mean())


def test_learning_lowers_the_loss_and_the_error_of_the_model(tiny_model: Callable[..., PreTrainedModel]) -> None:
    exact = tiny_model("llama")
    with torch.no_grad():
        logits = exact(TOKENS).logits
    errors = []
    for epochs in (0, 8):
        model = tiny_model("llama")
        _, losses = quantized(model, OmniQuant(epochs=epochs, lr=0.2))
        with torch.no_grad():
            errors.append(float((model(TOKENS).logits - logits).square().mean()))
    assert losses.keys() == {(block, epoch) for block in range(2) for epoch in range(8)}
    assert all(losses[block, 7] < 0.8 * losses[block, 0] for block in range(2))
    assert errors[1] < 0.8 * errors[0]


def test_the_first_loss_is_that_of_the_initial_clipping(tiny_model: Callable[..., PreTrainedModel]) -> None:
    """By hand: learning rate 0, the first block, both targets the same on the first block's input."""
    exact, model = tiny_model("llama", n_blocks=1), tiny_model("llama", n_blocks=1)
    _, losses = quantized(model, OmniQuant(epochs=1, lr=0.0, batch_size=4))
    outputs = []
    for network in (exact, model):
        hook = network.model.layers[0].register_forward_hook(lambda _, __, output: outputs.append(output))
        with torch.no_grad():
            network(TOKENS, use_cache=False)
        hook.remove()
    full, packed = (output[0] if isinstance(output, tuple) else output for output in outputs)
    batches = [2 * (full[b] - packed[b]).square().mean() for b in (slice(0, 4), slice(4, 6))]
    assert losses[0, 0] == pytest.approx(float(sum(batches) / 2), rel=1e-4)


def test_windows_of_two_blocks(tiny_model: Callable[..., PreTrainedModel]) -> None:
    linears, losses = quantized(tiny_model("llama", n_blocks=3), OmniQuant(epochs=1, block_size=2, batch_size=4))
    assert len(linears) == 21 and losses.keys() == {(0, 0), (2, 0)}


@pytest.mark.parametrize("architecture", ["opt", "mistral", "qwen2", "qwen3", "gemma2", "gemma3_text"])
def test_models(architecture: str, tiny_model: Callable[..., PreTrainedModel]) -> None:
    """With biases, autocast, groups that do not divide the width, and without the second target."""
    method = OmniQuant(epochs=2, group_size=20, aug_loss=False, batch_size=4, compute_dtype="bfloat16", lr=0.1)
    linears, losses = quantized(tiny_model(architecture), method)
    assert all(isinstance(module.packed, UniformWeight) for module in linears.values())
    assert len(losses) == 4


def test_two_runs_agree_to_the_bit(tiny_model: Callable[..., PreTrainedModel]) -> None:
    first, second = (quantized(tiny_model("llama"), OmniQuant(epochs=2, lr=0.1))[0] for _ in range(2))
    for name, module in first.items():
        for key, tensor in module.packed.state_dict().items():
            assert torch.equal(tensor, second[name].packed.state_dict()[key])


@pytest.mark.parametrize(
    "settings", [{"bits": 1}, {"group_size": 0}, {"epochs": -1}, {"lr": float("nan")}, {"lr": -1.0}, {"batch_size": 0}]
)
def test_settings_out_of_range(settings: dict[str, float]) -> None:
    with pytest.raises(UserError, match=f"method.{next(iter(settings))}="):
        OmniQuant(**settings)


def test_a_block_size_of_zero() -> None:
    with pytest.raises(UserError, match="block_size=0"):
        OmniQuant(block_size=0)


def test_a_loss_that_is_not_finite(tiny_model: Callable[..., PreTrainedModel]) -> None:
    model = tiny_model("llama", n_blocks=1)
    with torch.no_grad():
        model.model.layers[0].mlp.down_proj.weight.mul_(1e25)
    with pytest.raises(UserError, match="block 0"):
        quantized(model, OmniQuant(epochs=1, scale_dtype="float32"))


def test_a_weight_that_is_not_finite() -> None:
    linear = nn.Linear(4, 4)
    nn.init.constant_(linear.weight, float("nan"))
    with pytest.raises(UserError, match="NaN or infinite"):
        ClippedLinear(linear, 2)
