"""A model whose linears are packed: what it stores, its hash, its dtype, and the dense model that it stands for."""

from __future__ import annotations

import dataclasses
from collections.abc import Iterable, Mapping
from typing import Any

import torch
from torch import Tensor, nn
from transformers import PreTrainedModel

from ptq161.errors import UserError
from ptq161.files.fingerprints import key_of
from ptq161.files.hashing import sha256_of_tensors
from ptq161.models.experts import fuse_experts
from ptq161.models.linears import linear_of
from ptq161.packed.embedding import PackedEmbedding, densify_embeddings, packed_embeddings, rest_dtype
from ptq161.packed.linear import PackedHead, PackedLinear, PackedModule


@dataclasses.dataclass(frozen=True)
class PackedSize:
    """What a packed model stores.

    Attributes:
        linear_bytes: bytes of all packed weights.
        linear_weights: weights that they stand for.
        other_bytes: bytes of everything else (embeddings, norms, biases), tied tensors counted once.

    Example:
        >>> PackedSize(linear_bytes=336, linear_weights=448, other_bytes=608).bits_per_weight
        6.0
    """

    linear_bytes: int
    linear_weights: int
    other_bytes: int

    @property
    def bits_per_weight(self) -> float:
        """Measured bits over all packed linears."""
        return 8 * self.linear_bytes / self.linear_weights


def packed_linears(model: nn.Module) -> dict[str, PackedLinear]:
    """Return the model's packed linears by module path, without its head.

    Example:
        >>> from ptq161.packed.uniform import UniformWeight
        >>> packed = UniformWeight.pack(torch.tensor([[0, 1]]), torch.ones(1, 1), torch.zeros(1, 1), bits=2)
        >>> model = nn.Sequential(PackedLinear(packed), nn.Linear(1, 4))
        >>> list(packed_linears(model))
        ['0']
    """
    found = ((name, module) for name, module in model.named_modules() if isinstance(module, PackedLinear))
    return {name: module for name, module in found if not isinstance(module, PackedHead)}


def measure(model: PreTrainedModel) -> PackedSize:
    """Count the bytes of a packed model.

    Example:
        >>> import ptq161, torch
        >>> from transformers import LlamaConfig, LlamaForCausalLM
        >>> sizes = {"vocab_size": 8, "hidden_size": 8, "intermediate_size": 8, "num_attention_heads": 1}
        >>> model = LlamaForCausalLM(LlamaConfig(num_hidden_layers=1, **sizes))
        >>> model = ptq161.quantize(model, torch.zeros(1, 2, dtype=torch.long), ptq161.RTN(bits=2))
        >>> measure(model)  # 7 linears of 8 rows: 2 bytes of codes, 2 of the scale, 2 of the zero point
        PackedSize(linear_bytes=336, linear_weights=448, other_bytes=608)
    """
    layers = packed_linears(model).values()
    linear_bytes = sum(layer.packed.nbytes for layer in layers)
    total = tensor_bytes(stored_tensors(model).values())
    weights = sum(layer.out_features * layer.in_features for layer in layers)
    return PackedSize(linear_bytes, weights, total - linear_bytes)


def tensor_bytes(tensors: Iterable[Tensor]) -> int:
    """Count the bytes of tensors.

    Example:
        >>> tensor_bytes([torch.zeros(3), torch.zeros(2, dtype=torch.int8)])
        14
    """
    return sum(tensor.numel() * tensor.element_size() for tensor in tensors)


def activation_bits(model: nn.Module) -> int | None:
    """Return the bits to which the inputs of a model's packed linears are rounded, the most of all; None for none.

    Example:
        >>> from ptq161.packed.uniform import UniformWeight
        >>> packed = UniformWeight.pack(torch.tensor([[0, 1]]), torch.ones(1, 1), torch.zeros(1, 1), bits=2)
        >>> activation_bits(nn.Sequential(PackedLinear(packed)))
        >>> packed = packed.with_activations(8, torch.ones(1), torch.tensor([128]))
        >>> activation_bits(nn.Sequential(PackedLinear(packed)))
        8
    """
    return max((layer.packed.activation_bits or 0 for layer in packed_linears(model).values()), default=0) or None


def sha256_of_packed(model: PreTrainedModel) -> str:
    """Hash a packed model: its tensors, and how those of its packed weights are to be read.

    Example:
        >>> import ptq161, torch
        >>> from transformers import LlamaConfig, LlamaForCausalLM
        >>> sizes = {"vocab_size": 8, "hidden_size": 8, "intermediate_size": 8, "num_attention_heads": 1}
        >>> model = LlamaForCausalLM(LlamaConfig(num_hidden_layers=1, **sizes))
        >>> model = ptq161.quantize(model, torch.zeros(1, 2, dtype=torch.long), ptq161.RTN(bits=2))
        >>> before = sha256_of_packed(model)
        >>> model.model.layers[0].mlp.up_proj.codes[0, 0] ^= 1  # one bit
        >>> sha256_of_packed(model) == before
        False
    """
    return key_of({"tensors": sha256_of_tensors(model.state_dict()), **packed_settings(model)})


def packed_settings(model: nn.Module) -> dict[str, dict[str, dict[str, Any]]]:
    """Return the settings of a model's packed weights by module path: ``linears``, and ``embeddings`` where there are.

    Example:
        >>> from ptq161.packed.uniform import UniformWeight
        >>> packed = UniformWeight.pack(torch.tensor([[0, 1]]), torch.ones(1, 1), torch.zeros(1, 1), bits=2)
        >>> packed_settings(nn.Sequential(PackedLinear(packed)))["linears"]["0"]["bits"]
        2
    """
    kinds: dict[str, Mapping[str, PackedModule]]
    kinds = {"linears": packed_linears(model), "embeddings": packed_embeddings(model)}
    return {
        kind: {name: module.packed.settings() for name, module in modules.items()}
        for kind, modules in kinds.items()
        if modules or kind == "linears"
    }


