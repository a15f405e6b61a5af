from __future__ import annotations

import dataclasses
from collections.abc import Callable, Mapping

import pytest
import torch
from torch import Tensor, nn
from transformers import PreTrainedModel

import ptq161
from ptq161.errors import UserError
from ptq161.methods import rtn
from ptq161.methods.base import Window
from ptq161.methods.layerwise import InputStatistics, LayerwiseMethod
from ptq161.models.architectures import decoder_blocks
from ptq161.models.experts import split_experts
from ptq161.packed.weight import PackedWeight
from tests.conftest import TINY


@dataclasses.dataclass(frozen=True)
class Recorder(LayerwiseMethod):
    """Keeps the statistics and rounds to 8 bits."""

    batch_size: int = 3
    seen: dict[str, InputStatistics] = dataclasses.field(default_factory=dict)

    def nominal_bits(self) -> float:
        return 8.0

    def quantize_group(
        self, weights: Mapping[str, Tensor], statistics: InputStatistics | None, window: Window
    ) -> dict[str, PackedWeight]:
        assert statistics is not None
        self.seen.update(dict.fromkeys(weights, statistics))
        return {name: rtn.quantize_weight(weight, 8) for name, weight in weights.items()}


@pytest.mark.parametrize("architecture", TINY)
def test_every_linear_of_the_first_block_gets_the_statistics_of_its_own_input(
    tiny_model: Callable[..., PreTrainedModel], architecture: str
) -> None:
    model = tiny_model(architecture)
    split_experts(model)
    tokens = torch.randint(0, 256, (5, 40))
    inputs: dict[str, Tensor] = {}

    def keep(name: str) -> Callable[[nn.Module, tuple[Tensor, ...]], None]:
        return lambda _, args: inputs.__setitem__(name, args[0].flatten(0, -2).double())

    modules = decoder_blocks(model)[0].named_modules()
    hooks = [m.register_forward_pre_hook(keep(name)) for name, m in modules if isinstance(m, nn.Linear)]
    with torch.no_grad():
        model(tokens)
    for hook in hooks:
        hook.remove()
    recorder = Recorder()
    ptq161.quantize(model, tokens, recorder)
    assert {name for name in recorder.seen if name.startswith("0.")} == {f"0.{name}" for name in inputs}
    for name, x in inputs.items():
        seen = recorder.seen[f"0.{name}"]
        expected = 2 / 5 * x.T @ x
        assert (seen.hessian - expected).abs().max() < 1e-5 * expected.abs().max()
        assert torch.equal(seen.hessian, seen.hessian.T)
        torch.testing.assert_close(seen.absolute_mean, x.abs().mean(0).float(), rtol=1e-4, atol=1e-5)
        torch.testing.assert_close(seen.absolute_max, x.abs().amax(0).float(), rtol=1e-4, atol=1e-5)
        assert (seen.n_sequences, seen.n_tokens) == (5, len(x))


@pytest.mark.parametrize("bad", [float("nan"), float("inf")])
def test_an_input_that_is_not_finite_is_named(tiny_model: Callable[..., PreTrainedModel], bad: float) -> None:
    model = tiny_model("llama")
    broken = model.model.layers[1].post_attention_layernorm
    broken.register_forward_hook(lambda module, args, output: output * bad)
    with pytest.raises(UserError, match=r"1\.mlp\.gate_proj.*NaN or infinite"):
        ptq161.quantize(model, torch.randint(0, 256, (4, 32)), Recorder())
