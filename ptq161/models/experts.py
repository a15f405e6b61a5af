"""Experts of a mixture as linears: transformers stores those of a block fused in two tensors, a method needs each."""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch import Tensor, nn
from transformers import PreTrainedModel

from ptq161.models.architectures import decoder_blocks
from ptq161.models.linears import linear_of

_FUSED = ("gate_up_proj", "down_proj")


class Expert(nn.Module):
    """One expert, a gated MLP.

    Args:
        gate_up: ``[2 * intermediate, hidden]``, the rows of the gate first.
        down: ``[hidden, intermediate]``.
        activation: of the gate.

    Example:
        >>> expert = Expert(torch.ones(4, 3), torch.ones(3, 2), nn.ReLU())
        >>> expert(torch.ones(1, 3))
        tensor([[18., 18., 18.]], grad_fn=<MmBackward0>)
    """

    def __init__(self, gate_up: Tensor, down: Tensor, activation: Callable[[Tensor], Tensor]) -> None:
        super().__init__()
        gate, up = gate_up.chunk(2)
        self.gate_proj, self.up_proj, self.down_proj = linear_of(gate), linear_of(up), linear_of(down)
        self.activation = activation

    def forward(self, x: Tensor) -> Tensor:
        """Map ``[tokens, hidden]`` to the same shape."""
        hidden: Tensor = self.down_proj(self.activation(self.gate_proj(x)) * self.up_proj(x))
        return hidden


class Experts(nn.ModuleList):
    """The experts of a block in place of transformers' fused module, which is called in the same way.

    Example:
        >>> experts = Experts([Expert(torch.ones(4, 3), torch.ones(3, 2), nn.ReLU()) for _ in range(2)])
        >>> chosen, shares = torch.tensor([[1]]), torch.tensor([[0.5]])  # of one token
        >>> experts(torch.ones(1, 3), chosen, shares)
        tensor([[9., 9., 9.]], grad_fn=<IndexAddBackward0>)
    """

    fused: tuple[nn.Module, ...] = ()
    """The module that was replaced, without its weights; a tuple, so that it is no child."""

    def forward(self, hidden: Tensor, chosen: Tensor, shares: Tensor) -> Tensor:
        """Add up the outputs of the experts that each token has chosen.

        Args:
            hidden: ``[tokens, hidden]``.
            chosen: ``[tokens, k]``, indices of experts.
            shares: ``[tokens, k]``, their weights.
        """
        output = torch.zeros_like(hidden)
        for index, expert in enumerate(self):
            tokens, places = torch.where(chosen == index)
            if len(tokens):  # an expert without tokens is not run
                share = shares[tokens, places, None]
                output = output.index_add(0, tokens, (expert(hidden[tokens]) * share).to(output.dtype))
        return output


def split_experts(model: PreTrainedModel) -> None:
    """Replace the fused experts of every block by :class:`Experts`, in place; their linears share the memory.

    Example:
        >>> from transformers import MixtralConfig, MixtralForCausalLM
        >>> sizes = {"vocab_size": 8, "hidden_size": 8, "intermediate_size": 4, "num_attention_heads": 1}
        >>> model = MixtralForCausalLM(MixtralConfig(num_hidden_layers=1, num_local_experts=2, **sizes))
        >>> split_experts(model)
        >>> model.model.layers[0].mlp.experts[1].up_proj.weight.shape
        torch.Size([4, 8])
    """
    for name, fused in list(decoder_blocks(model).named_modules()):
        if not all(isinstance(getattr(fused, tensor, None), nn.Parameter) for tensor in _FUSED):
            continue
        pairs = zip(*(getattr(fused, tensor).detach() for tensor in _FUSED), strict=True)
        experts = Experts([Expert(gate_up, down, fused.act_fn) for gate_up, down in pairs])
        for tensor in _FUSED:
            setattr(fused, tensor, nn.Parameter(getattr(fused, tensor).detach().to("meta")))
        experts.fused = (fused,)
        decoder_blocks(model).set_submodule(name, experts.train(fused.training))


def fuse_experts(model: PreTrainedModel) -> None:
    """Undo :func:`split_experts` in a model whose experts are dense, so that transformers can save it.

    Example:
        >>> from transformers import MixtralConfig, MixtralForCausalLM
        >>> sizes = {"vocab_size": 8, "hidden_size": 8, "intermediate_size": 4, "num_attention_heads": 1}
        >>> model = MixtralForCausalLM(MixtralConfig(num_hidden_layers=1, num_local_experts=2, **sizes))
        >>> before = model.model.layers[0].mlp.experts.gate_up_proj
        >>> split_experts(model)
        >>> fuse_experts(model)
        >>> torch.equal(model.model.layers[0].mlp.experts.gate_up_proj, before)
        True
    """
    for name, experts in list(decoder_blocks(model).named_modules()):
        if isinstance(experts, Experts):
            (fused,) = experts.fused
            gate_up = torch.stack([torch.cat([_weight(e, "gate_proj"), _weight(e, "up_proj")]) for e in experts])
            down = torch.stack([_weight(expert, "down_proj") for expert in experts])
            for tensor, weights in zip(_FUSED, (gate_up, down), strict=True):
                setattr(fused, tensor, nn.Parameter(weights))
            decoder_blocks(model).set_submodule(name, fused.train(experts.training))


def _weight(expert: nn.Module, path: str) -> Tensor:
    linear = expert.get_submodule(path)
    assert isinstance(linear, nn.Linear)
    return linear.weight.detach()
