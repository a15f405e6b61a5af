"""Loading models, and the table of supported architectures: data, not code per model."""

from __future__ import annotations

import dataclasses
import json
import logging
from collections.abc import Iterator
from contextlib import contextmanager, nullcontext
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError
from torch import Tensor, nn
from transformers import (
    AutoConfig,
    AutoModelForCausalLM,
    AutoTokenizer,
    PretrainedConfig,
    PreTrainedModel,
    PreTrainedTokenizerBase,
)
from transformers.utils.hub import cached_file

from ptq161.config import ModelConfig
from ptq161.errors import UserError
from ptq161.gguf import dense_folder
from ptq161.hub import offline_unless_reachable

log = logging.getLogger(__name__)

PACKED_FORMAT = "ptq161"
"""The ``quant_method`` of this project's own checkpoints."""


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
    return _architecture(model.config)


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
        model: that will read them.
        tokens: to be ``[n, seq_len]``.
        kind: what the sentence calls them, such as ``calibration``.
        shape: how it names the dimensions.

    Raises:
        UserError: they are not.
    """
    if tokens.dim() != 2 or tokens.numel() == 0 or tokens.is_floating_point():
        raise UserError(f"{kind} tokens have shape {list(tokens.shape)}: use integers {shape}.")
    vocabulary = next(model.get_input_embeddings().parameters()).shape[0]
    if int(tokens.min()) < 0 or int(tokens.max()) >= vocabulary:
        raise UserError(f"{kind} tokens lie outside the model's vocabulary of {vocabulary}; use its tokenizer.")


def check_quantizable(model: PreTrainedModel) -> None:
    """Check that a model can be quantized.

    Raises:
        UserError: its architecture is unknown, it is already quantized, or a weight is NaN or infinite.
    """
    architecture_of(model)
    _check_not_quantized(model.config)
    for name, module in quantized_linears(model):
        if not isinstance(module, nn.Linear):
            raise UserError(
                f"the model is already quantized: its linear {name} is a {type(module).__name__}; "
                "use the full-precision model."
            )
    for name, parameter in model.named_parameters():
        if not bool(torch.isfinite(parameter).all()):
            raise UserError(f"the model's weights are NaN or infinite in {name}; use an intact checkpoint.")


def is_packed_folder(folder: str | Path) -> bool:
    """Whether ``folder`` is a checkpoint that this project wrote."""
    file = Path(folder) / "config.json"
    return file.is_file() and _quant_method(_read_json(file)) == PACKED_FORMAT


def load_model(config: ModelConfig) -> tuple[PreTrainedModel, PreTrainedTokenizerBase]:
    """Load a full-precision model, in its checkpoint's own dtype, and its tokenizer.

    Raises:
        UserError: see :func:`load_tokenizer` and :func:`load_weights`.
    """
    tokenizer, _ = load_tokenizer(config)
    return load_weights(config), tokenizer


def load_tokenizer(config: ModelConfig) -> tuple[PreTrainedTokenizerBase, PretrainedConfig]:
    """Load what tells most of a model without its weights: its tokenizer and its own config.

    Raises:
        UserError: the folder is missing or not a model, the hub cannot be reached, the architecture is not supported
            or the model is already quantized.
    """
    source, kwargs = _source(config)
    with _loading(config):
        hf_config = AutoConfig.from_pretrained(source, **kwargs)
        _architecture(hf_config)
        _check_not_quantized(hf_config)
        return AutoTokenizer.from_pretrained(source, **kwargs), hf_config


def hub_commit(config: ModelConfig) -> str:
    """Return the commit that a model's name and revision on the hub stand for, here and now.

    Raises:
        UserError: the hub cannot be reached and the model is not in its cache.
    """
    source, kwargs = _source(config)
    with _loading(config):
        file = cached_file(source, "config.json", **kwargs)
    assert file is not None  # which says that it is there
    return Path(file).parent.name  # the hub's cache has a folder for each commit


def load_weights(config: ModelConfig) -> PreTrainedModel:
    """Load a full-precision model, in its checkpoint's own dtype, cut to ``config.n_blocks``.

    Raises:
        UserError: the weights are not there, cannot be read, or are not all there.
    """
    source, kwargs = _source(config)
    with _loading(config):
        loaded: Any = AutoModelForCausalLM.from_pretrained(
            source, dtype="auto", output_loading_info=True, ignore_mismatched_sizes=True, **kwargs
        )
        model: PreTrainedModel = loaded[0]
        loading: dict[str, Any] = loaded[1]
        # transformers would go on with random weights.
        wrong = sorted(loading["missing_keys"]) + [key for key, *_ in sorted(loading["mismatched_keys"])]
        if wrong:
            raise ValueError(f"tensor {wrong[0]} is missing in its weights or has another shape than its config says")
    model.eval()
    model.config.use_cache = False
    if config.n_blocks is not None:
        keep_first_blocks(model, config.n_blocks)
    return model


def keep_first_blocks(model: PreTrainedModel, n_blocks: int) -> None:
    """Drop all decoder blocks but the first ``n_blocks``, in place."""
    blocks = decoder_blocks(model)
    del blocks[n_blocks:]
    model.config.num_hidden_layers = len(blocks)
    if getattr(model.config, "layer_types", None):
        model.config.layer_types = model.config.layer_types[: len(blocks)]


def max_seq_len(config: PretrainedConfig) -> int:
    """Tokens that a model can hold, by its own config."""
    return int(config.max_position_embeddings)


def _source(config: ModelConfig) -> tuple[str, dict[str, Any]]:
    if config.path:
        path = Path(config.path)
        if not (path / "config.json").is_file():
            raise UserError(f"model.path={config.path}: no Hugging Face model (config.json) is there.")
        return str(path), {"local_files_only": True}
    if config.asset:
        return str(dense_folder(config.asset)), {"local_files_only": True}
    assert config.repo is not None
    return config.repo, {"revision": config.revision} if config.revision else {}


@contextmanager
def _loading(config: ModelConfig) -> Iterator[None]:
    """Turn what loading raises into one sentence, at once where the hub is needed and cannot be reached."""
    hub = offline_unless_reachable() if config.repo and not (config.path or config.asset) else nullcontext()
    try:
        with hub:
            yield
    except (OSError, ValueError, SafetensorError) as error:
        raise UserError(_cannot_load(config, error)) from error


def _cannot_load(config: ModelConfig, error: Exception) -> str:
    reason = str(error).strip().splitlines()[0].rstrip(".")
    if config.path or config.asset:
        return f"model {config.path or config.asset} cannot be loaded: {reason}."
    return (
        f"model {config.repo} cannot be loaded from the Hugging Face hub ({reason}); "
        "use model=smollm2_135m, or model.path=FOLDER for a local copy."
    )


def _architecture(config: PretrainedConfig) -> Architecture:
    row = ARCHITECTURES.get(config.model_type)
    if row is None:
        raise UserError(
            f"models of type {config.model_type!r} are not supported; supported are {', '.join(sorted(ARCHITECTURES))}."
        )
    return row


def _check_not_quantized(config: PretrainedConfig) -> None:
    method = _quant_method(config.to_dict())
    if method:
        raise UserError(f"the model is already quantized (by {method}); use the full-precision model.")


def _quant_method(config: dict[str, Any]) -> str | None:
    quantization = config.get("quantization_config") or {}
    if not isinstance(quantization, dict):
        quantization = quantization.to_dict()
    method = quantization.get("quant_method")
    return None if method is None else str(getattr(method, "value", method))


def _read_json(file: Path) -> dict[str, Any]:
    try:
        content = json.loads(file.read_text(encoding="utf-8"))
    except (OSError, ValueError) as error:  # not JSON, not UTF-8
        raise UserError(f"{file} is not readable JSON: {error}.") from error
    if not isinstance(content, dict):
        raise UserError(f"{file} is not a model's configuration: it holds no JSON object.")
    return content
