"""Checkpoints of packed models: ``config.json``, the tokenizer and one safetensors file.

The file is called ``packed.safetensors`` so that transformers, which would build random layers from an unknown
quantization method, says that it finds no weights instead.
"""

from __future__ import annotations

import dataclasses
import json
from pathlib import Path
from typing import Any

import torch
from accelerate import init_empty_weights
from safetensors import SafetensorError
from safetensors.torch import load_file, save_file
from torch import Tensor, nn
from transformers import AutoConfig, AutoModelForCausalLM, AutoTokenizer, PreTrainedModel, PreTrainedTokenizerBase

from ptq161.errors import UserError
from ptq161.files.fingerprints import key_of
from ptq161.files.hashing import sha256_of_tensors
from ptq161.models.loading import PACKED_FORMAT, is_packed_folder
from ptq161.packed.linear import PackedLinear
from ptq161.packed.weight import packed_weight_from

WEIGHTS_FILE = "packed.safetensors"
"""Name of the file of tensors in a checkpoint folder."""

_SCHEMA_VERSION = 1


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
    """Return the model's packed linears by module path.

    Example:
        >>> from ptq161.packed.uniform import UniformWeight
        >>> packed = UniformWeight.pack(torch.tensor([[0, 1]]), torch.ones(1, 1), torch.zeros(1, 1), bits=2)
        >>> model = nn.Sequential(PackedLinear(packed), nn.Linear(1, 4))
        >>> list(packed_linears(model))
        ['0']
    """
    return {name: module for name, module in model.named_modules() if isinstance(module, PackedLinear)}


def measure(model: PreTrainedModel) -> PackedSize:
    """Count the bytes of a packed model.

    Example:
        >>> import ptq161
        >>> from ptq161.methods.rtn import RTN
        >>> from transformers import LlamaConfig, LlamaForCausalLM
        >>> sizes = {"vocab_size": 8, "hidden_size": 8, "intermediate_size": 8, "num_attention_heads": 1}
        >>> model = LlamaForCausalLM(LlamaConfig(num_hidden_layers=1, **sizes))
        >>> model = ptq161.quantize(model, torch.zeros(1, 2, dtype=torch.long), RTN(bits=2))
        >>> measure(model)  # 7 linears of 8 rows: 2 bytes of codes, 2 of the scale, 2 of the zero point
        PackedSize(linear_bytes=336, linear_weights=448, other_bytes=608)
    """
    layers = packed_linears(model).values()
    linear_bytes = sum(layer.packed.nbytes for layer in layers)
    total = sum(t.numel() * t.element_size() for t in _stored_tensors(model).values())
    weights = sum(layer.out_features * layer.in_features for layer in layers)
    return PackedSize(linear_bytes, weights, total - linear_bytes)


def sha256_of_packed(model: PreTrainedModel) -> str:
    """Hash a packed model: its tensors, and how those of its packed linears are to be read.

    Example:
        >>> import ptq161
        >>> from ptq161.methods.rtn import RTN
        >>> from transformers import LlamaConfig, LlamaForCausalLM
        >>> sizes = {"vocab_size": 8, "hidden_size": 8, "intermediate_size": 8, "num_attention_heads": 1}
        >>> model = LlamaForCausalLM(LlamaConfig(num_hidden_layers=1, **sizes))
        >>> model = ptq161.quantize(model, torch.zeros(1, 2, dtype=torch.long), RTN(bits=2))
        >>> before = sha256_of_packed(model)
        >>> model.model.layers[0].mlp.up_proj.codes[0, 0] ^= 1  # one bit
        >>> sha256_of_packed(model) == before
        False
    """
    settings = {name: layer.packed.settings() for name, layer in packed_linears(model).items()}
    return key_of({"tensors": sha256_of_tensors(model.state_dict()), "linears": settings})


