"""Finetuning as a whole: train what a quantized model stores on the full-precision model's distributions.

::

    packed = ptq161.quantize(copy.deepcopy(model), calibration, method)
    tokens = training_tokens(tokenizer, distillation, seed=0)
    packed = distil(packed, model, tokens, distillation, seed=0)
"""

from __future__ import annotations

from pathlib import Path

import torch
from transformers import PreTrainedModel

from ptq161.files import identity
from ptq161.files.fingerprints import KeyedFolder, claim
from ptq161.files.hashing import sha256_of_tensors
from ptq161.finetune.checks import (
    check_formats,
    check_pair,
    check_scales,
    folder_checkpoint,
    held_out_of,
    split_held_out,
)
from ptq161.finetune.distillation import Distillation
from ptq161.finetune.student import make_student
from ptq161.methods.base import OnMetric, ignore_metric
from ptq161.methods.codes import damp
from ptq161.models.architectures import architecture_of, max_seq_len
from ptq161.models.checks import check_seq_len, evaluation_mode
from ptq161.models.experts import split_experts
from ptq161.numerics import COMPUTE_DTYPES, plain_torch, working_device
from ptq161.packed.checkpoint import own_methods
from ptq161.packed.model import sha256_of_packed
from ptq161.training.loop import random_numbers, run_steps
from ptq161.training.losses import frozen_copy, objective

_FILE = "distillation.pt"


@plain_torch()
def distil(
    packed: PreTrainedModel,
    full: PreTrainedModel,
    tokens: object,
    distillation: Distillation,
    *,
    held_out_tokens: object | None = None,
    folder: Path | str | KeyedFolder | None = None,
    on_metric: OnMetric | None = None,
    seed: int = 0,
    device: torch.device | str | None = None,
    progress: bool = False,
) -> PreTrainedModel:
    """Finetune a quantized model in place: its bytes are others afterwards, and as many.

    Args:
        packed: the quantized model.
        full: the full-precision model that it comes from, which is not changed: the teacher.
        tokens: ``[n, seq_len]`` training sequences, from :func:`ptq161.training.text.training_tokens` or
            :func:`ptq161.finetune.sampling.sample_text`, or in any form that :func:`ptq161.models.checks.as_tokens`
            takes.
        distillation: hyperparameters.
        held_out_tokens: sequences that are never trained on, in any such form; None takes the first
            ``distillation.held_out`` of ``tokens``.
        folder: receives checkpoints, from which an interrupted training continues with the same result, bit for bit;
            None keeps none. A path is checked against all arguments, for which both models are hashed; a
            ``KeyedFolder`` is not checked.
        on_metric: receives ``finetune_loss``, ``finetune_lr``, ``finetune_tokens_per_second`` of every ``step``, and
            ``finetune_held_out_loss``, whose ``step`` is the number of steps before it.
        seed: all random numbers follow from it.
        device: where the model is trained; None is where it is.
        progress: show a progress bar.

    Returns:
        the same model.

    Raises:
        UserError: the models or the tokens do not fit; a format's codes cannot be learned; a loss is not finite;
            ``folder`` belongs to another training.
    """
    check_pair(packed, full)
    if distillation.update == "codes":
        check_formats(packed)
    else:
        check_scales(packed, distillation)
    check_seq_len("finetune.seq_len", distillation.seq_len, max_seq_len(packed.config))
    trained, held_out = split_held_out(packed, tokens, held_out_tokens, distillation.held_out)
    target = working_device(device, packed.device)
    if isinstance(folder, Path | str):
        found = identity.distillation(
            packed=sha256_of_packed(packed),
            full_precision=sha256_of_tensors(full.state_dict()),
            tokens=sha256_of_tensors({"trained": trained, "held_out": held_out}),
            settings=distillation,
            seed=seed,
            device=target,
        )
        folder = claim(Path(folder).expanduser(), found, distillation.names.advice)
    checkpoint = folder_checkpoint(folder, _FILE, distillation, target)
    with evaluation_mode(full), random_numbers(target, seed, "distillation"):
        teacher = _teacher(full, distillation, target)
        student = make_student(packed, teacher, distillation, target)
        optimizer = student.optimizer(distillation)
        run_steps(
            student.model,
            optimizer,
            objective(student.model, teacher, distillation),
            trained,
            distillation,
            checkpoint,
            on_metric=on_metric or ignore_metric,
            seed=seed,
            where={},
            progress=progress,
            held_out=held_out_of(held_out, distillation),
            at_first_gradients=lambda: damp(optimizer.param_groups[1:]),
        )
    student.store(packed)
    own_methods(packed)
    return packed


def _teacher(full: PreTrainedModel, distillation: Distillation, device: torch.device) -> PreTrainedModel:
    """Return the full-precision model in the compute dtype on the device of the training, copied only where it must."""
    dtype = COMPUTE_DTYPES[distillation.compute_dtype]
    is_mixture = any("*" in path for group in architecture_of(full).linears for path in group)
    splits = is_mixture and distillation.update == "codes"  # each expert's own weights are needed
    teacher = full
    if splits or any((p.dtype, p.device) != (dtype, device) for p in full.parameters()):
        teacher = frozen_copy(full, dtype, device)
    if splits:
        split_experts(teacher)
    return teacher
