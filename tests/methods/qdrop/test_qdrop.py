"""QDrop on tiny models: weights, and activations that are stored, applied and taken along."""

from __future__ import annotations

import dataclasses
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from transformers import AutoModelForCausalLM, PreTrainedModel, PreTrainedTokenizerFast

import ptq161
from ptq161.errors import UserError
from ptq161.methods.qdrop import QDrop
from ptq161.packed.layout import WEIGHTS_FILE
from ptq161.packed.linear import PackedLinear, dense_cache
from ptq161.packed.model import activation_bits, cast_rest, measure, packed_linears
from ptq161.packed.trainable import ScaledLinear, scale_tensors
from ptq161.packed.uniform import UniformWeight
from ptq161.run.stages import _packed_size

TinyModel = Callable[..., PreTrainedModel]
TOKENS = torch.randint(3, 256, (8, 24), generator=torch.Generator().manual_seed(0))
QUICK = QDrop(steps=4, batch_size=2)
LEARNING = QDrop(steps=100, batch_size=2, alpha_lr=2e-2, rounding_weight=1e-4)
Metrics = dict[tuple[str, int, int], float]


def quantized(model: PreTrainedModel, method: QDrop, **arguments: Any) -> tuple[PreTrainedModel, Metrics]:
    metrics: Metrics = {}

    def keep(name: str, value: float, /, **where: int | str) -> None:
        if "epoch" in where:
            metrics[name, int(where["block"]), int(where["epoch"])] = value

    return ptq161.quantize(model, TOKENS, method, on_metric=keep, **arguments), metrics


def block_error(model: PreTrainedModel, other: PreTrainedModel) -> float:
    """Relative squared error of the last hidden states, before the head."""
    with torch.no_grad():
        ours, theirs = (m.model(TOKENS).last_hidden_state for m in (model, other))
    return float((ours - theirs).square().sum() / theirs.square().sum())


@pytest.mark.parametrize(
    ("architecture", "bits", "group_size"), [("llama", 2, None), ("opt", 3, 24), ("gemma3_text", 2, 16)]
)
def test_packed_weights(tiny_model: TinyModel, architecture: str, bits: int, group_size: int | None) -> None:
    method = dataclasses.replace(QUICK, bits=bits, group_size=group_size)
    model, _ = quantized(tiny_model(architecture), method)
    for layer in packed_linears(model).values():
        packed = layer.packed
        assert isinstance(packed, UniformWeight)
        assert (packed.bits, packed.group_size, packed.activation_bits) == (bits, group_size, None)
    assert activation_bits(model) is None and method.nominal_bits() == bits


def test_learning_lowers_the_error_below_that_of_rounding_to_nearest(tiny_model: TinyModel) -> None:
    full = tiny_model("llama")
    learned, metrics = quantized(tiny_model("llama"), LEARNING)
    nearest, none = quantized(tiny_model("llama"), dataclasses.replace(LEARNING, steps=0))
    assert not none
    assert block_error(learned, full) < 0.9 * block_error(nearest, full)
    # Reported apart: 8 samples make 4 batches, and the rounding counts after the warm-up of 20 steps.
    epochs = sorted({epoch for _, _, epoch in metrics})
    assert epochs == list(range(25))
    for (name, block, epoch), loss in metrics.items():
        if name == "loss":
            parts = metrics["reconstruction_loss", block, epoch], metrics["rounding_loss", block, epoch]
            assert loss == pytest.approx(sum(parts)) and (parts[1] > 0) == (epoch >= 4)


def test_no_step_is_rounding_to_nearest(tiny_model: TinyModel) -> None:
    model, _ = quantized(tiny_model("llama"), dataclasses.replace(QUICK, steps=0, scale_dtype="float32"))
    full = tiny_model("llama")
    for name, layer in packed_linears(model).items():
        packed = layer.packed
        assert isinstance(packed, UniformWeight) and packed.zero_points is not None
        steps = full.get_submodule(name).weight / packed.scales + packed.zero_points
        assert (packed.unpacked_codes() - steps.clamp(0, 3)).abs().max() <= 0.5 + 1e-4


