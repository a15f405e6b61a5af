"""The student and its merging, against the formula."""

from __future__ import annotations

import copy
from collections.abc import Callable

import pytest
import torch
from transformers import PreTrainedModel

import ptq161
from ptq161.methods import nf4
from ptq161.methods.rtn import RTN
from ptq161.models.architectures import quantized_linears
from ptq161.models.experts import split_experts
from ptq161.packed.model import cast_rest, packed_linears
from ptq161.preprocess.student import make_student, memory, merge, target_names
from ptq161.training.arithmetic.linears import LoraLinear, TrainedLinear
from ptq161.training.loop import trained_parameters
from tests.conftest import TINY
from tests.preprocess.conftest import sequences, short

TinyModel = Callable[..., PreTrainedModel]
TOKENS = sequences(2)
CPU = torch.device("cpu")


def packed_model(tiny_model: TinyModel, architecture: str = "llama") -> PreTrainedModel:
    return ptq161.quantize(tiny_model(architecture), TOKENS, RTN(bits=4))


def shake(student: PreTrainedModel) -> None:
    with torch.no_grad():
        for parameter in trained_parameters(student).values():
            parameter += 0.01 * torch.randn_like(parameter)


@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
@pytest.mark.parametrize("architecture", TINY)
def test_merged_weights_are_base_plus_low_rank_update(tiny_model: TinyModel, architecture: str, dtype: str) -> None:
    packed = packed_model(tiny_model, architecture)
    if dtype == "bfloat16":
        cast_rest(packed, torch.bfloat16)  # a half-precision checkpoint
    base = {name: layer.dequantize() for name, layer in packed_linears(packed).items()}
    restoration = short(rank=3, alpha=12.0, compute_dtype=dtype)
    student = make_student(packed, restoration, CPU)
    shake(student)
    factors = {name: p.detach() for name, p in trained_parameters(student).items()}
    targets = target_names(packed, restoration)
    merged = merge(packed, student, restoration)
    split_experts(merged)
    assert len(factors) == 2 * len(targets)
    for name, weight in base.items():
        expected = weight
        if name in targets:
            a, b = (factors[f"{name}.lora_{x}.default.weight"] for x in "AB")
            assert a.shape[0] == b.shape[1] == 3
            expected = weight + 12.0 / 3 * (b @ a)
        found = merged.get_submodule(name).weight
        assert found.dtype == torch.float32  # the bfloat16 base of the training does not round the result
        torch.testing.assert_close(found, expected, rtol=1e-6, atol=1e-7)
        assert torch.equal(found, expected) or name in targets


def test_the_merged_model_computes_what_the_student_did(tiny_model: TinyModel) -> None:
    packed = packed_model(tiny_model)
    restoration = short()
    student = make_student(packed, restoration, CPU)
    before = packed(TOKENS).logits
    torch.testing.assert_close(student(TOKENS).logits, before)  # the update starts at zero
    shake(student)
    after = student(TOKENS).logits
    assert (after - before).abs().max() > 1e-3
    torch.testing.assert_close(merge(packed, student, restoration)(TOKENS).logits, after, rtol=1e-4, atol=1e-4)


def test_a_full_update_is_taken_as_it_is(tiny_model: TinyModel) -> None:
    packed = packed_model(tiny_model)
    restoration = short(update="full", targets=["down", "o"], compute_dtype="bfloat16")
    student = make_student(packed, restoration, CPU)
    trained = trained_parameters(student)
    assert set(trained) == {f"{name}.weight" for name in target_names(packed, restoration)}
    for name, parameter in trained.items():
        assert torch.equal(parameter, packed.get_submodule(name.removesuffix(".weight")).dequantize())
    shake(student)
    merged = merge(copy.deepcopy(packed), student, restoration)
    for name, parameter in trained.items():
        assert torch.equal(merged.get_parameter(name), parameter)


def test_what_is_frozen_is_small_and_what_is_trained_exact(tiny_model: TinyModel) -> None:
    student = make_student(packed_model(tiny_model), short(compute_dtype="bfloat16"), CPU)
    for parameter in student.parameters():
        assert parameter.dtype == (torch.float32 if parameter.requires_grad else torch.bfloat16)


