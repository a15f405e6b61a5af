"""What a block computes between its products: the operators against torch, and whole blocks against transformers'."""

from __future__ import annotations

import copy
from collections.abc import Callable

import pytest
import torch
from torch import Tensor, nn
from transformers import GemmaConfig, LlamaConfig, MistralConfig, Qwen2Config, Qwen3Config
from transformers.models.auto.modeling_auto import AutoModelForCausalLM

from ptq161.kernels import block as block_module
from ptq161.kernels import native
from ptq161.kernels.block import fused_blocks, gated, rms_norm, rotate


def relative(ours: Tensor, reference: Tensor) -> float:
    ours, reference = ours.detach().float(), reference.detach().float()
    return float((ours - reference).norm() / reference.norm())


def random(*shape: int, seed: int = 0, dtype: torch.dtype = torch.bfloat16) -> Tensor:
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed)).to(dtype).requires_grad_()


def norm_inputs(dtype: torch.dtype) -> list[Tensor]:
    return [random(3, 37, 65, dtype=dtype), random(65, seed=1, dtype=torch.float32)]


def angles(batch: int, seq: int, width: int) -> list[Tensor]:
    turns = torch.rand(batch, seq, width, generator=torch.Generator().manual_seed(2)) * 6
    return [turns.cos(), turns.sin()]


CASES: dict[str, tuple[Callable[..., Tensor], list[Tensor], list[object]]] = {
    "norm of float32": (rms_norm, norm_inputs(torch.float32), [1e-5]),
    "norm of bfloat16": (rms_norm, norm_inputs(torch.bfloat16), [1e-5]),
    "gate": (gated, [random(2, 19, 71), random(2, 19, 71, seed=1)], []),
    "rotation": (rotate, [random(2, 19, 3, 10)], [*angles(1, 19, 10)]),
    "rotation, angles of each sequence": (rotate, [random(2, 19, 3, 10)], [*angles(2, 19, 10)]),
}


@pytest.mark.parametrize("case", CASES)
def test_compiled_operators_and_their_gradients_are_those_of_torch(case: str, request: pytest.FixtureRequest) -> None:
    assert native.load("block")
    function, tensors, rest = CASES[case]
    found = function(*tensors, *rest)
    grad = random(*found.shape, seed=3, dtype=found.dtype).detach()
    gradients = torch.autograd.grad(found, tensors, grad)
    request.getfixturevalue("torch_alone")
    expected = function(*tensors, *rest)
    assert found.dtype == expected.dtype == (torch.float32 if "norm" in case else torch.bfloat16)
    assert relative(found, expected) < 1e-3
    for ours, exact in zip(gradients, torch.autograd.grad(expected, tensors, grad), strict=True):
        assert ours.dtype == exact.dtype
        assert relative(ours, exact) < 3e-3


@pytest.mark.parametrize("case", CASES)
def test_bits_do_not_depend_on_threads(case: str) -> None:
    function, tensors, rest = CASES[case]
    before = torch.get_num_threads()
    found = []
    for threads in (1, 3):
        torch.set_num_threads(threads)
        try:
            out = function(*tensors, *rest)
            found.append([out, *torch.autograd.grad(out, tensors, torch.ones_like(out))])
        finally:
            torch.set_num_threads(before)
    assert all(torch.equal(a, b) for a, b in zip(*found, strict=True))


@pytest.mark.parametrize("value", [0.0, 90.0, -90.0, 1e30, -1e30])
def test_gates_of_any_size_stay_numbers(value: float) -> None:
    gate = torch.full((1, 33), value).bfloat16().requires_grad_()
    up = torch.ones_like(gate)
    out = gated(gate, up)
    (gradient,) = torch.autograd.grad(out, gate, up)
    torch.testing.assert_close(out.float(), nn.functional.silu(gate.float()))
    assert bool(gradient.isfinite().all())
    assert float(gradient[0, 0]) == pytest.approx(0.5 if value == 0 else float(value > 0), abs=1e-6)


def test_what_is_not_finite_stays_so() -> None:
    for value in (float("nan"), float("inf")):
        x = torch.full((1, 40), value)
        assert not bool(rms_norm(x, torch.ones(40), 1e-5).isfinite().any())
        assert not bool(gated(x.bfloat16(), x.bfloat16()).isfinite().any())


SIZES = {
    "hidden_size": 48,
    "intermediate_size": 80,
    "num_attention_heads": 6,
    "num_key_value_heads": 2,
    "num_hidden_layers": 1,
    "vocab_size": 11,
    "head_dim": 8,
}
CONFIGS = {"llama": LlamaConfig, "mistral": MistralConfig, "qwen2": Qwen2Config, "qwen3": Qwen3Config}
FUSED = {"llama": 4, "mistral": 3, "qwen2": 3, "qwen3": 5, "gemma": 2}
"""Modules of a block that are Llama's word for word: of Qwen3 the norms of queries and keys too, of Gemma none."""