def cast_rest(model: PreTrainedModel, dtype: torch.dtype) -> None:
    """Cast all that is stored but the packed tensors to ``dtype``, in place: what is evaluated is what is stored.

    Buffers that are not stored (rotary frequencies) keep their precision, which a loaded model gives them too.

    Example:
        >>> import ptq161, torch
        >>> from transformers import LlamaConfig, LlamaForCausalLM
        >>> sizes = {"vocab_size": 8, "hidden_size": 8, "intermediate_size": 8, "num_attention_heads": 1}
        >>> model = LlamaForCausalLM(LlamaConfig(num_hidden_layers=1, **sizes))
        >>> model = ptq161.quantize(model, torch.zeros(1, 2, dtype=torch.long), ptq161.RTN(bits=2))
        >>> cast_rest(model, torch.bfloat16)
        >>> model.lm_head.weight.dtype, model.model.layers[0].mlp.up_proj.scales.dtype
        (torch.bfloat16, torch.float16)
    """
    for module in model.modules():
        for parameter in module.parameters(recurse=False):
            parameter.data = parameter.data.to(dtype)
        if isinstance(module, PackedEmbedding):
            module.dtype = dtype
        if isinstance(module, PackedModule):
            continue
        for name, buffer in module.named_buffers(recurse=False):
            if buffer.is_floating_point() and name not in module._non_persistent_buffers_set:
                setattr(module, name, buffer.to(dtype))
    model.config.dtype = dtype


def densify(model: PreTrainedModel, dtype: torch.dtype | None = None) -> PreTrainedModel:
    """Replace every packed linear by the ``nn.Linear`` of its dequantized weight, and packed embeddings, in place.

    The experts of a mixture stay one module each.

    Args:
        model: is changed.
        dtype: of all that it stores then; None keeps that of what is not packed.

    Returns:
        the model.

    Raises:
        UserError: the packed linears round their inputs, which dense ones do not.

    Example:
        >>> import ptq161, torch
        >>> from transformers import LlamaConfig, LlamaForCausalLM
        >>> sizes = {"vocab_size": 8, "hidden_size": 8, "intermediate_size": 8, "num_attention_heads": 1}
        >>> model = LlamaForCausalLM(LlamaConfig(num_hidden_layers=1, **sizes))
        >>> model = ptq161.quantize(model, torch.zeros(1, 2, dtype=torch.long), ptq161.RTN(bits=2))
        >>> values = model.model.layers[0].mlp.up_proj.dequantize()
        >>> densify(model) is model
        True
        >>> torch.equal(model.model.layers[0].mlp.up_proj.weight, values)
        True
    """
    if bits := activation_bits(model):
        raise UserError(
            f"the model's activations are quantized to {bits} bits (method.activation_bits), which a dense model "
            "cannot do: use the packed one."
        )
    if dtype is not None:
        cast_rest(model, dtype)
    dense = rest_dtype(model)
    densify_embeddings(model)
    for name, layer in packed_linears(model).items():
        model.set_submodule(name, linear_of(layer.dequantize().to(dense), layer.bias))
    # What a packed model does in its own way (ptq161.packed.checkpoint.own_methods).
    for method in ("save_pretrained", "dequantize"):
        vars(model).pop(method, None)
    return model


def dequantize(model: PreTrainedModel, dtype: torch.dtype | None = None) -> PreTrainedModel:
    """Make a packed model dense in place, with the modules of transformers' own class.

    Args:
        model: is changed: as by :func:`densify`, and the experts of a mixture, each of which was packed, are fused.
        dtype: as for :func:`densify`.

    Returns:
        the model.

    Raises:
        UserError: as there.

    Example:
        >>> import ptq161, torch
        >>> from transformers import MixtralConfig, MixtralForCausalLM
        >>> sizes = {"vocab_size": 8, "hidden_size": 8, "intermediate_size": 8, "num_attention_heads": 1}
        >>> sizes |= {"num_key_value_heads": 1, "num_local_experts": 2}
        >>> model = MixtralForCausalLM(MixtralConfig(num_hidden_layers=1, **sizes))
        >>> model = ptq161.quantize(model, torch.zeros(1, 2, dtype=torch.long), ptq161.RTN(bits=2))
        >>> dequantize(model).model.layers[0].mlp.experts.down_proj.shape
        torch.Size([2, 8, 8])
    """
    fuse_experts(densify(model, dtype))
    return model


def stored_tensors(model: nn.Module) -> dict[str, Tensor]:
    """Return the state dict without tensors that are tied to another one; those on the meta device are no ties.

    Example:
        >>> model = nn.Sequential(nn.Linear(2, 2, bias=False), nn.Linear(2, 2, bias=False))
        >>> model[1].weight = model[0].weight
        >>> list(model.state_dict()), list(stored_tensors(model))
        (['0.weight', '1.weight'], ['0.weight'])
    """
    stored: dict[str, Tensor] = {}
    seen: set[int] = set()
    for name, tensor in model.state_dict().items():
        if tensor.numel() and not tensor.is_meta:
            if tensor.data_ptr() in seen:
                continue
            seen.add(tensor.data_ptr())
        stored[name] = tensor
    return stored
