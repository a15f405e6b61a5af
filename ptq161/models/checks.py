"""What a caller hands over, a model and tokens: taken as other libraries give them, or refused with one sentence."""

from __future__ import annotations

import os
from collections.abc import Iterable, Iterator, Mapping
from contextlib import contextmanager
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn
from torch.nn.utils import parametrize
from transformers import PretrainedConfig, PreTrainedModel

from ptq161.errors import UserError
from ptq161.models.architectures import architecture_of, blocks_path, diffusion_of, quant_method, quantized_linears

HOOKS = ("_forward_hooks", "_forward_pre_hooks", "_backward_hooks", "_backward_pre_hooks")
"""Attributes of a module that hold the functions that hang on it."""

_CAUSAL = {
    "eval.tasks": "scores continuations by a causal likelihood: set eval.tasks=[]",
    "preprocess": "trains on the next token: set preprocess=none",
    "finetune": "distils on text without masks: set finetune=none",
}
_WEIGHT_DTYPES = (torch.float32, torch.float16, torch.bfloat16, torch.float64)


def check_model(model: object) -> PreTrainedModel:
    """Check that an object is a transformers model of a supported architecture itself, and not something around one.

    Raises:
        UserError: it is a wrapper, a folder, or carries an adapter; its weights are not in memory; its architecture is
            not supported.

    Example:
        >>> check_model("checkpoints/llama")
        Traceback (most recent call last):
            ...
        ptq161.errors.UserError: 'checkpoints/llama' is no model: load it first, with transformers' from_pretrained.
    """
    if not isinstance(model, PreTrainedModel):
        raise UserError(_not_a_model(model))
    architecture_of(model)
    for name, module in model.named_modules():
        if hasattr(module, "_hf_hook"):
            raise UserError(
                f"the model is spread over devices (accelerate's hook on {name or 'the model'}): load it without "
                "device_map; ptq161.quantize(..., device=...) works on a GPU window by window."
            )
        if name and hasattr(module, "base_layer"):
            raise UserError(
                f"the model carries an adapter (a {type(module).__name__} at {name}): merge it first, "
                "with merge_and_unload()."
            )
    for name, parameter in model.named_parameters():
        if parameter.is_meta:
            raise UserError(
                f"the model's weights are not in memory ({name} is on the meta device): load it as a whole, or let "
                "ptq161.quantize_folder read it block by block."
            )
        if type(parameter.data) is not Tensor or parameter.dtype not in _WEIGHT_DTYPES:
            kind = str(parameter.dtype).removeprefix("torch.")
            raise UserError(
                f"the model's weight {name} is a {type(parameter.data).__name__} of {kind}: use a dense model."
            )
    return model


def check_quantizable(model: object) -> PreTrainedModel:
    """Check that a model can be quantized.

    Raises:
        UserError: see :func:`check_model`; or it is already quantized, a linear is not a plain one or has hooks, or a
            weight is NaN or infinite.

    Example:
        >>> from transformers import LlamaConfig, LlamaForCausalLM
        >>> sizes = {"vocab_size": 8, "hidden_size": 8, "intermediate_size": 8, "num_attention_heads": 1}
        >>> model = LlamaForCausalLM(LlamaConfig(num_hidden_layers=1, **sizes))
        >>> model.lm_head.weight.data[0, 0] = torch.nan
        >>> check_quantizable(model)
        Traceback (most recent call last):
            ...
        ptq161.errors.UserError: the model's weights are NaN or infinite in lm_head.weight; use an intact checkpoint.
    """
    model = check_model(model)
    check_linears(model)
    check_finite(model.named_parameters())
    return model


