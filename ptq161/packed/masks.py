"""Salient input channels of a whole model: read back from a packed one, and checked before they are used again."""

from __future__ import annotations

from collections.abc import Mapping

import torch
from torch import Tensor
from transformers import PreTrainedModel

from ptq161.errors import UserError
from ptq161.models.architectures import quantized_linears
from ptq161.packed.linear import PackedLinear
from ptq161.packed.structured_binary import StructuredBinaryWeight


def salient_masks(model: PreTrainedModel) -> dict[str, Tensor]:
    """Return the salient input channels of a model that PTQ1.61 has quantized.

    Returns:
        for each linear (``"{block}.{path}"``, as in ``"3.self_attn.q_proj"``) ``[in]`` bool, True for salient channels:
        what :func:`ptq161.quantize` takes as ``salient_masks``.

    Raises:
        UserError: a linear is not packed, or its format has no salient channels.

    Example:
        >>> import ptq161
        >>> from ptq161.methods.ptq161 import PTQ161
        >>> from transformers import LlamaConfig, LlamaForCausalLM
        >>> sizes = {"vocab_size": 8, "hidden_size": 8, "intermediate_size": 8, "num_attention_heads": 1}
        >>> model = LlamaForCausalLM(LlamaConfig(num_hidden_layers=1, **sizes))
        >>> model = ptq161.quantize(model, torch.zeros(1, 2, dtype=torch.long), PTQ161(epochs=0))
        >>> masks = salient_masks(model)
        >>> masks["0.mlp.up_proj"].shape, int(masks["0.mlp.up_proj"].sum())  # int(0.2 * 8) and the one at the edge
        (torch.Size([8]), 2)
    """
    masks = {}
    for name, module in quantized_linears(model):
        packed = module.packed if isinstance(module, PackedLinear) else None
        if not isinstance(packed, StructuredBinaryWeight):
            stored = "not packed" if packed is None else f"stored as {packed.format!r}"
            raise UserError(
                f"the model has no salient channels to read: its linear {name} is {stored}; use one that PTQ1.61 has "
                "quantized."
            )
        masks[name] = packed.salient_channels()
    return masks


def check_salient_masks(model: PreTrainedModel, masks: Mapping[str, Tensor]) -> None:
    """Check that there is a mask of the right shape for every linear that will be quantized, and no other one.

    Raises:
        UserError: otherwise.

    Example:
        >>> from transformers import LlamaConfig, LlamaForCausalLM
        >>> sizes = {"vocab_size": 8, "hidden_size": 8, "intermediate_size": 8, "num_attention_heads": 1}
        >>> model = LlamaForCausalLM(LlamaConfig(num_hidden_layers=1, **sizes))
        >>> check_salient_masks(model, {"0.mlp.up_proj": torch.zeros(8, dtype=torch.bool)})  # doctest: +ELLIPSIS
        Traceback (most recent call last):
            ...
        ptq161.errors.UserError: salient_masks: 0.mlp.down_proj has no mask; give one for ...
    """
    linears = dict(quantized_linears(model))
    if wrong := sorted(set(linears) ^ set(masks)):
        fault = "has no mask" if wrong[0] in linears else "is no linear that is quantized"
        raise UserError(f"salient_masks: {wrong[0]} {fault}; give one for each quantized linear and no other.")
    for name, linear in linears.items():
        expected, mask = [linear.in_features], masks[name]
        if mask.dtype != torch.bool or list(mask.shape) != expected:
            given = f"{str(mask.dtype).removeprefix('torch.')} {list(mask.shape)}"
            raise UserError(f"salient_masks: the mask of {name} is {given}; use bool {expected}, a value per channel.")
