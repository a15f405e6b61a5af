"""The whole of PTQ1.61 on tiny models: against the released code's results, and option by option."""

from __future__ import annotations

import dataclasses
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor
from transformers import AutoModelForCausalLM, PreTrainedModel, PreTrainedTokenizerFast

import ptq161
from ptq161.errors import UserError
from ptq161.methods.ptq161 import PTQ161, block_loss, initial_scales, pack_weight, salient_mask
from ptq161.methods.ptq161.saliency import owq_sensitivity
from ptq161.models.architectures import quantized_linears
from ptq161.packed.masks import salient_masks
from ptq161.packed.structured_binary import StructuredBinaryWeight

TinyModel = Callable[..., PreTrainedModel]
TOKENS = torch.randint(3, 256, (5, 24), generator=torch.Generator().manual_seed(2))
BASE = PTQ161(epochs=2, scale_lr=5e-3, angle_lr=1e-2, batch_size=2)


class Metrics:
    """An ``on_metric`` that keeps every value."""

    def __init__(self) -> None:
        self.values: list[tuple[str, float, dict[str, Any]]] = []

    def __call__(self, name: str, value: float, /, **where: int | str) -> None:
        self.values.append((name, value, where))

    def losses(self) -> dict[tuple[int, int], float]:
        return {(where["block"], where["epoch"]): value for name, value, where in self.values if name == "loss"}


def run(
    model: PreTrainedModel, method: PTQ161, tokens: Tensor = TOKENS
) -> tuple[dict[str, StructuredBinaryWeight], Metrics]:
    metrics = Metrics()
    ptq161.quantize(model, tokens, method, on_metric=metrics)
    packed = {name: module.packed for name, module in quantized_linears(model)}
    assert all(type(weight) is StructuredBinaryWeight for weight in packed.values())
    return packed, metrics


def change(**settings: Any) -> PTQ161:
    return dataclasses.replace(BASE, **settings)


def same(one: StructuredBinaryWeight, other: StructuredBinaryWeight) -> bool:
    return all(torch.equal(t, other.state_dict()[name]) for name, t in one.state_dict().items())


# against the released code


@pytest.fixture
def expected(golden_dir: Path) -> dict[str, Tensor]:
    with np.load(golden_dir / "tiny_llama" / "expected.npz") as file:
        return {key: torch.from_numpy(file[key]) for key in file}


@pytest.mark.parametrize(("scale_dtype", "loss_bar", "weight_bar"), [("float32", 1e-4, 2e-3), ("float16", 5e-3, 3e-2)])
def test_the_released_optimization(
    scale_dtype: str, loss_bar: float, weight_bar: float, expected: dict[str, Tensor], golden_dir: Path
) -> None:
    model = AutoModelForCausalLM.from_pretrained(golden_dir / "tiny_llama").float()
    packed, metrics = run(model, PTQ161(epochs=4, scale_dtype=scale_dtype), expected["tokens"])
    losses = metrics.losses()
    assert len(losses) == expected["loss"].numel()
    for (block, epoch), loss in losses.items():
        assert loss == pytest.approx(float(expected["loss"][block, epoch]), rel=loss_bar)
    assert len(packed) == 14
    for name, weight in packed.items():
        theirs = {key: expected[f"{name}.{key}"] for key in ("mask", "scale", "mean", "row_angle", "column_angle")}
        assert torch.equal(weight.salient_channels(), theirs["mask"])
        if scale_dtype == "float32":
            bars = {"rtol": 1e-3, "atol": 1e-4}
            torch.testing.assert_close(weight.scale, theirs["scale"] * theirs["row_angle"], **bars)
            torch.testing.assert_close(weight.mean, theirs["mean"] * theirs["row_angle"], **bars)
            torch.testing.assert_close(weight.column_angle, theirs["column_angle"][0, ~theirs["mask"]], **bars)
        dense = expected[f"{name}.weight"]
        assert float((weight.dequantize() - dense).norm() / dense.norm()) < weight_bar
    with torch.no_grad():
        logits = model(expected["tokens"][:1]).logits
    assert float((logits - expected["logits"]).norm() / expected["logits"].norm()) < weight_bar