def check_linears(model: PreTrainedModel) -> None:
    """Check that a model's linears can be replaced by packed ones; their values are not looked at.

    Raises:
        UserError: it is already quantized, a linear is not a plain one or has hooks, or the attention has no float32.

    Example:
        >>> from transformers import LlamaConfig, LlamaForCausalLM
        >>> sizes = {"vocab_size": 8, "hidden_size": 8, "intermediate_size": 8, "num_attention_heads": 1}
        >>> model = LlamaForCausalLM(LlamaConfig(num_hidden_layers=1, **sizes))
        >>> model.model.layers[0].mlp.up_proj = nn.Bilinear(8, 8, 8)
        >>> check_linears(model)  # doctest: +ELLIPSIS
        Traceback (most recent call last):
            ...
        ptq161.errors.UserError: the model is already quantized: its linear model.layers.0.mlp.up_proj is a Bilinear...
    """
    check_not_quantized(model.config)
    attention = str(model.config._attn_implementation)
    if "flash" in attention:
        raise UserError(f"the model's attention, {attention}, has no float32: load it with attn_implementation='sdpa'.")
    for name, module in quantized_linears(model):
        path = f"{blocks_path(model)}.{name}"
        if isinstance(module, nn.Linear) and (parametrize.is_parametrized(module) or hasattr(module, "weight_orig")):
            raise UserError(
                f"the weight of {path} is computed from others (a parametrization or pruning): make it permanent first."
            )
        if type(module) is not nn.Linear:
            raise UserError(
                f"the model is already quantized: its linear {path} is a {type(module).__name__}; "
                "use the full-precision model."
            )
        if hooks := [kind for kind in HOOKS if getattr(module, kind)]:
            raise UserError(
                f"the linear {path} has {hooks[0].strip('_').replace('_', ' ')}, which would be lost: remove them."
            )


def check_finite(weights: Iterable[tuple[str, Tensor]]) -> None:
    """Check the values of a model's weights, given with their names.

    Raises:
        UserError: one is NaN or infinite.

    Example:
        >>> check_finite([("lm_head.weight", torch.tensor([1.0, torch.inf]))])
        Traceback (most recent call last):
            ...
        ptq161.errors.UserError: the model's weights are NaN or infinite in lm_head.weight; use an intact checkpoint.
    """
    for name, weight in weights:
        if not bool(torch.isfinite(weight).all()):
            raise UserError(f"the model's weights are NaN or infinite in {name}; use an intact checkpoint.")


def check_not_quantized(config: PretrainedConfig) -> None:
    """Check that a model's config names no quantization.

    Raises:
        UserError: it names one.

    Example:
        >>> from transformers import LlamaConfig
        >>> check_not_quantized(LlamaConfig(quantization_config={"quant_method": "gptq"}))
        Traceback (most recent call last):
            ...
        ptq161.errors.UserError: the model is already quantized (by gptq); use the full-precision model.
    """
    method = quant_method(config.to_dict())
    if method:
        raise UserError(f"the model is already quantized (by {method}); use the full-precision model.")


def check_causal(config: PretrainedConfig, stage: str) -> None:
    """Check that a model predicts the next token, which a masked-diffusion model does not.

    Args:
        config: the model's.
        stage: what needs it: ``eval.tasks``, ``preprocess`` or ``finetune``.

    Raises:
        UserError: it is a masked-diffusion model.

    Example:
        >>> from transformers import LlamaConfig
        >>> check_causal(LlamaConfig(), "preprocess")
    """
    if diffusion_of(config) is not None:
        raise UserError(f"a {config.model_type} is a masked-diffusion model, but {stage} {_CAUSAL[stage]}.")


def as_tokens(model: PreTrainedModel, tokens: object, kind: str, shape: str) -> Tensor:
    """Take tokens as other libraries give them, and check that they are of the model's vocabulary.

    Args:
        model: the model that reads them.
        tokens: ``[n, seq_len]`` integers: a tensor, an array or nested lists; a mapping with ``input_ids``, as a
            tokenizer returns it; or any number of sequences of one length, each in one of these forms (a data set, a
            data loader, the list of pairs of GPTQ's loader).
        kind: what the error calls them, such as ``calibration``.
        shape: how the error names the dimensions.

    Returns:
        ``[n, seq_len]`` int64 on the CPU.

    Raises:
        UserError: they are something else, of unequal lengths, padded, or outside the vocabulary.

    Example:
        >>> from transformers import LlamaConfig, LlamaForCausalLM
        >>> sizes = {"vocab_size": 8, "hidden_size": 8, "intermediate_size": 8, "num_attention_heads": 1}
        >>> model = LlamaForCausalLM(LlamaConfig(num_hidden_layers=1, **sizes))
        >>> as_tokens(model, [{"input_ids": [1, 2]}, {"input_ids": [3, 4]}], "calibration", "[n_samples, seq_len]")
        tensor([[1, 2],
                [3, 4]])
        >>> as_tokens(model, [[1, 9]], "calibration", "[n_samples, seq_len]")  # doctest: +ELLIPSIS
        Traceback (most recent call last):
            ...
        ptq161.errors.UserError: calibration tokens lie outside the model's vocabulary of 8; use its own tokenizer.
    """
    taken = _Taken(kind, shape)
    array = taken.tensor(tokens)
    if array.dim() != 2 or not array.numel():
        raise taken.error(f"have shape {list(array.shape)}")
    _check_vocabulary(model, array, kind)
    return array