def cast_rest(model: PreTrainedModel, dtype: torch.dtype) -> None:
    """Cast all that is stored but the packed tensors to ``dtype``, in place: what is evaluated is what is stored.

    Buffers that are not stored (rotary frequencies) keep their precision, which a loaded model gives them too.

    Example:
        >>> import ptq161
        >>> from ptq161.methods.rtn import RTN
        >>> from transformers import LlamaConfig, LlamaForCausalLM
        >>> sizes = {"vocab_size": 8, "hidden_size": 8, "intermediate_size": 8, "num_attention_heads": 1}
        >>> model = LlamaForCausalLM(LlamaConfig(num_hidden_layers=1, **sizes))
        >>> model = ptq161.quantize(model, torch.zeros(1, 2, dtype=torch.long), RTN(bits=2))
        >>> cast_rest(model, torch.bfloat16)
        >>> model.lm_head.weight.dtype, model.model.layers[0].mlp.up_proj.scales.dtype
        (torch.bfloat16, torch.float16)
    """
    for module in model.modules():
        for parameter in module.parameters(recurse=False):
            parameter.data = parameter.data.to(dtype)
        if isinstance(module, PackedLinear):
            continue
        for name, buffer in module.named_buffers(recurse=False):
            if buffer.is_floating_point() and name not in module._non_persistent_buffers_set:
                setattr(module, name, buffer.to(dtype))
    model.config.dtype = dtype


def save(
    model: PreTrainedModel,
    tokenizer: PreTrainedTokenizerBase | None,
    folder: str | Path,
    *,
    nominal_bits: float | None = None,
) -> Path:
    """Write a packed model as a checkpoint folder.

    Args:
        model: a model whose linears are packed.
        tokenizer: saved beside it; None saves none.
        folder: created where missing.
        nominal_bits: bits per weight as the method's paper counts them, to be stored beside what is measured.

    Returns:
        the safetensors file.

    Raises:
        UserError: the model is not packed, or the folder cannot be written.

    Example:
        >>> import tempfile
        >>> import ptq161
        >>> from ptq161.methods.rtn import RTN
        >>> from transformers import LlamaConfig, LlamaForCausalLM
        >>> sizes = {"vocab_size": 8, "hidden_size": 8, "intermediate_size": 8, "num_attention_heads": 1}
        >>> model = LlamaForCausalLM(LlamaConfig(num_hidden_layers=1, **sizes))
        >>> model = ptq161.quantize(model, torch.zeros(1, 2, dtype=torch.long), RTN(bits=2))
        >>> with tempfile.TemporaryDirectory() as folder:
        ...     file = save(model, None, folder)
        ...     tensors = load_file(file)
        >>> file.name, tensors["model.layers.0.mlp.up_proj.codes"].dtype
        ('packed.safetensors', torch.uint8)
    """
    layers = packed_linears(model)
    if not layers:
        raise UserError("the model has no packed linears to save; quantize it first.")
    config: dict[str, Any] = json.loads(model.config.to_json_string(use_diff=False))
    config["quantization_config"] = {
        "quant_method": PACKED_FORMAT,
        "schema_version": _SCHEMA_VERSION,
        "nominal_bits_per_weight": nominal_bits,
        "linears": {name: layer.packed.settings() for name, layer in layers.items()},
    }
    folder = Path(folder)
    file = folder / WEIGHTS_FILE
    tensors = {name: tensor.detach().cpu().contiguous() for name, tensor in _stored_tensors(model).items()}
    try:
        folder.mkdir(parents=True, exist_ok=True)
        file.unlink(missing_ok=True)  # another record may share the file that is there
        save_file(tensors, file, metadata={"format": "pt"})
        (folder / "config.json").write_text(json.dumps(config, indent=1, sort_keys=True) + "\n", encoding="utf-8")
        if tokenizer is not None:
            tokenizer.save_pretrained(folder)
    except (OSError, SafetensorError) as error:
        raise UserError(f"the checkpoint cannot be written to {folder}: {error}.") from error
    return file


