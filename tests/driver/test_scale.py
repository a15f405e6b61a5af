"""Models that are rescaled without a change of their function, and structure that is exact in the weights."""

from __future__ import annotations

import copy
import functools
import logging
import math
from collections.abc import Callable

import pytest
import torch
from torch import Tensor, nn
from transformers import PreTrainedModel

import ptq161
from ptq161.methods.base import Method
from ptq161.models.architectures import decoder_blocks
from ptq161.packed.model import packed_linears
from tests.conftest import _tiny_model, every_method

TinyModel = Callable[..., PreTrainedModel]
TOKENS = torch.randint(3, 256, (4, 32), generator=torch.Generator().manual_seed(0))
METHODS = every_method(bits=3, epochs=2) | {"waterfill": ptq161.Waterfill(epochs=2, batch_size=2)}


def scale_up_and_down(block: nn.Module, factor: float) -> None:
    block.mlp.up_proj.weight *= factor
    block.mlp.down_proj.weight /= factor


def scale_values(block: nn.Module, factor: float) -> None:
    block.self_attn.v_proj.weight *= factor
    block.self_attn.o_proj.weight /= factor


def scale_queries_and_keys(block: nn.Module, factor: float) -> None:
    block.self_attn.q_proj.weight *= factor
    block.self_attn.k_proj.weight /= factor


def scale_norm(block: nn.Module, factor: float) -> None:
    block.post_attention_layernorm.weight *= factor
    block.mlp.up_proj.weight /= factor
    block.mlp.gate_proj.weight /= factor


RESCALE = {scale_up_and_down: 1e-6, scale_values: 1e3, scale_queries_and_keys: 1e-6, scale_norm: 1e3}
"""With a factor: each multiplies one weight by it and divides another."""


@torch.no_grad()
def rescaled(model: PreTrainedModel, rescale: Callable[[nn.Module, float], None], factor: float) -> PreTrainedModel:
    model = copy.deepcopy(model)
    for block in decoder_blocks(model):
        rescale(block, factor)
    return model


@torch.no_grad()
def error(model: PreTrainedModel, method: Method) -> float:
    """Relative error of the quantized model's logits."""
    before = model(TOKENS).logits
    after = ptq161.quantize(copy.deepcopy(model), TOKENS, method)(TOKENS).logits
    return float((after - before).norm() / before.norm())


@functools.cache
def undisturbed_error(name: str) -> float:
    return error(_tiny_model("llama"), METHODS[name])


@pytest.mark.parametrize("name", METHODS)
@pytest.mark.parametrize("rescale", RESCALE, ids=lambda function: function.__name__)
def test_a_rescaled_model_is_quantized_about_as_well(
    name: str, rescale: Callable[[nn.Module, float], None], tiny_model: TinyModel
) -> None:
    found = error(rescaled(tiny_model("llama"), rescale, RESCALE[rescale]), METHODS[name])
    assert math.isfinite(found) and found < 1.15 * undisturbed_error(name) + 0.01


@pytest.mark.parametrize("name", METHODS)
def test_a_power_of_two_changes_no_bit(name: str, tiny_model: TinyModel) -> None:
    """Both models are of unusual size, so that the factors that are taken out leave the same numbers."""
    model = tiny_model("llama")
    small, large = (rescaled(model, scale_up_and_down, 2.0**k) for k in (-14, 14))
    for quantized in (small, large):
        ptq161.quantize(quantized, TOKENS, METHODS[name])
    for (path, a), b in zip(packed_linears(small).items(), packed_linears(large).values(), strict=True):
        factor = {"up_proj": 2.0**28, "down_proj": 2.0**-28}.get(path.rpartition(".")[2], 1.0)
        assert torch.equal(a.dequantize() * factor, b.dequantize()), path


def zero_rows(weight: Tensor) -> Tensor:
    return weight * (torch.arange(len(weight)) % 3 > 0).unsqueeze(1)


def zero_columns(weight: Tensor) -> Tensor:
    return weight * (torch.arange(weight.shape[1]) % 3 > 0)


# QuIP rotates the weight; GPTQ, and Quant-dLLM after its first block, make good in a zero column what others lost; a
# row of PB-LLM's binary weights has two values; a vector of VPTQ spans several rows, and a codebook may have no zeros.
NOT_KEPT = [
    ("quip", zero_rows),
    ("quip", zero_columns),
    ("gptq", zero_columns),
    ("quant_dllm", zero_columns),
    ("pb_llm", zero_columns),
    ("vptq", zero_rows),
    ("vptq", zero_columns),
]