def as_text(model: PreTrainedModel, tokens: object, kind: str) -> Tensor:
    """Take the tokens of one text as other libraries give them, and check that they are of the model's vocabulary.

    Args:
        model: the model that reads them.
        tokens: ``[n]`` or ``[1, n]`` integers, in any form that :func:`as_tokens` takes.
        kind: as in :func:`as_tokens`.

    Returns:
        ``[n]`` int64 on the CPU.

    Raises:
        UserError: they are something else, or outside the vocabulary.

    Example:
        >>> from transformers import LlamaConfig, LlamaForCausalLM
        >>> sizes = {"vocab_size": 8, "hidden_size": 8, "intermediate_size": 8, "num_attention_heads": 1}
        >>> model = LlamaForCausalLM(LlamaConfig(num_hidden_layers=1, **sizes))
        >>> as_text(model, {"input_ids": [[1, 2, 3]]}, "evaluation")
        tensor([1, 2, 3])
    """
    taken = _Taken(kind, "[n]")
    array = taken.tensor(tokens)
    if array.dim() == 2 and len(array) == 1:
        array = array[0]
    if array.dim() != 1 or not array.numel():
        raise taken.error(f"have shape {list(array.shape)}")
    _check_vocabulary(model, array, kind)
    return array


def check_head(model: object) -> None:
    """Check that a model predicts tokens.

    Raises:
        UserError: it is no model, or one without a head.

    Example:
        >>> from transformers import LlamaConfig, LlamaModel
        >>> sizes = {"vocab_size": 8, "hidden_size": 8, "intermediate_size": 8, "num_attention_heads": 1}
        >>> check_head(LlamaModel(LlamaConfig(num_hidden_layers=1, **sizes)))  # doctest: +ELLIPSIS
        Traceback (most recent call last):
            ...
        ptq161.errors.UserError: a LlamaModel has no head that predicts tokens: load it with AutoModelForCausalLM.
    """
    if not isinstance(model, nn.Module):
        raise UserError(_not_a_model(model))
    if getattr(model, "get_output_embeddings", lambda: None)() is None:
        raise UserError(
            f"a {type(model).__name__} has no head that predicts tokens: load it with AutoModelForCausalLM."
        )


def check_seq_len(setting: str, seq_len: int, longest: int | None) -> None:
    """Check that sequences are not longer than what a model takes.

    Args:
        setting: name of the setting in the error.
        seq_len: tokens.
        longest: of :func:`ptq161.models.architectures.max_seq_len`.

    Raises:
        UserError: they are.

    Example:
        >>> check_seq_len("seq_len", 4096, longest=2048)
        Traceback (most recent call last):
            ...
        ptq161.errors.UserError: seq_len=4096: the model takes at most 2048 tokens; set seq_len to at most 2048.
    """
    if longest is not None and seq_len > longest:
        raise UserError(
            f"{setting}={seq_len}: the model takes at most {longest} tokens; set {setting} to at most {longest}."
        )


@contextmanager
def evaluation_mode(model: nn.Module) -> Iterator[None]:
    """Put a model into evaluation mode, uncompiled, and each module back into the mode it had.

    Example:
        >>> model = nn.Sequential(nn.Dropout(), nn.Dropout().eval())
        >>> with evaluation_mode(model):
        ...     [module.training for module in model]
        [False, False]
        >>> [module.training for module in model]
        [True, False]
    """
    before = {name: module.training for name, module in model.named_modules()}
    compiled = {module: module._compiled_call_impl for module in model.modules() if module._compiled_call_impl}
    for module in compiled:
        module._compiled_call_impl = None
    nn.Module.train(model, False)
    try:
        yield
    finally:
        for module, call in compiled.items():
            module._compiled_call_impl = call
        for name, module in model.named_modules():  # some may have been replaced
            module.training = before.get(name, model.training)