def test_seeds_and_drop_probabilities_matter(tiny_model: TinyModel) -> None:
    def codes(method: QDrop, seed: int = 0) -> Tensor:
        model, _ = quantized(tiny_model("llama"), method, seed=seed)
        return torch.cat([layer.packed.dequantize().flatten() for layer in packed_linears(model).values()])

    method = dataclasses.replace(LEARNING, steps=8)
    first = codes(method)
    assert torch.equal(first, codes(method))
    assert not torch.equal(first, codes(method, seed=1))
    assert not torch.equal(first, codes(dataclasses.replace(method, drop_probability=1.0)))


@pytest.mark.parametrize("bits", [4, 8])
def test_activations_are_stored_and_applied(
    tiny_model: TinyModel, tiny_tokenizer: PreTrainedTokenizerFast, tmp_path: Path, bits: int
) -> None:
    model, _ = quantized(tiny_model("llama"), dataclasses.replace(QUICK, activation_bits=bits))
    assert activation_bits(model) == bits
    linears = packed_linears(model)
    for group in (["q_proj", "k_proj", "v_proj"], ["gate_proj", "up_proj"]):
        shared = [layer.packed for name, layer in linears.items() if name.endswith(tuple(group)) and ".0." in name]
        assert len(shared) == len(group) and len({float(weight.activation_scale) for weight in shared}) == 1
    layer = linears["model.layers.0.mlp.down_proj"]
    packed = layer.packed
    assert packed.activation_scale is not None and packed.activation_zero_point is not None
    x = torch.randn(7, layer.in_features)
    codes = ((x / packed.activation_scale).round() + packed.activation_zero_point).clamp(0, 2**bits - 1)
    expected = ((codes - packed.activation_zero_point) * packed.activation_scale) @ layer.dequantize().T
    torch.testing.assert_close(layer(x), expected)
    with dense_cache(model, torch.float32):
        torch.testing.assert_close(layer(x), expected)
    # The bytes count in the file, not as the weight's.
    plain, _ = quantized(tiny_model("llama"), QUICK)
    assert measure(model).linear_bytes == measure(plain).linear_bytes
    assert measure(model).other_bytes == measure(plain).other_bytes + 5 * len(linears)
    # As stored, so loaded.
    file = ptq161.save(model, tiny_tokenizer, tmp_path / "packed")
    assert _packed_size(model, file)["activation_bits"] == bits and "activation_bits" not in _packed_size(plain, file)
    with torch.no_grad():
        logits = model(TOKENS).logits
        loaded = ptq161.load(tmp_path / "packed")[0], AutoModelForCausalLM.from_pretrained(tmp_path / "packed")
        for again in loaded:
            assert activation_bits(again) == bits and torch.equal(again(TOKENS).logits, logits)
        cast_rest(model, torch.bfloat16)
        ptq161.save(model, None, tmp_path / "half")
        half = AutoModelForCausalLM.from_pretrained(tmp_path / "half")
        scale = half.model.layers[0].mlp.down_proj.activation_scale
        assert scale.dtype == torch.float32 and torch.equal(scale, packed.activation_scale)
        assert torch.equal(half(TOKENS).logits, model(TOKENS).logits)


def test_changing_a_stored_activation_scale_changes_the_output(tiny_model: TinyModel) -> None:
    model, _ = quantized(tiny_model("llama"), dataclasses.replace(QUICK, activation_bits=4))
    with torch.no_grad():
        before = model(TOKENS).logits
        model.model.layers[1].self_attn.o_proj.activation_scale *= 2
        assert not torch.equal(model(TOKENS).logits, before)


def test_a_dense_export_is_refused(
    tiny_model: TinyModel, tiny_tokenizer: PreTrainedTokenizerFast, tmp_path: Path
) -> None:
    model, _ = quantized(tiny_model("llama"), dataclasses.replace(QUICK, activation_bits=8))
    file = ptq161.save(model, tiny_tokenizer, tmp_path / "packed")
    with pytest.raises(UserError, match=r"activations are quantized to 8 bits .* a dense model cannot"):
        ptq161.export(file.parent, tmp_path / "dense")
    assert not (tmp_path / "dense").exists()
    assert (tmp_path / "packed" / WEIGHTS_FILE).exists()