# the steps


def test_without_epochs_the_initial_scales_are_packed(tiny_model: TinyModel) -> None:
    model = tiny_model("qwen3")
    inputs: dict[str, Tensor] = {}
    handles = [
        module.register_forward_pre_hook(lambda _, args, name=name: inputs.__setitem__(name, args[0].flatten(0, -2)))
        for name, module in quantized_linears(model)
    ]
    with torch.no_grad():
        model(TOKENS)
    for handle in handles:
        handle.remove()
    weights = {name: module.weight.detach().clone() for name, module in quantized_linears(model)}
    packed, metrics = run(model, change(epochs=0))
    assert not metrics.losses()
    for name, weight in weights.items():
        mask = salient_mask(inputs[name].abs().amax(0), 0.2)
        ones = torch.ones(weight.shape[0], 1), torch.ones(1, weight.shape[1])
        assert same(packed[name], pack_weight(weight, mask, *initial_scales(weight, mask), *ones)), name


def block_outputs(model: PreTrainedModel, block: int) -> Tensor:
    with torch.no_grad():
        hidden: Tensor = model(TOKENS, output_hidden_states=True, use_cache=False).hidden_states[block + 1]
    return hidden


@pytest.mark.parametrize("cosine", [False, True])
@pytest.mark.parametrize("block_size", [1, 2])
@pytest.mark.parametrize("batch_size", [1, 2, 5, 8])
def test_the_reported_loss_is_the_mean_over_the_batches(
    cosine: bool, block_size: int, batch_size: int, tiny_model: TinyModel
) -> None:
    """With rates of zero nothing moves, and both chains enter the first window alike."""
    model = tiny_model("llama", n_blocks=3)
    full = block_outputs(model, block_size - 1)
    method = change(
        epochs=1,
        scale_lr=0.0,
        angle_lr=0.0,
        scale_dtype="float32",
        cosine_loss=cosine,
        block_size=block_size,
        batch_size=batch_size,
    )
    _, metrics = run(model, method)
    quant = block_outputs(model, block_size - 1)
    batches = [slice(start, start + batch_size) for start in range(0, len(TOKENS), batch_size)]
    expected = [float(block_loss(quant[b], full[b], full[b], cosine)) for b in batches]
    assert metrics.losses()[0, 0] == pytest.approx(sum(expected) / len(expected), rel=1e-4)


def test_the_second_block_sees_the_quantized_chain(tiny_model: TinyModel) -> None:
    """Yq from the quantized chain, Yf from the full one, Yh: the full block on the quantized chain."""
    model, original = tiny_model("llama", n_blocks=3), tiny_model("llama", n_blocks=3)
    settings = {"scale_lr": 0.0, "angle_lr": 0.0, "scale_dtype": "float32", "batch_size": 5}
    _, metrics = run(model, change(epochs=1, **settings))
    full, quant = block_outputs(original, 1), block_outputs(model, 1)
    original.model.layers[0] = model.model.layers[0]
    homologous = block_outputs(original, 1)
    assert metrics.losses()[1, 0] == pytest.approx(float(block_loss(quant, full, homologous)), rel=1e-4)


@pytest.mark.parametrize("architecture", ["llama", "opt", "gemma3_text"])
def test_the_loss_goes_down(architecture: str, tiny_model: TinyModel) -> None:
    _, metrics = run(tiny_model(architecture), change(epochs=6, batch_size=5))
    losses = metrics.losses()
    for block in (0, 1):
        assert losses[block, 5] < losses[block, 0]


def test_windows_of_two_blocks(tiny_model: TinyModel) -> None:
    packed, metrics = run(tiny_model("llama", n_blocks=3), change(block_size=2))
    assert len(packed) == 21
    assert list(metrics.losses()) == [(0, 0), (0, 1), (2, 0), (2, 1)]
    alone, _ = run(tiny_model("llama", n_blocks=3), BASE)
    assert not same(packed["0.mlp.up_proj"], alone["0.mlp.up_proj"])


