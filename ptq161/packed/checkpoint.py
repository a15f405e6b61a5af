"""Checkpoints of packed models: ``config.json``, generation settings, the tokenizer, one safetensors file, checksums.

The file is called ``packed.safetensors`` so that transformers, which would build random layers from an unknown
quantization method, says that it finds no weights instead.
"""

from __future__ import annotations

import json
from pathlib import Path
from types import MethodType
from typing import Any

import torch
import transformers
from accelerate import init_empty_weights
from safetensors import SafetensorError, safe_open
from safetensors.torch import load_file, save_file
from torch import Tensor
from transformers import (
    CONFIG_MAPPING,
    AutoConfig,
    AutoTokenizer,
    GenerationConfig,
    PreTrainedModel,
    PreTrainedTokenizerBase,
)
from transformers.utils.hub import convert_file_size_to_int

from ptq161.errors import UserError
from ptq161.files.reading import reading
from ptq161.models.architectures import ARCHITECTURES
from ptq161.models.experts import split_experts
from ptq161.models.loading import is_packed_folder
from ptq161.models.settings import PACKED_FORMAT
from ptq161.numerics import plain_torch
from ptq161.packed.embedding import install_embeddings
from ptq161.packed.layout import (
    ADVICE_AGAIN,
    GENERATION_FILE,
    TENSOR_METADATA,
    WEIGHTS_FILE,
    check_layout,
    checkpoint_folder,
    write_around,
)
from ptq161.packed.lenders import link_lenders, packed_weights_from
from ptq161.packed.linear import PackedLinear
from ptq161.packed.model import dequantize, packed_linears, stored_tensors, tensor_bytes
from ptq161.packed.weight import packed_weight_from


def save(
    model: PreTrainedModel,
    tokenizer: PreTrainedTokenizerBase | None,
    folder: str | Path,
    *,
    nominal_bits: float | None = None,
    overwrite: bool = False,
) -> Path:
    """Write a packed model as a checkpoint folder.

    Args:
        model: a model whose linears are packed.
        tokenizer: saved beside it; None saves none.
        folder: absent or empty, and there with all of its files or left as it was.
        nominal_bits: bits per weight as the method's paper counts them, to be stored beside what is measured.
        overwrite: replace a folder that this project wrote.

    Returns:
        the safetensors file.

    Raises:
        UserError: the model is not packed, or the folder holds files or cannot be written.

    Example:
        >>> import tempfile
        >>> import ptq161, torch
        >>> from transformers import LlamaConfig, LlamaForCausalLM
        >>> sizes = {"vocab_size": 8, "hidden_size": 8, "intermediate_size": 8, "num_attention_heads": 1}
        >>> model = LlamaForCausalLM(LlamaConfig(num_hidden_layers=1, **sizes))
        >>> model = ptq161.quantize(model, torch.zeros(1, 2, dtype=torch.long), ptq161.RTN(bits=2))
        >>> with tempfile.TemporaryDirectory() as folder:
        ...     file = save(model, None, folder)
        ...     tensors = load_file(file)
        >>> file.name, tensors["model.layers.0.mlp.up_proj.codes"].dtype
        ('packed.safetensors', torch.uint8)
    """
    if not packed_linears(model):
        raise UserError("the model has no packed linears to save; quantize it first.")
    host = {name: tensor.detach().cpu().contiguous() for name, tensor in stored_tensors(model).items()}
    with checkpoint_folder(folder, overwrite=overwrite) as scratch:
        save_file(host, scratch / WEIGHTS_FILE, metadata=TENSOR_METADATA)
        write_around(model, tokenizer, scratch, nominal_bits)
    return Path(folder).expanduser() / WEIGHTS_FILE


