"""The driver: captured blocks against a plain forward, what it changes in a model and what not, its refusals."""

from __future__ import annotations

import copy
import dataclasses
import gc
import weakref
from collections.abc import Callable
from typing import Any, ClassVar

import pytest
import torch
from torch import Tensor, nn
from transformers import PreTrainedModel

import ptq161
from ptq161.driver.capture import capture_inputs
from ptq161.driver.quantization import quantize
from ptq161.methods.base import Window
from ptq161.methods.ptq161 import PTQ161
from ptq161.methods.rtn import RTN
from ptq161.methods.rtn import quantize_weight as rtn_weight
from ptq161.models.architectures import blocks_path, decoder_blocks, input_groups, quantized_linears
from ptq161.models.experts import split_experts
from ptq161.packed.linear import PackedLinear
from ptq161.packed.weight import PackedWeight
from tests.conftest import TINY

TinyModel = Callable[..., PreTrainedModel]
SEQ_LEN = 48  # twice the sliding window
TOKENS = torch.randint(3, 256, (5, SEQ_LEN), generator=torch.Generator().manual_seed(4))
QUICK = PTQ161(epochs=1, batch_size=2)


@dataclasses.dataclass(frozen=True)
class Inspecting:
    """A method that passes each window to a function and rounds the weights to 8 bits."""

    needs_full_chain: ClassVar[bool] = True
    takes_salient_masks: ClassVar[bool] = True

    inspect: Callable[[Window], object]
    block_size: int = 1
    batch_size: int = 2
    compute_dtype: str = "float32"

    def nominal_bits(self) -> float:
        return 8.0

    def quantize_window(self, window: Window) -> dict[str, PackedWeight]:
        self.inspect(window)
        return {name: rtn_weight(linear.weight.detach(), 8) for name, linear in window.linears.items()}


def plain_hidden_states(model: PreTrainedModel, tokens: Tensor = TOKENS) -> list[Tensor]:
    """What enters each block in a plain forward, and what leaves the last one."""
    seen: list[Tensor] = []
    blocks = decoder_blocks(model)

    def enters(_: nn.Module, args: tuple[Tensor, ...], kwargs: dict[str, Tensor]) -> None:
        seen.append(args[0] if args else kwargs["hidden_states"])

    def leaves(_: nn.Module, __: object, output: Tensor | tuple[Tensor, ...]) -> None:
        seen.append(output if isinstance(output, Tensor) else output[0])

    hooks = [block.register_forward_pre_hook(enters, with_kwargs=True) for block in blocks]
    hooks.append(blocks[-1].register_forward_hook(leaves))
    try:
        with torch.no_grad():
            model(tokens, use_cache=False)
    finally:
        for hook in hooks:
            hook.remove()
    return seen


# capture and replay