def load(folder: str | Path) -> tuple[PreTrainedModel, PreTrainedTokenizerBase]:
    """Load a checkpoint written by :func:`save`: the packed model and its tokenizer.

    Raises:
        UserError: the folder is not such a checkpoint, or is damaged.

    Example:
        >>> import tempfile
        >>> import ptq161
        >>> from ptq161.methods.rtn import RTN
        >>> from transformers import LlamaConfig, LlamaForCausalLM
        >>> sizes = {"vocab_size": 8, "hidden_size": 8, "intermediate_size": 8, "num_attention_heads": 1}
        >>> model = LlamaForCausalLM(LlamaConfig(num_hidden_layers=1, **sizes))
        >>> model = ptq161.quantize(model, torch.zeros(1, 2, dtype=torch.long), RTN(bits=2))
        >>> from tokenizers import Tokenizer, models
        >>> from transformers import PreTrainedTokenizerFast
        >>> tokenizer = PreTrainedTokenizerFast(tokenizer_object=Tokenizer(models.WordLevel({"a": 0}, unk_token="a")))
        >>> with tempfile.TemporaryDirectory() as folder:
        ...     file = save(model, tokenizer, folder)
        ...     loaded, _ = load(folder)
        >>> sha256_of_packed(loaded) == sha256_of_packed(model)
        True
    """
    folder = Path(folder)
    if not is_packed_folder(folder):
        raise UserError(f"{folder}: no packed checkpoint (config.json with quant_method={PACKED_FORMAT}) is there.")
    raw = json.loads((folder / "config.json").read_text(encoding="utf-8"))
    quantization = raw.pop("quantization_config")
    layout = quantization.get("schema_version")
    if layout != _SCHEMA_VERSION:
        raise UserError(f"{folder} has checkpoint layout {layout}; this version reads {_SCHEMA_VERSION}.")
    try:
        tensors = load_file(folder / WEIGHTS_FILE)
    except (OSError, SafetensorError) as error:
        raise UserError(f"{folder / WEIGHTS_FILE} cannot be read: {error}.") from error
    hf_config = AutoConfig.for_model(**raw)
    # Only parameters are left empty: a non-persistent buffer would come back uninitialized.
    with init_empty_weights(include_buffers=False):
        model = AutoModelForCausalLM.from_config(hf_config)
    _install_packed(model, quantization["linears"], tensors)
    _assign_rest(model, tensors, folder)
    model.eval()
    try:
        return model, AutoTokenizer.from_pretrained(folder)
    except (OSError, ValueError) as error:
        raise UserError(f"{folder} has no usable tokenizer: save the model with its tokenizer.") from error


def stored_nominal_bits(folder: str | Path) -> float | None:
    """Return the nominal bits per weight with which a checkpoint was saved; None where it was saved without.

    Example:
        >>> import tempfile
        >>> import ptq161
        >>> from ptq161.methods.rtn import RTN
        >>> from transformers import LlamaConfig, LlamaForCausalLM
        >>> sizes = {"vocab_size": 8, "hidden_size": 8, "intermediate_size": 8, "num_attention_heads": 1}
        >>> model = LlamaForCausalLM(LlamaConfig(num_hidden_layers=1, **sizes))
        >>> model = ptq161.quantize(model, torch.zeros(1, 2, dtype=torch.long), RTN(bits=2))
        >>> with tempfile.TemporaryDirectory() as folder:
        ...     file = save(model, None, folder, nominal_bits=RTN(bits=2).nominal_bits())
        ...     stored_nominal_bits(folder)
        2.0
    """
    config = json.loads((Path(folder) / "config.json").read_text(encoding="utf-8"))
    bits: float | None = config["quantization_config"].get("nominal_bits_per_weight")
    return bits


def export(folder: str | Path, out: str | Path) -> Path:
    """Write a packed checkpoint as a plain dense Hugging Face folder.

    The dense weights are what the packed bytes dequantize to, in the dtype of the model's other tensors.

    Args:
        folder: a checkpoint written by :func:`save`.
        out: the folder to write.

    Returns:
        ``out`` as a path.

    Raises:
        UserError: ``folder`` is not a packed checkpoint, or ``out`` cannot be written.

    Example:
        >>> import tempfile
        >>> import ptq161
        >>> from ptq161.methods.rtn import RTN
        >>> from transformers import LlamaConfig, LlamaForCausalLM
        >>> sizes = {"vocab_size": 8, "hidden_size": 8, "intermediate_size": 8, "num_attention_heads": 1}
        >>> model = LlamaForCausalLM(LlamaConfig(num_hidden_layers=1, **sizes))
        >>> model = ptq161.quantize(model, torch.zeros(1, 2, dtype=torch.long), RTN(bits=2))
        >>> from tokenizers import Tokenizer, models
        >>> from transformers import PreTrainedTokenizerFast
        >>> tokenizer = PreTrainedTokenizerFast(tokenizer_object=Tokenizer(models.WordLevel({"a": 0}, unk_token="a")))
        >>> with tempfile.TemporaryDirectory() as folder:
        ...     file = save(model, tokenizer, folder)
        ...     dense = AutoModelForCausalLM.from_pretrained(export(folder, Path(folder) / "dense"))
        >>> torch.equal(dense.lm_head.weight, model.lm_head.weight), len(packed_linears(dense))
        (True, 0)
    """
    model, tokenizer = load(folder)
    densify(model)
    save_dense(model, tokenizer, out)
    return Path(out)