def load(folder: str | Path) -> tuple[PreTrainedModel, PreTrainedTokenizerBase]:
    """Load a checkpoint written by :func:`save`: the packed model and its tokenizer.

    Every file is checked against the folder's ``SHA256SUMS``; checkpoints of earlier versions have none.

    Raises:
        UserError: the folder is not such a checkpoint, or is damaged.

    Example:
        >>> import tempfile
        >>> import ptq161, torch
        >>> from transformers import LlamaConfig, LlamaForCausalLM
        >>> sizes = {"vocab_size": 8, "hidden_size": 8, "intermediate_size": 8, "num_attention_heads": 1}
        >>> model = LlamaForCausalLM(LlamaConfig(num_hidden_layers=1, **sizes))
        >>> model = ptq161.quantize(model, torch.zeros(1, 2, dtype=torch.long), ptq161.RTN(bits=2))
        >>> from tokenizers import Tokenizer, models
        >>> from transformers import PreTrainedTokenizerFast
        >>> tokenizer = PreTrainedTokenizerFast(tokenizer_object=Tokenizer(models.WordLevel({"a": 0}, unk_token="a")))
        >>> with tempfile.TemporaryDirectory() as folder:
        ...     file = save(model, tokenizer, folder)
        ...     loaded, _ = load(folder)
        >>> up_proj = [m.model.layers[0].mlp.up_proj.dequantize() for m in (model, loaded)]
        >>> torch.equal(*up_proj)
        True
    """
    folder = Path(folder).expanduser()
    with reading(folder, ADVICE_AGAIN):
        if not is_packed_folder(folder):
            raise UserError(f"{folder}: no packed checkpoint (config.json with quant_method={PACKED_FORMAT}) is there.")
        model = _load_model(folder)
        try:
            return model, AutoTokenizer.from_pretrained(folder, trust_remote_code=False)
        except (OSError, ValueError) as error:
            raise UserError(f"{folder} has no usable tokenizer: save the model with its tokenizer.") from error


def _load_model(folder: Path) -> PreTrainedModel:
    raw = json.loads((folder / "config.json").read_text(encoding="utf-8"))
    quantization = raw.pop("quantization_config")
    check_layout(folder, quantization.get("schema_version"))
    try:
        tensors = load_file(folder / WEIGHTS_FILE)
    except (OSError, SafetensorError) as error:
        raise UserError(f"{folder / WEIGHTS_FILE} cannot be read: {error}.") from error
    # Only parameters are left empty: a non-persistent buffer would come back uninitialized.
    with plain_torch(), init_empty_weights(include_buffers=False):
        model = _empty_model(raw)
        split_experts(model)
    _install_packed(model, quantization["linears"], quantization.get("embeddings", {}), tensors)
    _assign_rest(model, tensors, folder)
    if (folder / GENERATION_FILE).is_file():
        model.generation_config = GenerationConfig.from_pretrained(folder)
    own_methods(model)
    model.eval()
    return model


def install_empty(
    model: PreTrainedModel, linears: dict[str, dict[str, Any]], embeddings: dict[str, dict[str, Any]], file: Path
) -> None:
    """Put packed weights without values into a model without values, for tensors that are loaded by name afterwards.

    Args:
        model: on the meta device; changed in place.
        linears: settings of each packed linear, by module path.
        embeddings: settings of each packed embedding, by module path; empty where they are dense.
        file: of the tensors, from which shapes and dtypes are read.

    Raises:
        UserError: the file is not one of this model's tensors.

    Example:
        >>> import tempfile
        >>> import ptq161
        >>> from transformers import LlamaConfig, LlamaForCausalLM
        >>> sizes = {"vocab_size": 8, "hidden_size": 8, "intermediate_size": 8, "num_attention_heads": 1}
        >>> config = LlamaConfig(num_hidden_layers=1, **sizes)
        >>> tokens = torch.zeros(1, 2, dtype=torch.long)
        >>> model = ptq161.quantize(LlamaForCausalLM(config), tokens, ptq161.RTN(bits=2))
        >>> with torch.device("meta"):
        ...     empty = LlamaForCausalLM(config)
        >>> with tempfile.TemporaryDirectory() as folder:
        ...     linears = {name: layer.packed.settings() for name, layer in packed_linears(model).items()}
        ...     install_empty(empty, linears, {}, save(model, None, folder))
        >>> empty.model.layers[0].mlp.up_proj.codes.device.type
        'meta'
    """
    with safe_open(file, framework="pt") as opened:
        slices = {name: opened.get_slice(name) for name in opened.keys()}  # noqa: SIM118  # no mapping
        empty = {
            name: torch.empty(part.get_shape(), dtype=part[:0].dtype, device="meta") for name, part in slices.items()
        }
    stored = set(empty)
    split_experts(model)
    _install_packed(model, linears, embeddings, empty)
    wrong = (set(model.state_dict()) - set(model.all_tied_weights_keys)) ^ stored
    if wrong:
        raise UserError(f"{file.parent} is damaged: tensor {min(wrong)} is missing or not of this model.")


