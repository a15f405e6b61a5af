"""Water-filling as a method: budgets, levels, the plan over the whole model, resuming, refusals."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from transformers import PreTrainedModel, PreTrainedTokenizerFast

import ptq161
from ptq161.driver.capture import capture_inputs, logits_after
from ptq161.driver.planning import plan_statistics
from ptq161.methods.base import LinearStatistics
from ptq161.models.architectures import decoder_blocks, quantized_linears
from ptq161.packed.allotted import AllottedWeight
from ptq161.packed.model import packed_linears, sha256_of_packed
from ptq161.seeding import draw, stage_generator
from tests.conftest import TINY

TinyModel = Callable[..., PreTrainedModel]
TOKENS = torch.randint(3, 256, (4, 24), generator=torch.Generator().manual_seed(0))
CPU = torch.device("cpu")


def quick(**settings: Any) -> ptq161.Waterfill:
    return ptq161.Waterfill(**{"codes": "compensated", "batch_size": 2, **settings})


def weights(model: PreTrainedModel) -> dict[str, AllottedWeight]:
    found = {name: layer.packed for name, layer in packed_linears(model).items()}
    assert all(isinstance(weight, AllottedWeight) for weight in found.values())
    return found  # type: ignore[return-value]  # checked above


# budgets


@pytest.mark.parametrize(
    ("bits", "tiers"), [(1.0, [1]), (2.0, [2]), (1.6, [1, 2, 4]), (1.6, [1, 4]), (2.5, [1, 2, 3, 4]), (4.0, [1, 2, 4])]
)
def test_each_linear_keeps_the_budget(bits: float, tiers: list[int], tiny_model: TinyModel) -> None:
    model = ptq161.quantize(tiny_model("llama"), TOKENS, quick(level="linear", bits=bits, tiers=tiers))
    for weight in weights(model).values():
        assert bits - 3 / weight.in_features <= weight.code_bits() <= bits
        assert set(weight.channel_bits().tolist()) <= set(tiers)


def test_the_model_keeps_the_budget_and_its_linears_differ(tiny_model: TinyModel) -> None:
    model = ptq161.quantize(tiny_model("llama"), TOKENS, quick(level="model"))
    sizes = [(w.code_bits(), w.in_features * w.out_features) for w in weights(model).values()]
    mean = sum(bits * size for bits, size in sizes) / sum(size for _, size in sizes)
    assert 1.59 < mean <= 1.6
    assert max(bits for bits, _ in sizes) - min(bits for bits, _ in sizes) > 0.2


def test_more_bits_lose_less(tiny_model: TinyModel) -> None:
    model = tiny_model("llama")
    with torch.no_grad():
        full = model(TOKENS).logits
        errors = []
        for bits in (1.0, 1.6, 2.5, 4.0):
            quantized = ptq161.quantize(tiny_model("llama"), TOKENS, quick(bits=bits, level="linear"))
            errors.append(float((quantized(TOKENS).logits - full).norm() / full.norm()))
    assert errors == sorted(errors, reverse=True)


def test_codes_learned_compensated_rounded(tiny_model: TinyModel) -> None:
    errors: dict[str, float] = {}
    for codes in ("rounded", "compensated", "learned"):
        found: dict[str, float] = {}

        def on_metric(name: str, value: float, /, found: dict[str, float] = found, **where: int | str) -> None:
            if name == "output_error":
                found[str(where["linear"])] = value

        method = quick(codes=codes, level="linear", epochs=8, held_out=0.0)
        ptq161.quantize(tiny_model("llama", n_blocks=1), TOKENS, method, on_metric=on_metric)
        errors[codes] = sum(found.values()) / len(found)
    assert errors["compensated"] < errors["rounded"]


@pytest.mark.parametrize("architecture", TINY)
def test_every_architecture(
    architecture: str, tiny_model: TinyModel, tiny_tokenizer: PreTrainedTokenizerFast, tmp_path: Path
) -> None:
    model = ptq161.quantize(tiny_model(architecture), TOKENS, quick(codes="learned", epochs=1))
    with torch.no_grad():
        logits = model(TOKENS).logits
        assert torch.isfinite(logits).all()
        ptq161.save(model, tiny_tokenizer, tmp_path / "packed")
        assert torch.equal(ptq161.load(tmp_path / "packed")[0](TOKENS).logits, logits)


# the plan


def planned(model: PreTrainedModel, method: ptq161.Waterfill) -> dict[str, LinearStatistics]:
    inputs, arguments = capture_inputs(model, TOKENS, method.batch_size)
    return plan_statistics(model, TOKENS, method, arguments, inputs, seed=0, device=CPU, progress=False)


@pytest.mark.parametrize("architecture", ["llama", "opt", "gemma2"])
def test_statistics_are_those_of_the_whole_model_at_once(architecture: str, tiny_model: TinyModel) -> None:
    model, method = tiny_model(architecture), quick()
    found = planned(model, method)
    squares: dict[str, Tensor] = {}
    energies: dict[str, Tensor] = {}
    hooks = []
    for name, linear in quantized_linears(model):

        def look(_: nn.Module, args: tuple[Tensor, ...], output: Tensor, name: str = name) -> None:
            squares[name] = squares.get(name, 0) + args[0].detach().flatten(0, -2).square().sum(0)

            def add(gradient: Tensor) -> None:
                energies[name] = energies.get(name, 0) + gradient.flatten(0, -2).square().sum(0)

            output.register_hook(add)

        hooks.append(linear.register_forward_hook(look))
    generator = stage_generator(0, "plan", 0)
    for batch in TOKENS.split(method.batch_size):
        logits = model(batch).logits.flatten(0, 1)
        drawn = draw(logits.detach().softmax(-1), generator)
        nn.functional.cross_entropy(logits, drawn, reduction="sum").backward()
    assert found.keys() == squares.keys()
    for name, statistics in found.items():
        torch.testing.assert_close(statistics.mean_square, squares[name] / TOKENS.numel(), rtol=1e-3, atol=1e-6)
        torch.testing.assert_close(statistics.gradient_energy, energies[name] / TOKENS.numel(), rtol=1e-2, atol=1e-8)
        assert statistics.weight is dict(quantized_linears(model))[name].weight


def test_a_rescaled_model_gets_the_same_plan(tiny_model: TinyModel) -> None:
    plans = []
    for factor in (1.0, 1e-4, 1e4):
        model = tiny_model("llama")
        with torch.no_grad():
            for block in decoder_blocks(model):
                block.mlp.up_proj.weight *= factor
                block.mlp.down_proj.weight /= factor
        plans.append(quick().plan(planned(model, quick())))
    for plan in plans[1:]:
        differing = sum(int((plan[name] != plans[0][name]).sum()) for name in plan)
        assert differing <= 2  # sums in another order


def test_logits_after_the_last_block(tiny_model: TinyModel) -> None:
    model = tiny_model("gemma2")
    seen: list[Tensor] = []
    handle = decoder_blocks(model)[-1].register_forward_hook(
        lambda _, __, output: seen.append(output[0] if isinstance(output, tuple) else output)
    )
    with torch.no_grad():
        expected = model(TOKENS).logits
        handle.remove()
        assert torch.equal(logits_after(model, TOKENS, seen[0]), expected)
        assert torch.equal(model(TOKENS).logits, expected)


def test_an_interrupted_quantization_keeps_its_plan(
    tiny_model: TinyModel, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    method = quick(codes="learned", epochs=1)
    expected = sha256_of_packed(ptq161.quantize(tiny_model("llama"), TOKENS, method))

    def stop(name: str, _: float, /, **where: int | str) -> None:
        if name == "loss" and where["block"] == 1:
            raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        ptq161.quantize(tiny_model("llama"), TOKENS, method, resume=tmp_path, on_metric=stop)
    assert (tmp_path / "plan.safetensors").exists()
    made: list[int] = []
    monkeypatch.setattr("ptq161.driver.quantization.plan_statistics", lambda *_, **__: made.append(1))
    resumed = ptq161.quantize(tiny_model("llama"), TOKENS, method, resume=tmp_path)
    assert sha256_of_packed(resumed) == expected and not made
    monkeypatch.undo()
    (tmp_path / "plan.safetensors").write_bytes(b"damaged")
    (tmp_path / "block_00001.safetensors").unlink()
    assert sha256_of_packed(ptq161.quantize(tiny_model("llama"), TOKENS, method, resume=tmp_path)) == expected


def test_a_model_without_a_head_has_no_plan(tiny_model: TinyModel) -> None:
    headless = tiny_model("llama").base_model
    with pytest.raises(ptq161.UserError, match=r"use method\.level=linear"):
        ptq161.quantize(headless, TOKENS, quick(level="model"))
    ptq161.quantize(headless, TOKENS, quick(level="linear"))


def test_weights_of_inference_mode_have_no_gradients(tiny_model: TinyModel) -> None:
    model = tiny_model("llama")
    with torch.inference_mode():
        model.lm_head.weight = nn.Parameter(model.lm_head.weight.clone(), requires_grad=False)
    with pytest.raises(ptq161.UserError, match=r"load them outside, or use method\.level=linear"):
        ptq161.quantize(model, TOKENS, quick(level="model"))


@pytest.mark.parametrize(
    ("settings", "sentence"),
    [
        ({"bits": 0.9}, r"method\.bits=0\.9: tiers of 1, 2, 4 bits reach from 1 to 4"),
        ({"bits": 1.6, "tiers": [2, 4]}, r"method\.bits=1\.6: tiers of 2, 4 bits reach from 2 to 4"),
        ({"tiers": [4, 1]}, r"method\.tiers=\[4, 1\]: use one or more of 1, 2, 3, 4 in rising order"),
        ({"tiers": []}, r"method\.tiers=\[\]: use one or more"),
        ({"tiers": [1, 5]}, r"method\.tiers=\[1, 5\]"),
        ({"level": "block"}, r"method\.level=block: use one of linear, model"),
        ({"codes": "trained"}, r"method\.codes=trained: use one of rounded, compensated, learned"),
        ({"epochs": -1}, r"method\.epochs=-1: use at least 0"),
        ({"plan_samples": 0}, r"method\.plan_samples=0: use at least 1"),
        ({"block_size": 0}, r"block_size=0: use at least 1"),
        ({"code_lr": float("nan")}, r"method\.code_lr=nan: use a finite learning rate"),
        ({"factor_lr": -1.0}, r"method\.factor_lr=-1\.0: use a finite learning rate"),
        ({"held_out": 0.6}, r"method\.held_out=0\.6: use a share"),
        ({"damping": 2.0}, r"method\.damping=2\.0"),
    ],
)
def test_settings_out_of_range(settings: dict[str, Any], sentence: str) -> None:
    with pytest.raises(ptq161.UserError, match=sentence):
        ptq161.Waterfill(**settings)