def test_the_last_batch_may_be_smaller(tiny_model: TinyModel) -> None:
    packed, metrics = run(tiny_model("mistral"), change(batch_size=3))
    assert len(metrics.losses()) == 4
    assert not same(packed["0.mlp.up_proj"], run(tiny_model("mistral"), BASE)[0]["0.mlp.up_proj"])


# what is learned


def learned(tiny_model: TinyModel, **settings: Any) -> tuple[StructuredBinaryWeight, StructuredBinaryWeight]:
    """Return a weight of the second block before and after learning."""
    before, _ = run(tiny_model("llama"), change(epochs=0, scale_dtype="float32"))
    after, _ = run(tiny_model("llama"), change(scale_dtype="float32", **settings))
    return before["0.self_attn.q_proj"], after["0.self_attn.q_proj"]


def test_everything_learned_moves(tiny_model: TinyModel) -> None:
    before, after = learned(tiny_model)
    assert not torch.isclose(after.scale, before.scale, rtol=1e-4).all()
    assert (after.column_angle != 1).any() and (after.mean != before.mean).any()
    for name in ("mask", "sign", "codes", "salient_scale", "salient_zero_point"):
        assert torch.equal(getattr(after, name), getattr(before, name))


@pytest.mark.parametrize("settings", [{"learn_angles": False}, {"angle_lr": 0.0}])
def test_angles_that_are_not_learned_stay_at_one(settings: dict[str, Any], tiny_model: TinyModel) -> None:
    before, after = learned(tiny_model, **settings)
    assert (after.column_angle == 1).all()
    assert torch.equal(after.mean, before.mean)
    assert not torch.equal(after.scale, before.scale)


@pytest.mark.parametrize("settings", [{"learn_scale": False}, {"scale_lr": 0.0}])
def test_scales_that_are_not_learned_move_with_the_angles_alone(
    settings: dict[str, Any], tiny_model: TinyModel
) -> None:
    before, after = learned(tiny_model, **settings)
    row_angle = after.mean / before.mean
    assert (row_angle != 1).any()
    torch.testing.assert_close(after.scale, before.scale * row_angle, rtol=1e-4, atol=1e-6)


def test_learning_nothing_is_no_epoch(tiny_model: TinyModel) -> None:
    packed, metrics = run(tiny_model("llama"), change(learn_scale=False, learn_angles=False))
    assert not metrics.losses()
    untrained, _ = run(tiny_model("llama"), change(epochs=0))
    assert all(same(weight, untrained[name]) for name, weight in packed.items())


# options of the mask and of the salient channels


def test_saliency_by_the_mean(tiny_model: TinyModel) -> None:
    model = tiny_model("opt")
    inputs: list[Tensor] = []
    fc1 = model.model.decoder.layers[0].fc1
    handle = fc1.register_forward_pre_hook(lambda _, args: inputs.append(args[0].detach().flatten(0, -2).abs()))
    with torch.no_grad():
        model(TOKENS)
    handle.remove()
    by_mean, by_max = inputs[0].mean(0), inputs[0].amax(0)
    assert not torch.equal(salient_mask(by_mean, 0.2), salient_mask(by_max, 0.2))
    for saliency, scale in (("mean", by_mean), ("max", by_max)):
        packed, _ = run(tiny_model("opt"), change(epochs=0, saliency=saliency))
        assert torch.equal(packed["0.fc1"].salient_channels(), salient_mask(scale, 0.2))


@pytest.mark.parametrize("saliency", ["hessian", "magnitude", "random"])
def test_other_saliencies_are_chosen_linear_by_linear(saliency: str, tiny_model: TinyModel) -> None:
    weights = {name: module.weight.detach().clone() for name, module in quantized_linears(tiny_model("llama"))}
    packed, _ = run(tiny_model("llama"), change(epochs=0, saliency=saliency))
    masks = {name: weight.salient_channels() for name, weight in packed.items()}
    for name, mask in masks.items():
        assert int(mask.sum()) == int(0.2 * mask.numel()) + 1
        if saliency == "magnitude":
            assert torch.equal(mask, salient_mask(weights[name].square().sum(0).sqrt(), 0.2))
    assert not torch.equal(masks["0.mlp.up_proj"], masks["0.mlp.gate_proj"])
    again, _ = run(tiny_model("llama"), change(epochs=0, saliency=saliency))
    assert all(torch.equal(again[name].salient_channels(), mask) for name, mask in masks.items())


