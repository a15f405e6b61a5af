"""What each result depends on: tokens, a restoration, a quantization, a distillation, a score and a whole run.

Each function returns a fingerprint (:mod:`ptq161.files.fingerprints`), with contents and hashes in the place of paths
and names. Two computations with one fingerprint have the same result, so the second is not made. What cannot change a
result is not part of it: where it is written and mirrored, and the display names of models and methods.

The number of threads changes the last bits of a result. It is part of a quantization, which continues from finished
blocks only with the same number of threads, and not part of a run. So may the C++ compiler, which a record names.
"""

from __future__ import annotations

import dataclasses
import inspect
from collections.abc import Mapping
from importlib import metadata
from typing import Any

import torch

from ptq161.files.fingerprints import Fingerprint
from ptq161.files.hashing import sha256_of_file, sha256_of_sources

SOURCES = sha256_of_sources()
"""Hash of the package's sources, taken at import: a source may be edited while this process runs."""

_LIBRARY = ("torch", "transformers")
"""Packages whose version can change what is quantized."""
_EVALUATION = (*_LIBRARY, "tokenizers", "lm_eval")
_TRAINING = ("peft", "accelerate")

_WITHOUT_EFFECT = ("checkpoint_every", "save_merged", "score_merged", "score_before", "text_file")
"""Settings of a training that do not change the trained weights (the text counts by its content)."""


def run(
    *,
    model: Mapping[str, Any],
    method: Any | None,
    embedding_bits: int | None,
    calibration: Mapping[str, Any] | None,
    preprocess: Mapping[str, Any] | None,
    finetune: Mapping[str, Any] | None,
    evaluation: Mapping[str, Any],
    full_precision: bool | None,
    seed: int | None,
    device: torch.device,
    dtype: str,
) -> dict[str, Any]:
    """Describe a run.

    Args:
        model: the model and its tokenizer, by content.
        method: hyperparameters, a dataclass; None quantizes nothing.
        embedding_bits: to which the token embeddings are rounded; None without a method.
        calibration: the calibration text by content, number and length of its windows; None without a method. Methods
            without data have one too: the output errors in each record are measured on its tokens.
        preprocess: settings and training text by content; None leaves the weights as they are.
        finetune: settings and training text by content; None leaves the packed weights as they are. Without a method,
            that of adapters on a packed checkpoint.
        evaluation: texts and tasks by content, with their limits.
        full_precision: whether the unquantized model is scored too; None without a method.
        seed: None where no random number is drawn.
        device: where it runs; its type counts.
        dtype: of the evaluation, and of what is stored beside the packed weights.
    """
    return {
        "model": model,
        "method": None if method is None else describe(method),
        "embedding_bits": embedding_bits,
        "calibration": calibration,
        "preprocess": preprocess,
        "finetune": finetune,
        "evaluation": evaluation,
        "full_precision": full_precision,
        "seed": seed,
        "device": device.type,
        "dtype": dtype,
        **_code(*_EVALUATION, *_TRAINING),
    }


def tokens(*, model: Mapping[str, Any], text: Mapping[str, Any], seed: int) -> dict[str, Any]:
    """Describe tokens that are drawn from a text.

    Args:
        model: the model whose tokenizer is used, by content.
        text: by content, with the number and the length of the windows.
        seed: of the draw.
    """
    return {"model": model, "text": text, "seed": seed, **_code(*_EVALUATION)}


def quantization(
    *,
    weights: str,
    config: str,
    calibration: str,
    method: Any,
    salient_masks: str | None,
    seed: int,
    device: torch.device,
) -> dict[str, Any]:
    """Describe a quantization, which can be continued from its finished blocks.

    Args:
        weights: hash of the full-precision tensors.
        config: key of the model's own config.
        calibration: hash of the calibration tokens.
        method: hyperparameters, a dataclass.
        salient_masks: hash of the masks that the caller gives; None lets the method select them.
        seed: of the method's random numbers.
        device: where blocks are worked on.
    """
    return {
        "weights": weights,
        "config": config,
        "calibration": calibration,
        "method": describe(method),
        "salient_masks": salient_masks,
        **_computed(seed, device, *_LIBRARY),
    }


def restoration(quantized: Fingerprint, *, training: str, settings: Any) -> dict[str, Any]:
    """Describe a restoration, the training before a quantization.

    Args:
        quantized: fingerprint of the first quantization, from :func:`quantization`.
        training: hash of the training tokens.
        settings: hyperparameters, a ``Restoration``.
    """
    # With a single round, ``mask`` only changes the final quantization.
    without_effect = {*_WITHOUT_EFFECT, "mask"} if settings.rounds == 1 else set(_WITHOUT_EFFECT)
    return {
        "quantization": quantized,
        "training_tokens": training,
        "preprocess": {key: value for key, value in describe(settings).items() if key not in without_effect},
        "versions": _versions(*_TRAINING),
    }


