"""The table of supported architectures, data and no code per model, and lookups in it."""

from __future__ import annotations

import dataclasses
import json
from collections.abc import Iterator
from typing import Any

import torch
from torch import Tensor, nn
from transformers import PretrainedConfig, PreTrainedModel

from ptq161.errors import UserError
from ptq161.files.fingerprints import key_of


@dataclasses.dataclass(frozen=True)
class Architecture:
    """Where the decoder blocks of a model are, and which of their linears are quantized.

    Attributes:
        blocks: path of the list of decoder blocks.
        linears: paths inside a block, grouped by shared input, in the order in which their inputs arise.
    """

    blocks: str
    linears: tuple[tuple[str, ...], ...]


_LLAMA_LINEARS = (
    ("self_attn.q_proj", "self_attn.k_proj", "self_attn.v_proj"),
    ("self_attn.o_proj",),
    ("mlp.gate_proj", "mlp.up_proj"),
    ("mlp.down_proj",),
)
_LLAMA = Architecture("model.layers", _LLAMA_LINEARS)
ARCHITECTURES: dict[str, Architecture] = {
    "llama": _LLAMA,
    "mistral": _LLAMA,
    "qwen2": _LLAMA,
    "qwen3": _LLAMA,
    "gemma2": _LLAMA,
    "gemma3_text": _LLAMA,
    "opt": Architecture(
        "model.decoder.layers",
        (
            ("self_attn.q_proj", "self_attn.k_proj", "self_attn.v_proj"),
            ("self_attn.out_proj",),
            ("fc1",),
            ("fc2",),
        ),
    ),
}
"""By the ``model_type`` of the Hugging Face config."""


def architecture_of(model: PreTrainedModel) -> Architecture:
    """Look a model up in the table.

    Raises:
        UserError: the architecture is not supported.
    """
    return architecture_from_config(model.config)


def decoder_blocks(model: PreTrainedModel) -> nn.ModuleList:
    """Return the model's list of decoder blocks."""
    blocks = model.get_submodule(architecture_of(model).blocks)
    assert isinstance(blocks, nn.ModuleList)
    return blocks


def quantized_linears(model: PreTrainedModel) -> Iterator[tuple[str, nn.Module]]:
    """Yield ``("{block}.{path}", module)`` for every linear that is, or will be, packed."""
    row = architecture_of(model)
    for i, block in enumerate(decoder_blocks(model)):
        for group in row.linears:
            for path in group:
                yield f"{i}.{path}", block.get_submodule(path)


def check_tokens(model: PreTrainedModel, tokens: Tensor, kind: str, shape: str) -> None:
    """Check that tokens are integers of the model's vocabulary in two dimensions.

    Args:
        model: the model that reads them.
        tokens: ``[n, seq_len]``.
        kind: what the error calls them, such as ``calibration``.
        shape: how the error names the dimensions.

    Raises:
        UserError: the tokens have another shape or dtype, or lie outside the vocabulary.
    """
    if tokens.dim() != 2 or tokens.numel() == 0 or tokens.is_floating_point():
        raise UserError(f"{kind} tokens have shape {list(tokens.shape)}: use integers {shape}.")
    vocabulary = next(model.get_input_embeddings().parameters()).shape[0]
    if int(tokens.min()) < 0 or int(tokens.max()) >= vocabulary:
        raise UserError(f"{kind} tokens lie outside the model's vocabulary of {vocabulary}; use its own tokenizer.")


def check_quantizable(model: PreTrainedModel) -> None:
    """Check that a model can be quantized.

    Raises:
        UserError: its architecture is unknown, it is already quantized, or a weight is NaN or infinite.
    """
    architecture_of(model)
    check_not_quantized(model.config)
    for name, module in quantized_linears(model):
        if not isinstance(module, nn.Linear):
            raise UserError(
                f"the model is already quantized: its linear {name} is a {type(module).__name__}; "
                "use the full-precision model."
            )
    for name, parameter in model.named_parameters():
        if not bool(torch.isfinite(parameter).all()):
            raise UserError(f"the model's weights are NaN or infinite in {name}; use an intact checkpoint.")


def keep_first_blocks(model: PreTrainedModel, n_blocks: int) -> None:
    """Drop all decoder blocks but the first ``n_blocks``, in place."""
    blocks = decoder_blocks(model)
    del blocks[n_blocks:]
    model.config.num_hidden_layers = len(blocks)
    if getattr(model.config, "layer_types", None):
        model.config.layer_types = model.config.layer_types[: len(blocks)]


def max_seq_len(config: PretrainedConfig) -> int:
    """Return the longest sequence that a model takes, in tokens."""
    return int(config.max_position_embeddings)


def config_key(model: PreTrainedModel) -> str:
    """Return the key of a model's own config, without the fields that depend on where it was loaded from."""
    config: dict[str, Any] = json.loads(model.config.to_json_string(use_diff=False))
    content = {key: value for key, value in config.items() if not key.startswith("_")}
    return key_of({**content, "attention": model.config._attn_implementation})


def architecture_from_config(config: PretrainedConfig) -> Architecture:
    """Look a model's config up in the table.

    Raises:
        UserError: the architecture is not supported.
    """
    row = ARCHITECTURES.get(config.model_type)
    if row is None:
        raise UserError(
            f"models of type {config.model_type!r} are not supported; supported are {', '.join(sorted(ARCHITECTURES))}."
        )
    return row


def check_not_quantized(config: PretrainedConfig) -> None:
    """Check that a model's config names no quantization.

    Raises:
        UserError: it names one.
    """
    method = quant_method(config.to_dict())
    if method:
        raise UserError(f"the model is already quantized (by {method}); use the full-precision model.")


def quant_method(config: dict[str, Any]) -> str | None:
    """Return the ``quant_method`` that a model's config names; None where it names none."""
    quantization = config.get("quantization_config") or {}
    if not isinstance(quantization, dict):
        quantization = quantization.to_dict()
    method = quantization.get("quant_method")
    return None if method is None else str(getattr(method, "value", method))