def save_dense(model: PreTrainedModel, tokenizer: PreTrainedTokenizerBase, out: str | Path) -> None:
    """Write a dense model and its tokenizer as a plain Hugging Face folder.

    Raises:
        UserError: ``out`` cannot be written.

    Example:
        >>> import tempfile
        >>> from transformers import LlamaConfig, LlamaForCausalLM
        >>> sizes = {"vocab_size": 8, "hidden_size": 8, "intermediate_size": 8, "num_attention_heads": 1}
        >>> model = LlamaForCausalLM(LlamaConfig(num_hidden_layers=1, **sizes))
        >>> from tokenizers import Tokenizer, models
        >>> from transformers import PreTrainedTokenizerFast
        >>> tokenizer = PreTrainedTokenizerFast(tokenizer_object=Tokenizer(models.WordLevel({"a": 0}, unk_token="a")))
        >>> with tempfile.TemporaryDirectory() as folder:
        ...     save_dense(model, tokenizer, folder)
        ...     (Path(folder) / "model.safetensors").exists()
        True
    """
    try:
        for file in Path(out).glob("*.safetensors"):
            file.unlink()  # another record may share it
        model.save_pretrained(out)
        tokenizer.save_pretrained(out)
    except OSError as error:
        raise UserError(f"the dense model cannot be written to {out}: {error}.") from error


def densify(model: PreTrainedModel) -> None:
    """Replace every packed linear by the ``nn.Linear`` of its dequantized weight, in place.

    Example:
        >>> import ptq161
        >>> from ptq161.methods.rtn import RTN
        >>> from transformers import LlamaConfig, LlamaForCausalLM
        >>> sizes = {"vocab_size": 8, "hidden_size": 8, "intermediate_size": 8, "num_attention_heads": 1}
        >>> model = LlamaForCausalLM(LlamaConfig(num_hidden_layers=1, **sizes))
        >>> model = ptq161.quantize(model, torch.zeros(1, 2, dtype=torch.long), RTN(bits=2))
        >>> values = model.model.layers[0].mlp.up_proj.dequantize()
        >>> densify(model)
        >>> torch.equal(model.model.layers[0].mlp.up_proj.weight, values)
        True
    """
    dtype = next(model.get_input_embeddings().parameters()).dtype
    for name, layer in packed_linears(model).items():
        dense = nn.Linear(layer.in_features, layer.out_features, bias=layer.bias is not None, device="meta")
        dense.weight = nn.Parameter(layer.dequantize().to(dtype))
        dense.register_parameter("bias", layer.bias)
        model.set_submodule(name, dense)


def _stored_tensors(model: PreTrainedModel) -> dict[str, Tensor]:
    """Return the state dict without tensors that are tied to another one."""
    stored: dict[str, Tensor] = {}
    seen: set[int] = set()
    for name, tensor in model.state_dict().items():
        if tensor.numel() and tensor.data_ptr() in seen:
            continue
        seen.add(tensor.data_ptr())
        stored[name] = tensor
    return stored


def _install_packed(model: PreTrainedModel, linears: dict[str, dict[str, Any]], tensors: dict[str, Tensor]) -> None:
    for name, settings in linears.items():
        prefix = f"{name}."
        mine = {key.removeprefix(prefix): tensors.pop(key) for key in list(tensors) if key.startswith(prefix)}
        bias = mine.pop("bias", None)
        if (bias is None) != (model.get_submodule(name).bias is None):
            raise UserError(f"the checkpoint is damaged: tensor {name}.bias is missing or not of this model.")
        model.set_submodule(name, PackedLinear(packed_weight_from(settings, mine), bias))


def _assign_rest(model: PreTrainedModel, tensors: dict[str, Tensor], folder: Path) -> None:
    try:
        result = model.load_state_dict(tensors, strict=False, assign=True)
    except RuntimeError as error:  # a shape is wrong; the last line names the tensor
        raise UserError(f"{folder} is damaged: {str(error).splitlines()[-1].strip().rstrip('.')}.") from error
    model.tie_weights()
    empty = [name for name, parameter in model.named_parameters() if parameter.is_meta]
    if result.unexpected_keys or empty:
        wrong = (list(result.unexpected_keys) + empty)[0]
        raise UserError(f"{folder} is damaged: tensor {wrong} is missing or not of this model.")
