"""The table of supported architectures, data and no code per model, and lookups in it."""

from __future__ import annotations

import dataclasses
import itertools
import json
from collections.abc import Iterator
from typing import Any

from torch import nn
from transformers import PretrainedConfig, PreTrainedModel

from ptq161.errors import UserError
from ptq161.files.fingerprints import key_of


@dataclasses.dataclass(frozen=True)
class Diffusion:
    """How a masked-diffusion language model predicts tokens: every place sees every other, masked ones are filled in.

    Attributes:
        mask_token: id of the mask token, where the model's config names none (``mask_token_id``).
        shifted: a token is predicted one place before its own, as by the causal model that was trained further.
    """

    mask_token: int
    shifted: bool = False


@dataclasses.dataclass(frozen=True)
class Architecture:
    """Where the decoder blocks of a language model are, and which of their linears are quantized.

    Attributes:
        blocks: path of the list of decoder blocks in the model without its head.
        linears: paths inside a block, grouped by shared input, in the order in which their inputs arise. A ``*``
            stands for each expert of a mixture (:mod:`ptq161.models.experts`). A group that a block lacks is left out:
            some blocks of a mixture are dense.
        diffusion: how a masked-diffusion model is called; None is a causal language model.
        own_code: the model is none of transformers' own, and loading it runs code that comes with it.
        returns_tuple: a block returns a tuple whose first item are the hidden states, and not these alone.
    """

    blocks: str
    linears: tuple[tuple[str, ...], ...]
    diffusion: Diffusion | None = None
    own_code: bool = False
    returns_tuple: bool = False


_ATTENTION = (("self_attn.q_proj", "self_attn.k_proj", "self_attn.v_proj"), ("self_attn.o_proj",))
_MLP = (("mlp.gate_proj", "mlp.up_proj"), ("mlp.down_proj",))
_EXPERTS = (("mlp.experts.*.gate_proj", "mlp.experts.*.up_proj"), ("mlp.experts.*.down_proj",))
_LLAMA = Architecture("layers", _ATTENTION + _MLP)
ARCHITECTURES: dict[str, Architecture] = {
    "llama": _LLAMA,
    "mistral": _LLAMA,
    "qwen2": _LLAMA,
    "qwen3": _LLAMA,
    "gemma2": _LLAMA,
    "gemma3_text": _LLAMA,
    "qwen3_vl_text": _LLAMA,
    "opt": Architecture(
        "decoder.layers",
        (
            ("self_attn.q_proj", "self_attn.k_proj", "self_attn.v_proj"),
            ("self_attn.out_proj",),
            ("fc1",),
            ("fc2",),
        ),
    ),
    "mixtral": Architecture("layers", _ATTENTION + _EXPERTS),
    "qwen3_moe": Architecture("layers", _ATTENTION + _MLP + _EXPERTS),
    # Rows of models whose own code was read, but not run: no test here has their weights.
    "llada": Architecture(
        "transformer.blocks",
        (("q_proj", "k_proj", "v_proj"), ("attn_out",), ("ff_proj", "up_proj"), ("ff_out",)),
        Diffusion(126336),
        own_code=True,
        returns_tuple=True,
    ),
    "Dream": Architecture(
        "layers", _ATTENTION + _MLP, Diffusion(151666, shifted=True), own_code=True, returns_tuple=True
    ),
}
"""By the ``model_type`` of the language model's config."""

LANGUAGE_MODELS: dict[str, str] = {
    "gemma3": "language_model",
    "mistral3": "language_model",
    "qwen3_vl": "language_model",
}
"""Models around a language model, by ``model_type``: path of the language model in the model without its head."""


def architecture_of(model: PreTrainedModel) -> Architecture:
    """Look a model up in the table.

    Raises:
        UserError: the architecture is not supported.
    """
    return architecture_from_config(model.config)