def decoder(kind: str) -> nn.Module:
    torch.manual_seed(0)
    config = {**CONFIGS, "gemma": GemmaConfig}[kind](**SIZES)
    return AutoModelForCausalLM.from_config(config).float().eval().requires_grad_(False)


@pytest.mark.parametrize("kind", FUSED)
def test_modules_are_taken_over_inside_and_given_back(kind: str) -> None:
    (block,) = decoder(kind).model.layers
    with torch.autocast("cpu", torch.bfloat16), fused_blocks([block]):
        assert sum("forward" in module.__dict__ for module in block.modules()) == FUSED[kind]
    assert not any("forward" in module.__dict__ for module in block.modules())


def test_another_version_of_llama_s_own_functions_is_not_taken_over(monkeypatch: pytest.MonkeyPatch) -> None:
    """A later transformers may compute something else in all of them."""
    (block,) = decoder("llama").model.layers
    known = [(llamas, f"{names} scale", fused) for llamas, names, fused in block_module._known()]
    monkeypatch.setattr(block_module, "_known", lambda: known)
    block_module._fused_forward.cache_clear()
    with torch.autocast("cpu", torch.bfloat16), fused_blocks([block]):
        assert not any("forward" in module.__dict__ for module in block.modules())
    block_module._fused_forward.cache_clear()


def test_a_forward_function_of_a_module_s_own_stays() -> None:
    (block,) = decoder("llama").model.layers
    own = block.mlp.forward
    block.mlp.forward = own
    with torch.autocast("cpu", torch.bfloat16), fused_blocks([block]):
        assert block.mlp.__dict__["forward"] is own
    assert block.mlp.__dict__["forward"] is own


def test_nothing_is_taken_over_in_another_dtype_or_without_a_compiler(request: pytest.FixtureRequest) -> None:
    (block,) = decoder("llama").model.layers
    with torch.autocast("cpu", torch.float16), fused_blocks([block]):
        assert not any("forward" in module.__dict__ for module in block.modules())
    request.getfixturevalue("torch_alone")
    with torch.autocast("cpu", torch.bfloat16), fused_blocks([block]):
        assert not any("forward" in module.__dict__ for module in block.modules())


class Float(nn.Linear):
    """A linear with float32 outputs, as those of a training arithmetic have, which counts its calls."""

    calls = 0

    def forward(self, x: Tensor) -> Tensor:
        self.calls += 1
        with torch.autocast("cpu", enabled=False):
            return super().forward(x.float())


def test_linears_with_float32_outputs_are_called_once() -> None:
    model = decoder("llama")
    block = model.model.layers[0]
    for name in ("q_proj", "k_proj", "v_proj"):
        linear = block.self_attn.get_submodule(name)
        block.self_attn.set_submodule(name, Float(linear.in_features, linear.out_features, bias=False))
    tokens = torch.arange(150).view(1, 150) % 11
    with torch.autocast("cpu", torch.bfloat16):
        expected = model.model(input_ids=tokens, use_cache=False).last_hidden_state
        with fused_blocks([block]):
            found = model.model(input_ids=tokens, use_cache=False).last_hidden_state
    assert relative(found, expected) < 0.01
    assert [module.calls for module in block.modules() if isinstance(module, Float)] == [2, 2, 2]


@pytest.mark.parametrize("kind", CONFIGS)
@pytest.mark.parametrize("masked", [False, True])
def test_a_block_s_output_and_gradients_are_those_of_transformers(kind: str, masked: bool) -> None:
    model = decoder(kind)
    block = model.model.layers[0]
    block.mlp.up_proj.weight.requires_grad_()
    block.post_attention_layernorm.weight.requires_grad_()
    tokens = torch.arange(2 * 150).view(2, 150) % 11
    mask = torch.ones_like(tokens)
    if masked:
        mask[1, :20] = 0  # padding on the left

    def run(blocks: list[nn.Module]) -> list[Tensor]:
        exact = copy.deepcopy(model)
        found = [exact.model.layers[0]] if blocks else []
        with torch.autocast("cpu", torch.bfloat16), fused_blocks(found):
            hidden = exact.model(input_ids=tokens, attention_mask=mask, use_cache=False).last_hidden_state
        hidden = hidden * mask.unsqueeze(-1)
        hidden.float().square().mean().backward()
        trained = [p for p in exact.parameters() if p.requires_grad]
        return [hidden.detach(), *(p.grad for p in trained if p.grad is not None)]

    ours, exact = run([block]), run([])
    assert len(ours) == len(exact) == 3
    for found, expected in zip(ours, exact, strict=True):
        assert relative(found, expected) < 0.02