def _check_vocabulary(model: PreTrainedModel, tokens: Tensor, kind: str) -> None:
    embedding: Any = model.get_input_embeddings()
    weight = next(embedding.parameters(), None)  # a packed one has none
    vocabulary = embedding.num_embeddings if weight is None else weight.shape[0]
    if int(tokens.min()) < 0 or int(tokens.max()) >= vocabulary:
        raise UserError(f"{kind} tokens lie outside the model's vocabulary of {vocabulary}; use its own tokenizer.")


class _Taken:
    """Tokens on their way to a tensor; knows how errors call them."""

    def __init__(self, kind: str, shape: str) -> None:
        self.kind, self.shape = kind, shape

    def error(self, fault: str) -> UserError:
        return UserError(f"{self.kind} tokens {fault}: use integers {self.shape}.")

    def tensor(self, tokens: object) -> Tensor:
        if isinstance(tokens, str | bytes):
            raise self.error("are text; apply the model's tokenizer first")
        if isinstance(tokens, Mapping):
            return self._of_mapping(tokens)
        if isinstance(tokens, Tensor | np.ndarray):
            array = torch.as_tensor(tokens)
            if array.is_floating_point() or array.is_complex() or array.dtype == torch.bool:
                raise self.error(f"are of {str(array.dtype).removeprefix('torch.')}")
            return array.detach().to("cpu", torch.int64, copy=True)
        if isinstance(tokens, Iterable):
            return self._of_items(list(tokens))
        raise self.error(f"are a {type(tokens).__name__}")

    def _of_mapping(self, tokens: Mapping[Any, Any]) -> Tensor:
        if "input_ids" not in tokens:
            raise self.error(f"have no input_ids but {', '.join(map(str, tokens)) or 'nothing'}")
        mask = tokens.get("attention_mask")
        if mask is not None and not bool(self.tensor(mask).all()):
            raise self.error("are padded (zeros in attention_mask); cut them to one length")
        return self.tensor(tokens["input_ids"])

    def _of_items(self, items: list[Any]) -> Tensor:
        if not items:
            raise self.error("are empty")
        if all(isinstance(item, int | np.integer) and not isinstance(item, bool) for item in items):
            return torch.tensor([int(item) for item in items])
        if not all(isinstance(item, Iterable) for item in items):
            raise self.error(f"hold a {type(items[0]).__name__}")
        # GPTQ's loader yields pairs of input and target.
        items = [item[0] if isinstance(item, tuple) and _is_sequence(item[0]) else item for item in items]
        rows = [torch.atleast_2d(self.tensor(item)) for item in items]
        lengths = sorted({row.shape[-1] for row in rows})
        if len(lengths) > 1:
            raise self.error(f"have lengths from {lengths[0]} to {lengths[-1]}; cut them to one")
        if any(row.dim() != 2 for row in rows):
            raise self.error(f"have shape {[len(rows), *rows[0].shape]}")
        return torch.cat(rows)


def _is_sequence(value: object) -> bool:
    return isinstance(value, Iterable)


def _not_a_model(value: object) -> str:
    if isinstance(value, str | os.PathLike):
        return f"{str(value)!r} is no model: load it first, with transformers' from_pretrained."
    kind = type(value).__name__
    if isinstance(value, tuple):
        return "a tuple is no model: pass its first item, if it is (model, tokenizer)."
    if hasattr(value, "merge_and_unload"):
        return f"a {kind} is a model with an adapter: merge it first, with merge_and_unload()."
    for inside, what in (("_orig_mod", "compiled"), ("module", "wrapped"), ("model", "inside a pipeline or wrapper")):
        if isinstance(getattr(value, inside, None), nn.Module):
            return f"the model is {what} (a {kind}): pass its .{inside}."
    return f"a {kind} is no transformers model: pass a PreTrainedModel."