def distillation(
    *, packed: str, full_precision: str, tokens: str, settings: Any, seed: int, device: torch.device
) -> dict[str, Any]:
    """Describe a distillation, the training after a quantization.

    Args:
        packed: hash of the quantized model.
        full_precision: hash of the full-precision tensors.
        tokens: hash of the tokens that it is trained on and of those held out.
        settings: hyperparameters, a ``Distillation``.
        seed: of the order of the sequences.
        device: where it is trained.
    """
    return {
        "packed": packed,
        "full_precision": full_precision,
        "tokens": tokens,
        "finetune": {key: value for key, value in describe(settings).items() if key not in _WITHOUT_EFFECT},
        **_computed(seed, device, *_LIBRARY, *_TRAINING),
    }


def tuning(*, packed: str, tokens: str, settings: Any, seed: int, device: torch.device) -> dict[str, Any]:
    """Describe a training of adapters on a quantized model.

    Args:
        packed: hash of the quantized model.
        tokens: hash of the tokens that they are trained on and of those held out.
        settings: hyperparameters, a ``Tuning``.
        seed: of the initial adapters and the order of the sequences.
        device: where they are trained.
    """
    return {
        "packed": packed,
        "tokens": tokens,
        "finetune": {key: value for key, value in describe(settings).items() if key not in _WITHOUT_EFFECT},
        **_computed(seed, device, *_LIBRARY, *_TRAINING),
    }


def sampled_text(
    *,
    weights: str,
    config: str,
    n: int,
    seq_len: int,
    first: int | None,
    dtype: str,
    seed: int,
    device: torch.device,
) -> dict[str, Any]:
    """Describe text that a model samples.

    Args:
        weights: hash of the full-precision tensors.
        config: key of the model's own config.
        n: number of sequences.
        seq_len: tokens of each.
        first: the token that they begin with; None draws it.
        dtype: of the arithmetic.
        seed: of the draws.
        device: where the model runs.
    """
    return {
        "weights": weights,
        "config": config,
        "n": n,
        "seq_len": seq_len,
        "first": first,
        "dtype": dtype,
        **_computed(seed, device, *_LIBRARY),
    }


def score(
    *, model: Mapping[str, Any], weights: str, device: torch.device, dtype: str, measured: Mapping[str, Any]
) -> dict[str, Any]:
    """Describe a score of a model.

    Args:
        model: the model whose config and tokenizer are used, by content.
        weights: hash of the weights that are scored.
        device: where it runs; its type counts.
        dtype: of the arithmetic.
        measured: the text or the task by content, with its settings.
    """
    return {
        "model": model,
        "weights": weights,
        "device": device.type,
        "dtype": dtype,
        "measured": measured,
        **_code(*_EVALUATION),
    }


# --- parts ------------------------------------------------------------------------------------------------------------


def describe(settings: Any) -> dict[str, Any]:
    """Return class and fields of a dataclass of settings, such as a method's hyperparameters.

    For a class from outside of this package, which ``SOURCES`` does not cover, the SHA-256 of its source file as well.
    """
    cls = type(settings)
    name = {"class": f"{cls.__module__}.{cls.__qualname__}"}
    if cls.__module__.partition(".")[0] != __name__.partition(".")[0]:
        name["source"] = sha256_of_file(inspect.getfile(cls))
    return name | {field.name: getattr(settings, field.name) for field in dataclasses.fields(settings)}


def _computed(seed: int, device: torch.device, *packages: str) -> dict[str, Any]:
    """Return what the last bits of tensors depend on, beside what they are computed from."""
    return {
        "seed": seed,
        "device": _device_name(device),
        # The order of sums depends on it.
        "threads": torch.get_num_threads(),
        **_code(*packages),
    }


def _device_name(device: torch.device) -> str:
    """Name the processor whose arithmetic a result comes from, by its instruction set or as a GPU."""
    if device.type == "cuda":
        return f"cuda: {torch.cuda.get_device_name(device)}"
    return f"{device.type}: {torch.backends.cpu.get_cpu_capability()}"


def _code(*packages: str) -> dict[str, Any]:
    return {"versions": _versions(*packages), "sources": SOURCES}


def _versions(*packages: str) -> dict[str, str]:
    return {package: metadata.version(package) for package in packages}