@pytest.mark.parametrize(
    ("architecture", "targets", "paths"),
    [
        ("llama", ["q", "gate"], ["self_attn.q_proj", "mlp.gate_proj"]),
        ("opt", ["gate", "up", "down", "o"], ["self_attn.out_proj", "fc1", "fc2"]),
    ],
)
def test_targets_by_role(tiny_model: TinyModel, architecture: str, targets: list[str], paths: list[str]) -> None:
    model = tiny_model(architecture)
    prefix = "model.decoder.layers" if architecture == "opt" else "model.layers"
    assert target_names(model, short(targets=targets)) == [f"{prefix}.{i}.{path}" for i in range(2) for path in paths]
    everything = target_names(model, short(targets=["q", "k", "v", "o", "gate", "up", "down"]))
    assert everything == [f"{prefix}.{name}" for name, _ in quantized_linears(model)]


@pytest.mark.parametrize("architecture", TINY)
@pytest.mark.parametrize("update", ["lora", "full"])
def test_an_arithmetic_is_under_every_trained_linear(tiny_model: TinyModel, architecture: str, update: str) -> None:
    packed = packed_model(tiny_model, architecture)
    restoration = short(update=update, arithmetic="gse", bits=8)
    torch.manual_seed(0)
    student = make_student(packed, restoration, CPU)
    targets = target_names(packed, restoration)
    kind = LoraLinear if update == "lora" else TrainedLinear
    assert {name for name, module in student.named_modules() if isinstance(module, kind)} == set(targets)
    assert len(trained_parameters(student)) == len(targets) * (2 if update == "lora" else 1)
    torch.manual_seed(0)
    plain = make_student(packed, short(update=update), CPU)
    # Both start alike, but for the arithmetic.
    for mine, theirs in zip(*(trained_parameters(s).values() for s in (student, plain)), strict=True):
        assert torch.equal(mine, theirs)
    found, expected = (s.eval()(TOKENS).logits for s in (student, plain))
    # A router may send a token elsewhere for the least difference.
    assert 0 < (found - expected).norm() < (0.3 if architecture == "mixtral" else 0.1) * expected.norm()


def test_the_merged_update_of_an_arithmetic_is_that_of_the_factors(tiny_model: TinyModel) -> None:
    packed = packed_model(tiny_model)
    base = {name: layer.dequantize() for name, layer in packed_linears(packed).items()}
    restoration = short(rank=3, alpha=12.0, arithmetic="gse", compute_dtype="bfloat16")
    student = make_student(packed, restoration, CPU)
    shake(student)
    factors = {name: p.detach() for name, p in trained_parameters(student).items()}
    merged = merge(packed, student, restoration)
    for name in target_names(packed, restoration):
        expected = base[name] + 4 * factors[f"{name}.lora_B"] @ factors[f"{name}.lora_A"]
        torch.testing.assert_close(merged.get_submodule(name).weight, expected, rtol=1e-6, atol=1e-7)


@pytest.mark.parametrize("arithmetic", ["float", "gse"])
def test_a_base_in_four_bits(tiny_model: TinyModel, arithmetic: str) -> None:
    packed = packed_model(tiny_model)
    restoration = short(base="nf4", arithmetic=arithmetic, targets=["q", "down"])
    before = {name: layer.dequantize() for name, layer in packed_linears(packed).items()}
    student = make_student(packed, restoration, CPU)
    found = memory(packed, student, restoration)
    merged = merge(packed, student, restoration)  # the update is zero
    targets = target_names(merged, restoration)
    bases = {name: nf4.quantize_weight(before[name]) for name in targets}
    for name, weight in before.items():
        expected = bases[name].dequantize() if name in targets else weight
        assert torch.equal(merged.get_submodule(name).weight, expected)
    trained = sum(4 * (64 + n) * 4 for n in (64, 96)) * 2  # rank 4 in float32, of q and down in both blocks
    assert found["trained_bytes"] == trained and found["optimizer_bytes"] == 2 * trained
    assert found["base_bytes"] == sum(base.nbytes for base in bases.values())
    dense = 4 * sum(weight.numel() for name, weight in before.items() if name in targets)
    assert found["base_held_bytes"] == dense * (2 if arithmetic == "gse" else 1)


def test_a_full_update_has_no_base(tiny_model: TinyModel) -> None:
    packed = packed_model(tiny_model)
    restoration = short(update="full")
    found = memory(packed, make_student(packed, restoration, CPU), restoration)
    assert found["base_bytes"] == found["base_held_bytes"] == 0 < found["trained_bytes"]