def _empty_model(raw: dict[str, Any]) -> PreTrainedModel:
    """Make a model of the class that was saved, with or without a head, from its config."""
    if raw["model_type"] not in CONFIG_MAPPING and raw["model_type"] in ARCHITECTURES:
        raise UserError(
            f"the checkpoint holds a {raw['model_type']} model, which is none of transformers' own: its config and "
            "classes have to be registered with transformers first."
        )
    config = AutoConfig.for_model(**raw)
    name = (config.architectures or [""])[0]
    model_class: Any = getattr(transformers, name, None)
    if getattr(model_class, "config_class", None) is not type(config):
        raise UserError(f"the checkpoint is damaged: config.json names no {raw['model_type']} model of transformers.")
    model: PreTrainedModel = model_class._from_config(config)
    return model


def own_methods(model: PreTrainedModel) -> None:
    """Let a packed model's own ``save_pretrained`` write a checkpoint, and its ``dequantize`` make it dense.

    transformers' would write linears that come back as random ones, and refuse a model that it has not opened itself.

    Example:
        >>> import tempfile
        >>> import ptq161, torch
        >>> from transformers import LlamaConfig, LlamaForCausalLM
        >>> sizes = {"vocab_size": 8, "hidden_size": 8, "intermediate_size": 8, "num_attention_heads": 1}
        >>> model = LlamaForCausalLM(LlamaConfig(num_hidden_layers=1, **sizes))
        >>> model = ptq161.quantize(model, torch.zeros(1, 2, dtype=torch.long), ptq161.RTN(bits=2))
        >>> with tempfile.TemporaryDirectory() as place:
        ...     model.save_pretrained(place)
        ...     is_packed_folder(place)
        True
        >>> type(model.dequantize().model.layers[0].mlp.up_proj).__name__
        'Linear'
    """
    model.save_pretrained = MethodType(_save_pretrained, model)  # type: ignore[method-assign]  # of this model alone
    if getattr(model, "hf_quantizer", None) is None:
        model.dequantize = MethodType(dequantize, model)  # type: ignore[method-assign]  # of this model alone


def _save_pretrained(
    model: PreTrainedModel, save_directory: str | Path, *, max_shard_size: int | str | None = None, **settings: Any
) -> None:
    size = tensor_bytes(stored_tensors(model).values())
    if max_shard_size is not None and size > convert_file_size_to_int(max_shard_size):
        raise UserError(f"save_pretrained(max_shard_size={max_shard_size}): a packed model is one file, {size} bytes.")
    if given := [name for name, value in settings.items() if value not in (None, False)]:
        raise UserError(f"save_pretrained({given[0]}=...): a packed model is one file; use ptq161.save(...).")
    save(model, None, save_directory)


def _install_packed(
    model: PreTrainedModel,
    linears: dict[str, dict[str, Any]],
    embeddings: dict[str, dict[str, Any]],
    tensors: dict[str, Tensor],
) -> None:
    taken = {name: _taken(name, tensors) for name in linears}
    biases = {name: mine.pop("bias", None) for name, mine in taken.items()}
    for name, weight in packed_weights_from(linears, taken).items():
        bias = biases[name]
        if (bias is None) != (model.get_submodule(name).bias is None):
            raise UserError(f"the checkpoint is damaged: tensor {name}.bias is missing or not of this model.")
        model.set_submodule(name, PackedLinear(weight, bias))
    link_lenders(model)
    packed = {name: packed_weight_from(settings, _taken(name, tensors)) for name, settings in embeddings.items()}
    if packed:
        install_embeddings(model, packed)


def _taken(name: str, tensors: dict[str, Tensor]) -> dict[str, Tensor]:
    """Take the tensors of a module out of all."""
    prefix = f"{name}."
    return {key.removeprefix(prefix): tensors.pop(key) for key in list(tensors) if key.startswith(prefix)}


def _assign_rest(model: PreTrainedModel, tensors: dict[str, Tensor], folder: Path) -> None:
    try:
        result = model.load_state_dict(tensors, strict=False, assign=True)
    except RuntimeError as error:  # a shape is wrong; the last line names the tensor
        raise UserError(f"{folder} is damaged: {str(error).splitlines()[-1].strip().rstrip('.')}.") from error
    model.tie_weights(recompute_mapping=False)
    empty = [name for name, parameter in model.named_parameters() if parameter.is_meta]
    if result.unexpected_keys or empty:
        wrong = (list(result.unexpected_keys) + empty)[0]
        raise UserError(f"{folder} is damaged: tensor {wrong} is missing or not of this model.")