@pytest.mark.parametrize(
    ("name", "prune"),
    [
        (name, prune)
        for name in METHODS
        for prune in (zero_rows, zero_columns, torch.zeros_like)
        if (name, prune) not in NOT_KEPT
    ],
)
def test_pruned_structure_stays(name: str, prune: Callable[[Tensor], Tensor], tiny_model: TinyModel) -> None:
    model = tiny_model("llama")
    linear = model.model.layers[0].mlp.up_proj
    with torch.no_grad():
        linear.weight.copy_(prune(linear.weight))
    zero = linear.weight == 0
    ptq161.quantize(model, TOKENS, METHODS[name])
    assert (model.model.layers[0].mlp.up_proj.dequantize()[zero] == 0).all()


@pytest.mark.parametrize("name", METHODS)
def test_a_block_that_does_nothing(name: str, tiny_model: TinyModel) -> None:
    """Relative errors are defined where there is nothing to be in error about."""
    model = tiny_model("llama")
    with torch.no_grad():
        for parameter in model.model.layers[0].parameters():
            parameter.zero_()
    values: list[float] = []
    ptq161.quantize(model, TOKENS, METHODS[name], on_metric=lambda _, value, /, **where: values.append(value))
    assert all(map(math.isfinite, values))
    with torch.no_grad():
        assert torch.isfinite(model(TOKENS).logits).all()


def test_rows_that_become_zeros_are_told(tiny_model: TinyModel, caplog: pytest.LogCaptureFixture) -> None:
    model = tiny_model("llama")
    with torch.no_grad():
        model.model.layers[1].mlp.up_proj.weight[:5] *= 1e-8
    told: list[tuple[float, str]] = []

    def on_metric(name: str, value: float, /, **where: int | str) -> None:
        if name == "zero_rows":
            told.append((value, str(where["linear"])))

    with caplog.at_level(logging.WARNING):
        ptq161.quantize(model, TOKENS, ptq161.RTN(bits=4), on_metric=on_metric)
    assert told == [(5.0, "1.mlp.up_proj")]
    assert "1.mlp.up_proj: 5 rows are too small for their scales and became zeros" in caplog.text


def test_a_rate_that_is_large_for_the_weights(tiny_model: TinyModel, caplog: pytest.LogCaptureFixture) -> None:
    """Within the usual size, the released rate depends on the scale of the weights; a relative one does not."""
    model = tiny_model("llama")
    absolute = ptq161.PTQ161(epochs=20, scale_lr=1e-3, angle_lr=0.0)
    relative = ptq161.PTQ161(epochs=20, scale_lr=1e-2, angle_lr=0.0, relative_scale_lr=True)
    shares: dict[str, float] = {}

    def on_metric(name: str, value: float, /, **where: int | str) -> None:
        if name == "scale_lr_share":
            shares[str(where["linear"])] = value

    assert error(model, absolute) > 0 and not caplog.records
    small = rescaled(model, scale_up_and_down, 1 / 30)
    with caplog.at_level(logging.WARNING):
        ptq161.quantize(copy.deepcopy(small), TOKENS, absolute, on_metric=on_metric)
    assert set(shares) == {"0.mlp.up_proj", "1.mlp.up_proj"} and min(shares.values()) > 0.1
    assert "method.relative_scale_lr=true" in caplog.text
    expected = error(model, relative)
    assert abs(error(small, relative) - expected) < 0.02 * expected


def test_float16_overflow_names_the_setting(tiny_model: TinyModel) -> None:
    model = tiny_model("llama")
    with torch.no_grad():
        model.model.layers[0].mlp.up_proj.weight *= 3000
        model.model.layers[0].mlp.gate_proj.weight *= 3000
    for method in (ptq161.RTN(compute_dtype="float16"), ptq161.GPTQ(compute_dtype="float16")):
        with pytest.raises(ptq161.errors.UserError, match=r"in float16; use method\.compute_dtype=float32") as caught:
            ptq161.quantize(copy.deepcopy(model), TOKENS, method)
        assert "\n" not in str(caught.value)
    ptq161.quantize(model, TOKENS, ptq161.RTN())