def test_inputs_of_any_magnitude(tiny_model: TinyModel) -> None:
    """A power of two that is taken out of a linear's inputs comes back into the scale of its activations."""
    method = dataclasses.replace(QUICK, activation_bits=8, relative_scale_lr=True)
    plain, _ = quantized(tiny_model("llama"), method)
    rescaled = tiny_model("llama")
    factor = 2.0**-20
    with torch.no_grad():
        for decoder in rescaled.model.layers:
            decoder.mlp.up_proj.weight *= factor
            decoder.mlp.down_proj.weight /= factor
    rescaled, _ = quantized(rescaled, method)
    for name, layer in packed_linears(rescaled).items():
        unit = factor if name.endswith("down_proj") else 1.0
        expected = packed_linears(plain)[name].packed.activation_scale
        assert layer.packed.activation_scale is not None and expected is not None
        torch.testing.assert_close(layer.packed.activation_scale / unit, expected, rtol=1e-3, atol=0)
    with torch.no_grad():
        torch.testing.assert_close(rescaled(TOKENS).logits, plain(TOKENS).logits, rtol=1e-2, atol=1e-2)


def test_finetuned_scales_see_rounded_inputs() -> None:
    codes = torch.randint(0, 4, (3, 5))
    packed = UniformWeight.pack(codes, torch.ones(3, 1), torch.ones(3, 1), bits=2)
    packed = packed.with_activations(4, torch.full((1,), 0.3), torch.tensor([7]))
    assert sorted(scale_tensors(packed)) == ["scales", "zero_points"]
    trained, stored = ScaledLinear(packed, None, torch.float32), PackedLinear(packed)
    x = torch.randn(6, 5, requires_grad=True)
    y = trained(x)
    torch.testing.assert_close(y, stored(x))
    y.sum().backward()
    assert x.grad is not None and x.grad.any()
    assert trained.repack().activation_bits == 4


def test_weights_without_activation_bits_have_the_settings_they_had() -> None:
    packed = UniformWeight.pack(torch.tensor([[0, 1]]), torch.ones(1, 1), torch.zeros(1, 1), bits=2)
    assert not [name for name in (*packed.settings(), *packed.state_dict()) if "activation" in name]


def test_windows_of_two_blocks_and_short_calibration(tiny_model: TinyModel) -> None:
    method = dataclasses.replace(QUICK, block_size=2, batch_size=32, activation_bits=8)
    model, metrics = quantized(tiny_model("llama", n_blocks=3), method)
    assert len(packed_linears(model)) == 21 and {block for _, block, _ in metrics} == {0, 2}


def test_an_expert_without_a_token_has_no_range_of_activations(tiny_model: TinyModel) -> None:
    model = tiny_model("mixtral")
    method = dataclasses.replace(QUICK, activation_bits=8, batch_size=1)
    with pytest.raises(UserError, match=r"no token of the first calibration batch reaches .*activation_bits=null"):
        ptq161.quantize(model, TOKENS[:, :1], method)


@pytest.mark.parametrize(
    "settings",
    [
        {"bits": 5},
        {"group_size": 0},
        {"activation_bits": 3},
        {"activation_bits": 0},
        {"drop_probability": -0.1},
        {"drop_probability": 1.1},
        {"drop_probability": float("nan")},
        {"warmup": 2.0},
        {"steps": -1},
        {"batch_size": 0},
        {"alpha_lr": -1.0},
        {"scale_lr": float("nan")},
        {"rounding_weight": -1.0},
        {"rounding_weight": float("inf")},
        {"compute_dtype": "int8"},
    ],
)
def test_settings_out_of_range(settings: dict[str, Any]) -> None:
    with pytest.raises(UserError, match=f"method.{next(iter(settings))}="):
        QDrop(**settings)


def test_a_loss_that_is_not_finite(tiny_model: TinyModel) -> None:
    with pytest.raises(UserError, match=r"the loss is inf in block 0, epoch 0: lower the method's learning rates"):
        quantized(tiny_model("llama"), dataclasses.replace(QUICK, rounding_weight=1e38, warmup=0.0))


def test_weights_that_are_not_finite() -> None:
    linear = nn.Linear(4, 4)
    with torch.no_grad():
        linear.weight[0, 0] = torch.nan
    with pytest.raises(UserError, match=r"^0\.up: a value is NaN or infinite"):
        QUICK._layer("0.up", linear, None)