def test_the_hessian_is_that_of_the_full_precision_chain(tiny_model: TinyModel) -> None:
    """The second block's inputs differ between the chains, and so would the masks."""
    model = tiny_model("llama")
    inputs: list[Tensor] = []
    down = model.model.layers[1].mlp.down_proj
    handle = down.register_forward_pre_hook(lambda _, args: inputs.append(args[0].detach().flatten(0, -2)))
    with torch.no_grad():
        model(TOKENS)
    handle.remove()
    packed, _ = run(tiny_model("llama"), change(epochs=0, saliency="hessian"))
    expected = salient_mask(owq_sensitivity(down.weight, inputs[0].square().mean(0)), 0.2)
    assert torch.equal(packed["1.mlp.down_proj"].salient_channels(), expected)


def test_random_channels_follow_from_the_seed(tiny_model: TinyModel) -> None:
    masks = []
    for seed in (0, 0, 1):
        model = ptq161.quantize(tiny_model("llama"), TOKENS, change(epochs=0, saliency="random"), seed=seed)
        masks.append(torch.cat(list(salient_masks(model).values())))
    assert torch.equal(masks[0], masks[1]) and not torch.equal(masks[0], masks[2])


def test_linears_that_share_an_input_share_a_mask(tiny_model: TinyModel) -> None:
    packed, metrics = run(tiny_model("llama"), change(epochs=0))
    for group in (("self_attn.q_proj", "self_attn.k_proj", "self_attn.v_proj"), ("mlp.gate_proj", "mlp.up_proj")):
        assert len({tuple(packed[f"1.{path}"].mask.tolist()) for path in group}) == 1
    salient = {where["linear"]: value for name, value, where in metrics.values if name == "salient_channels"}
    assert salient == {name: int(weight.salient_channels().sum()) for name, weight in packed.items()}
    assert salient["0.mlp.up_proj"] == int(0.2 * 64) + 1


@pytest.mark.parametrize(
    ("settings", "same_signs"),
    [({"salient_range": "salient"}, True), ({"salient_bits": 8}, True), ({"mask_ratio": 0.3}, False)],
)
def test_options_of_the_salient_channels(settings: dict[str, Any], same_signs: bool, tiny_model: TinyModel) -> None:
    weight = tiny_model("llama").model.layers[0].mlp.up_proj.weight.detach()
    plain = run(tiny_model("llama"), change(epochs=0))[0]["0.mlp.up_proj"]
    other = run(tiny_model("llama"), change(epochs=0, **settings))[0]["0.mlp.up_proj"]
    assert torch.equal(plain.sign, other.sign) is same_signs
    assert other.salient_bits == settings.get("salient_bits", 4)
    salient = plain.salient_channels()
    errors = [(packed.dequantize() - weight)[:, salient].norm() for packed in (plain, other)]
    if same_signs:
        assert errors[1] < errors[0]
    else:
        assert other.salient_channels().sum() > salient.sum()


def test_scale_dtype_is_how_scales_are_stored(tiny_model: TinyModel) -> None:
    for name in ("float16", "float32"):
        packed, _ = run(tiny_model("llama"), change(epochs=0, scale_dtype=name))
        assert {weight.scale.dtype for weight in packed.values()} == {getattr(torch, name)}


def test_bfloat16_products_come_close_to_float32(tiny_model: TinyModel) -> None:
    settings = {"compute_dtype": "float32"}, {"compute_dtype": "bfloat16"}, {"epochs": 0}
    (exact, metrics), (close, rough), (untrained, _) = (run(tiny_model("llama"), change(**s)) for s in settings)
    assert rough.losses()[0, 1] == pytest.approx(metrics.losses()[0, 1], rel=0.02)
    assert rough.losses() != metrics.losses()
    learned, near, before = (packed["0.mlp.up_proj"].dequantize() for packed in (exact, close, untrained))
    assert float((near - learned).norm() / (before - learned).norm()) < 0.5