@pytest.mark.parametrize("architecture", TINY)
@pytest.mark.parametrize("batch_size", [1, 2, 5, 7])
def test_replaying_all_blocks_is_a_plain_forward(architecture: str, batch_size: int, tiny_model: TinyModel) -> None:
    model = tiny_model(architecture, n_blocks=3)
    expected = plain_hidden_states(model)
    hidden, arguments = capture_inputs(model, TOKENS, batch_size)
    torch.testing.assert_close(hidden, expected[0])
    with torch.no_grad():
        for i, (block, call) in enumerate(zip(decoder_blocks(model), arguments, strict=True)):
            for _ in range(2):  # a replay must leave the arguments as they were
                outputs = torch.cat([call.call(block, batch) for batch in hidden.split(batch_size)])
            hidden = outputs
            torch.testing.assert_close(hidden, expected[i + 1], rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize("architecture", ["mistral", "qwen3", "gemma3_text"])
def test_the_sliding_window_matters_here(architecture: str, tiny_model: TinyModel) -> None:
    """The test above could not fail where the window did not reach the result."""
    model = tiny_model(architecture)
    changed = TOKENS.clone()
    changed[:, 0] = (changed[:, 0] + 1) % 256
    blocks = [plain_hidden_states(model, tokens)[1] for tokens in (TOKENS, changed)]
    assert (blocks[0] - blocks[1])[:, 1:24].abs().amax() > 1e-3
    torch.testing.assert_close(blocks[0][:, 24:], blocks[1][:, 24:])


def test_blocks_are_not_computed_during_capture(tiny_model: TinyModel, monkeypatch: pytest.MonkeyPatch) -> None:
    model = tiny_model("llama")

    def fail(*_: object) -> None:
        raise AssertionError("a block was computed")

    monkeypatch.setattr(type(decoder_blocks(model)[0].mlp), "forward", fail)
    capture_inputs(model, TOKENS, 2)


def test_captured_blocks_are_as_before(tiny_model: TinyModel) -> None:
    model = tiny_model("llama")
    with torch.no_grad():
        expected = model(TOKENS).logits
    capture_inputs(model, TOKENS, 2)
    assert all("forward" not in vars(block) for block in decoder_blocks(model))
    with torch.no_grad():
        assert torch.equal(model(TOKENS).logits, expected)


def test_a_forward_of_the_instances_own_is_given_back(tiny_model: TinyModel) -> None:
    block = decoder_blocks(model := tiny_model("llama"))[0]
    own = block.forward
    block.forward = own
    capture_inputs(model, TOKENS, 2)
    assert vars(block)["forward"] is own


def test_blocks_are_restored_when_the_model_raises(tiny_model: TinyModel, monkeypatch: pytest.MonkeyPatch) -> None:
    model = tiny_model("llama")

    def fail(*_: object, **__: object) -> None:
        raise ZeroDivisionError

    model.model.rotary_emb.forward = fail
    with pytest.raises(ZeroDivisionError):
        capture_inputs(model, TOKENS, 2)
    assert all("forward" not in vars(block) for block in decoder_blocks(model))


# what is changed and what is not


@pytest.mark.parametrize("architecture", TINY)
def test_exactly_the_tables_linears_are_replaced(architecture: str, tiny_model: TinyModel) -> None:
    model = tiny_model(architecture)
    before = copy.deepcopy(model)
    assert quantize(model, TOKENS, QUICK) is model
    names = {module: name for name, module in model.named_modules()}
    packed = {names[module] for _, module in quantized_linears(model)}
    assert packed == {
        f"{blocks_path(model)}.{i}.{path}"
        for i, block in enumerate(decoder_blocks(model))
        for group in input_groups(model, block)
        for path in group
    }
    split_experts(before)
    for name, module in before.named_modules():
        assert (type(model.get_submodule(name)) is PackedLinear) is (name in packed)
        if isinstance(module, nn.Linear) and name in packed:
            bias = model.get_submodule(name).bias
            assert (bias is None) is (module.bias is None)
            assert bias is None or torch.equal(bias, module.bias)
    after = dict(model.named_parameters())
    for name, parameter in before.named_parameters():
        if name.rpartition(".")[0] not in packed:
            assert torch.equal(after[name], parameter), name
    with torch.no_grad():
        assert torch.isfinite(model(TOKENS).logits).all()


@pytest.mark.parametrize("training", [False, True])
@pytest.mark.parametrize("use_cache", [False, True])
@pytest.mark.parametrize("fails", [False, True])
def test_modes_are_given_back(training: bool, use_cache: bool, fails: bool, tiny_model: TinyModel) -> None:
    model = tiny_model("llama").train(training)
    model.config.use_cache = use_cache
    seen: list[tuple[bool, bool]] = []

    def inspect(window: Window) -> None:
        seen.append((any(m.training for b in window.blocks for m in b.modules()), model.config.use_cache))
        if fails:
            raise ZeroDivisionError

    try:
        quantize(model, TOKENS, Inspecting(inspect))
    except ZeroDivisionError:
        assert fails
    assert set(seen) == {(False, use_cache)}
    assert (model.training, model.config.use_cache) == (training, use_cache)


@pytest.mark.parametrize("method", [QUICK, RTN(bits=4), PTQ161(epochs=0, block_size=2)])
def test_the_model_computes_with_what_the_method_returned(method: PTQ161 | RTN, tiny_model: TinyModel) -> None:
    model, dense = tiny_model("qwen2"), tiny_model("qwen2")
    quantize(model, TOKENS, method)
    for (_, packed), (_, linear) in zip(quantized_linears(model), quantized_linears(dense), strict=True):
        linear.weight.data = packed.dequantize()
    with torch.no_grad():
        torch.testing.assert_close(model(TOKENS).logits, dense(TOKENS).logits)


@pytest.mark.parametrize("architecture", ["llama", "opt", "gemma2"])
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_half_precision_models_are_worked_on_in_float32(
    architecture: str, dtype: torch.dtype, tiny_model: TinyModel
) -> None:
    model = tiny_model(architecture)
    for parameter in model.parameters():
        parameter.data = parameter.data.to(dtype)
    weights = {name: linear.weight.detach().clone() for name, linear in quantized_linears(model)}
    seen: set[torch.dtype] = set()

    def inspect(window: Window) -> None:
        for name, linear in window.linears.items():
            assert linear.weight.dtype == torch.float32 and torch.equal(linear.weight, weights[name].float())
        linear = window.linears[window.input_groups[0][0]]
        hook = linear.register_forward_pre_hook(lambda _, args: seen.add(args[0].dtype))
        seen.add(window.run(window.to_device(window.quant_inputs[:2])).dtype)
        hook.remove()

    quantize(model, TOKENS, Inspecting(inspect))
    assert seen == {torch.float32}
    assert {p.dtype for p in model.parameters()} == {dtype}
    with torch.no_grad():
        assert model(TOKENS).logits.dtype == dtype
    quantize(tiny_model(architecture).to(dtype), TOKENS, QUICK)


# the chains


def test_both_chains(tiny_model: TinyModel) -> None:
    """Full-precision outputs follow the plain model; quantized inputs follow the packed one."""
    original, model = tiny_model("gemma3_text", n_blocks=3), tiny_model("gemma3_text", n_blocks=3)
    full = plain_hidden_states(original)
    windows: list[tuple[int, Tensor, Tensor, dict[str, Tensor]]] = []

    def inspect(window: Window) -> None:
        scales = {name: scale.maximum for name, scale in window.activations.items()}
        windows.append((window.first_block, window.quant_inputs.clone(), window.full_outputs.clone(), scales))

    inputs: dict[str, Tensor] = {}
    hooks = [
        linear.register_forward_pre_hook(lambda _, args, name=name: inputs.__setitem__(name, args[0].flatten(0, -2)))
        for name, linear in quantized_linears(original)
    ]
    with torch.no_grad():
        original(TOKENS)
    for hook in hooks:
        hook.remove()

    quantize(model, TOKENS, Inspecting(inspect))
    quant = plain_hidden_states(model)
    assert [first for first, *_ in windows] == [0, 1, 2]
    for i, (_, quant_inputs, full_outputs, scales) in enumerate(windows):
        torch.testing.assert_close(full_outputs, full[i + 1], rtol=1e-4, atol=1e-4)
        torch.testing.assert_close(quant_inputs, quant[i], rtol=1e-4, atol=1e-4)
        assert set(scales) == {f"{i}.{group[0]}" for group in input_groups(model, decoder_blocks(model)[i])}
        for name, scale in scales.items():
            torch.testing.assert_close(scale, inputs[name].abs().amax(0), rtol=1e-4, atol=1e-4)
    assert not torch.allclose(windows[1][1], full[1], rtol=1e-4, atol=1e-4)


def test_the_means_of_the_activations(tiny_model: TinyModel) -> None:
    model = tiny_model("llama")
    expected: list[Tensor] = []
    linear = decoder_blocks(model)[0].mlp.down_proj
    hook = linear.register_forward_pre_hook(lambda _, args: expected.append(args[0].flatten(0, -2).abs().mean(0)))
    with torch.no_grad():
        model(TOKENS)
    hook.remove()
    means: list[Tensor] = []

    def inspect(window: Window) -> None:
        means.extend(scale.mean for name, scale in window.activations.items() if name == "0.mlp.down_proj")

    quantize(model, TOKENS, Inspecting(inspect))
    torch.testing.assert_close(means[0], expected[0])


def test_nothing_is_kept_from_block_to_block(tiny_model: TinyModel) -> None:
    """Of earlier windows neither chain nor replicas live on, but for the last one's that is being left."""
    gc.collect()
    gc.disable()  # what only the collector would find is memory that grows
    try:
        alive: list[tuple[int, list[weakref.ref[Any]]]] = []
        leftover: list[tuple[int, int]] = []

        def inspect(window: Window) -> None:
            i = window.first_block
            for j, references in alive:
                # The window before hands its outputs on as this one's inputs, and the first inputs are the caller's.
                if j < i - 1:
                    leftover.extend((i, j) for reference in references if reference() is not None)
            kept = [*window.blocks, *window.linears.values(), window.full_outputs, window]
            alive.append((i, [weakref.ref(thing) for thing in kept + ([window.quant_inputs] if i else [])]))

        quantize(tiny_model("llama", n_blocks=6), TOKENS, Inspecting(inspect))
        assert not leftover
        assert not [r for _, references in alive for r in references if r() is not None]
    finally:
        gc.enable()


# what is reported


@pytest.mark.parametrize("method", [QUICK, RTN(bits=4)])
def test_every_number_is_told(method: PTQ161 | RTN, tiny_model: TinyModel) -> None:
    emitted: list[tuple[str, float, dict[str, Any]]] = []
    model = tiny_model("llama")
    quantize(model, TOKENS, method, on_metric=lambda name, value, /, **where: emitted.append((name, value, where)))
    packed = {name: module.packed for name, module in quantized_linears(model)}
    for metric, value_of in (
        ("output_error", None),
        ("nbytes", lambda weight: weight.nbytes),
        ("bits_per_weight", lambda weight: weight.bits_per_weight),
    ):
        values = {where["linear"]: value for name, value, where in emitted if name == metric}
        assert values.keys() == packed.keys()
        for name, value in values.items():
            assert 0 < value < 1 if value_of is None else value == value_of(packed[name])
    assert [where for name, _, where in emitted if name == "seconds"] == [{"block": 0}, {"block": 1}]
    assert {name for name, *_ in emitted if name.endswith("loss")} == ({"loss"} if method is QUICK else set())
    assert all(isinstance(value, int | float) for _, value, _ in emitted)


def test_the_output_error_is_that_of_the_first_sequence(tiny_model: TinyModel) -> None:
    model = tiny_model("llama")
    linear = decoder_blocks(model)[0].self_attn.q_proj
    weight, inputs = linear.weight.detach().clone(), []
    hook = linear.register_forward_pre_hook(lambda _, args: inputs.append(args[0].flatten(0, -2)))
    with torch.no_grad():
        model(TOKENS[:1])
    hook.remove()
    errors: dict[Any, float] = {}

    def on_metric(name: str, value: float, /, **where: int | str) -> None:
        if name == "output_error":
            errors[where["linear"]] = value

    quantize(model, TOKENS, RTN(bits=3, batch_size=2), on_metric=on_metric)
    difference = decoder_blocks(model)[0].self_attn.q_proj.dequantize() - weight
    expected = (inputs[0] @ difference.T).square().sum() / (inputs[0] @ weight.T).square().sum()
    assert errors["0.self_attn.q_proj"] == pytest.approx(float(expected), rel=1e-4)


def test_a_bar_is_shown_where_asked_for(tiny_model: TinyModel, capfd: pytest.CaptureFixture[str]) -> None:
    quantize(tiny_model("llama"), TOKENS, QUICK)
    assert "quantize" not in capfd.readouterr().err
    quantize(tiny_model("llama"), TOKENS, QUICK, progress=True)
    bar = capfd.readouterr().err
    assert "quantize" in bar and "2/2" in bar and "loss" in bar


def test_the_generators_follow_the_seed_and_the_window(tiny_model: TinyModel) -> None:
    def drawn(seed: int) -> list[float]:
        values: list[float] = []

        def inspect(window: Window) -> None:
            values.extend(float(torch.rand(1, generator=window.generator(stage))) for stage in ("a", "b", "a"))

        quantize(tiny_model("llama"), TOKENS, Inspecting(inspect), seed=seed)
        return values

    values = drawn(0)
    assert values == drawn(0)
    assert values[0] == values[2] and values[3] == values[5]
    assert len({*values, *drawn(1)}) == 8


def test_the_librarys_verb_is_the_driver() -> None:
    assert ptq161.quantize is quantize