def diffusion_of(config: PretrainedConfig) -> Diffusion | None:
    """Return how a masked-diffusion model is called, with the mask token of its config; None for any other model.

    Example:
        >>> from transformers import LlamaConfig
        >>> diffusion_of(LlamaConfig()) is None
        True
    """
    architecture = ARCHITECTURES.get(config.model_type)
    diffusion = None if architecture is None else architecture.diffusion
    own = getattr(config, "mask_token_id", None)
    return diffusion if diffusion is None or own is None else dataclasses.replace(diffusion, mask_token=int(own))


def blocks_path(model: PreTrainedModel) -> str:
    """Return the module path of the list of decoder blocks, as in ``model.layers``."""
    head = "" if model.base_model is model else model.base_model_prefix
    inside = LANGUAGE_MODELS.get(model.config.model_type, "")
    return ".".join(part for part in (head, inside, architecture_of(model).blocks) if part)


def token_embeddings(model: PreTrainedModel) -> dict[str, nn.Module]:
    """Return the embeddings of the tokens by path, at the model's input and output, tied or not."""
    ends = (model.get_input_embeddings(), model.get_output_embeddings())
    return {name: module for name, module in model.named_modules() if module in ends}


def decoder_blocks(model: PreTrainedModel) -> nn.ModuleList:
    """Return the model's list of decoder blocks."""
    blocks = model.get_submodule(blocks_path(model))
    assert isinstance(blocks, nn.ModuleList)
    return blocks


def input_groups(model: PreTrainedModel, block: nn.Module) -> list[list[str]]:
    """Return the paths of a block's quantized linears, grouped by shared input, in the order in which these arise."""
    groups: list[list[str]] = []
    for each_expert, rows in itertools.groupby(architecture_of(model).linears, lambda group: "*" in group[0]):
        if not each_expert:
            groups += [list(group) for group in rows if _has(block, group[0])]
            continue
        expert_groups = list(rows)
        home = expert_groups[0][0].partition(".*")[0]
        if not _has(block, home):
            continue
        # Experts run one after the other. Those of a fused module are no children of it.
        for expert in (name for name, _ in block.get_submodule(home).named_children() if name.isdigit()):
            groups += [[path.replace("*", expert) for path in group] for group in expert_groups]
    return groups


def quantized_linears(model: PreTrainedModel) -> Iterator[tuple[str, nn.Module]]:
    """Yield ``("{block}.{path}", module)`` for every linear that is, or will be, packed."""
    for i, block in enumerate(decoder_blocks(model)):
        for group in input_groups(model, block):
            for path in group:
                yield f"{i}.{path}", block.get_submodule(path)


def _has(block: nn.Module, path: str) -> bool:
    try:
        block.get_submodule(path)
    except AttributeError:
        return False
    return True


def keep_first_blocks(model: PreTrainedModel, n_blocks: int) -> None:
    """Drop all decoder blocks but the first ``n_blocks``, in place."""
    blocks, config = decoder_blocks(model), model.config.get_text_config()
    del blocks[n_blocks:]
    config.num_hidden_layers = len(blocks)
    if getattr(config, "layer_types", None):
        config.layer_types = config.layer_types[: len(blocks)]


def max_seq_len(config: PretrainedConfig) -> int | None:
    """Return the longest sequence that a model takes, in tokens; None where its config sets no limit."""
    text = config.get_text_config()
    # LLaDA has the second name.
    longest = getattr(text, "max_position_embeddings", None) or getattr(text, "max_sequence_length", None)
    return None if longest is None else int(longest)


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
    supported = sorted({*ARCHITECTURES, *LANGUAGE_MODELS}, key=str.lower)
    language_model = config.get_text_config() if config.model_type in LANGUAGE_MODELS else config
    row = ARCHITECTURES.get(language_model.model_type)
    if row is None:
        raise UserError(
            f"models of type {language_model.model_type!r} are not supported; supported are {', '.join(supported)}."
        )
    return row


def quant_method(config: dict[str, Any]) -> str | None:
    """Return the ``quant_method`` that a model's config names; None where it names none."""
    quantization = config.get("quantization_config") or {}
    if not isinstance(quantization, dict):
        quantization = quantization.to_dict()
    method = quantization.get("quant_method")
    return None if method is None else str(getattr(method, "value", method))