# determinism, errors


def test_two_runs_with_one_seed_write_the_same_bytes(
    tiny_model: TinyModel, tiny_tokenizer: PreTrainedTokenizerFast, tmp_path: Path
) -> None:
    files = []
    for i in range(2):
        torch.manual_seed(100 + i)  # the global state is no input
        model = ptq161.quantize(tiny_model("llama"), TOKENS, BASE, seed=3)
        files.append(ptq161.save(model, tiny_tokenizer, tmp_path / str(i)).read_bytes())
    assert files[0] == files[1]


@pytest.mark.parametrize("settings", [{"scale_lr": 1e30}, {"angle_lr": 1e30}])
def test_a_loss_that_is_not_finite_ends_in_one_sentence(settings: dict[str, float], tiny_model: TinyModel) -> None:
    with pytest.raises(UserError, match=r"^the loss is (inf|nan) in block 0, epoch [01]: lower .*learning rates"):
        run(tiny_model("llama"), change(**settings))


def test_no_gradient_state_is_left_behind(tiny_model: TinyModel) -> None:
    model = tiny_model("llama")
    trainable = {name for name, p in model.named_parameters() if p.requires_grad and ".layers." not in name}
    run(model, BASE)
    assert trainable <= {name for name, p in model.named_parameters() if p.requires_grad}
    assert all(p.grad is None for p in model.parameters())


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"mask_ratio": 1.0}, r"mask_ratio=1\.0: use a value in \[0, 1\)"),
        ({"mask_ratio": -0.1}, r"mask_ratio=-0\.1: use a value in \[0, 1\)"),
        ({"mask_ratio": float("nan")}, r"mask_ratio=nan: use a value in \[0, 1\)"),
        ({"epochs": -1}, r"method\.epochs=-1: use at least 0"),
        ({"scale_lr": -1e-3}, r"method\.scale_lr=-0\.001: use a finite learning rate"),
        ({"angle_lr": float("inf")}, r"method\.angle_lr=inf: use a finite learning rate"),
        ({"scale_lr": float("nan")}, r"method\.scale_lr=nan: use a finite learning rate"),
        ({"batch_size": 0}, r"method\.batch_size=0: use at least 1"),
        ({"block_size": 0}, r"block_size=0: use at least 1"),
        ({"compute_dtype": "float64"}, r"method\.compute_dtype=float64: use one of float32, bfloat16, float16"),
        ({"scale_dtype": "bfloat16"}, r"method\.scale_dtype=bfloat16: use one of float16, float32"),
        ({"salient_bits": 1}, r"method\.salient_bits=1: use one of 2, 3, 4, 8"),
        ({"salient_bits": 5}, r"method\.salient_bits=5: use one of 2, 3, 4, 8"),
        ({"salient_range": "column"}, r"method\.salient_range=column: use one of row, salient"),
        ({"saliency": "median"}, r"method\.saliency=median: use one of max, mean, hessian, magnitude, random"),
    ],
)
def test_hyperparameters_out_of_range(settings: dict[str, Any], message: str) -> None:
    with pytest.raises(UserError, match=message) as caught:
        PTQ161(**settings)
    assert "\n" not in str(caught.value)


def test_the_defaults_are_the_released_ones() -> None:
    method = PTQ161()
    assert (method.mask_ratio, method.epochs, method.scale_lr, method.angle_lr) == (0.2, 20, 5e-4, 1e-3)
    assert (method.batch_size, method.block_size, method.salient_bits) == (1, 1, 4)
    assert (method.saliency, method.salient_range, method.cosine_loss) == ("max", "row", True)
    assert method.nominal_bits() == pytest.approx(1.6)
    with pytest.raises(dataclasses.FrozenInstanceError):
        method.epochs = 1  # type: ignore[misc]  # that is what is tested
