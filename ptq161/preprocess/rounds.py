"""Quantization preprocessing as a whole: quantize, train the quantized model, merge; one round or several.

::

    tokens = training_tokens(tokenizer, restoration, seed=0)
    restored, masks = restore(model, tokens, calibration, method, restoration, seed=0)
    packed = ptq161.quantize(restored, calibration, method, salient_masks=masks)
"""

from __future__ import annotations

import copy
from pathlib import Path

import torch
from torch import Tensor, nn
from transformers import PreTrainedModel

from ptq161.driver.quantization import quantize
from ptq161.driver.resume import fingerprint as quantization_fingerprint
from ptq161.files import identity
from ptq161.files.fingerprints import KeyedFolder, claim
from ptq161.files.hashing import sha256_of_tensors
from ptq161.methods.base import Method, OnMetric, ignore_metric
from ptq161.models.architectures import max_seq_len
from ptq161.models.checks import as_tokens, check_causal, check_quantizable, check_seq_len
from ptq161.numerics import COMPUTE_DTYPES, working_device
from ptq161.packed.masks import salient_masks
from ptq161.preprocess.restoration import Restoration, check_restorable
from ptq161.preprocess.student import make_student, memory, merge, trained_sizes
from ptq161.preprocess.training import train
from ptq161.training.arithmetic.metis import check_ranks
from ptq161.training.checkpoint import TrainingCheckpoint
from ptq161.training.loop import random_numbers
from ptq161.training.losses import frozen_copy, objective


def restore(
    model: PreTrainedModel,
    tokens: object,
    calibration: object,
    method: Method,
    restoration: Restoration,
    *,
    folder: Path | str | KeyedFolder | None = None,
    on_metric: OnMetric | None = None,
    seed: int = 0,
    device: torch.device | str | None = None,
    progress: bool = False,
) -> tuple[PreTrainedModel, dict[str, Tensor] | None]:
    """Restore a model: train it so that its quantization loses less (Zhao et al., ACL 2025, Section 3.4).

    Each round quantizes the model, trains the dequantized model, and merges the update. The result is a full-precision
    model, to be quantized again.

    Args:
        model: the pretrained model, which is not changed; the teacher of the ``kl`` objectives in every round.
        tokens: ``[n, seq_len]`` training sequences, from :func:`ptq161.training.text.training_tokens`, or in any form
            that :func:`ptq161.models.checks.as_tokens` takes.
        calibration: ``[n_samples, seq_len]`` calibration tokens, in any such form.
        method: the quantization method.
        restoration: hyperparameters.
        folder: receives checkpoints, from which an interrupted training continues with the same result, bit for bit;
            None keeps none. A path is checked against all arguments, for which the whole model is hashed; a
            ``KeyedFolder`` is not checked.
        on_metric: receives ``preprocess_loss``, ``preprocess_lr`` and ``preprocess_tokens_per_second`` of every
            ``round`` and ``step``, what :func:`ptq161.preprocess.student.memory` counts as ``preprocess_...`` of every
            ``round``, and the metrics of each quantization as ``preprocess_quantize_...`` with ``round``.
        seed: all random numbers follow from it.
        device: where blocks are quantized and the model is trained; None is where the model is.
        progress: show progress bars.

    Returns:
        the restored model, float32, and the salient masks that its quantization takes (``restoration.mask=first``;
        else None).

    Raises:
        UserError: the model or the tokens do not fit; a loss is not finite; ``folder`` belongs to another training.
    """
    check_quantizable(model)
    check_causal(model.config, "preprocess")
    check_ranks(restoration, trained_sizes(model, restoration))
    check_restorable(method)
    tokens = as_tokens(model, tokens, "training", "[n, seq_len]")
    check_seq_len("preprocess.seq_len", restoration.seq_len, max_seq_len(model.config))
    calibration = as_tokens(model, calibration, "calibration", "[n_samples, seq_len]")
    on_metric = on_metric or ignore_metric
    target = working_device(device, model.device)
    if isinstance(folder, Path | str):
        found = identity.restoration(
            quantization_fingerprint(model, calibration, method, seed=seed, device=target),
            training=sha256_of_tensors({"tokens": tokens}),
            settings=restoration,
        )
        folder = claim(Path(folder).expanduser(), found, restoration.names.advice)
    teacher = None
    if restoration.objective != "lm":
        teacher = frozen_copy(model, COMPUTE_DTYPES[restoration.compute_dtype], target)
    masks: dict[str, Tensor] | None = None
    restored = model
    for round_ in range(restoration.rounds):
        packed = quantize(
            copy.deepcopy(model) if restored is model else restored,
            calibration,
            method,
            on_metric=_with_round(on_metric, round_),
            seed=seed,
            device=target,
            progress=progress,
            salient_masks=masks,
            resume=None if folder is None else folder.part(f"quantize_{round_}"),
        )
        if restoration.mask == "first" and method.takes_salient_masks and masks is None:
            masks = salient_masks(packed)
        with random_numbers(target, seed, "restoration", round_):
            student = make_student(packed, restoration, target)
            for name, count in memory(packed, student, restoration).items():
                on_metric(f"preprocess_{name}", count, round=round_)
            train(
                student,
                objective(student, teacher, restoration),
                tokens,
                restoration,
                None if folder is None else TrainingCheckpoint(folder.path / f"round_{round_}.pt", restoration, target),
                on_metric=on_metric,
                seed=seed,
                round_=round_,
                progress=progress,
            )
        restored = merge(packed, student, restoration)
    nn.Module.train(restored, model.training)
    return restored, masks


def _with_round(on_metric: OnMetric, round_: int) -> OnMetric:
    """Return an ``on_metric`` for the metrics of a round's quantization."""

    def emit(name: str, value: float, /, **where: int | str) -> None:
        on_metric(f"preprocess_quantize_{name}", value, round=round_, **where)

    return emit
