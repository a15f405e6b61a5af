"""What finetunings have in common before they begin: checks of formats, models and tokens; folder; what is held out."""

from __future__ import annotations

import torch
from torch import Tensor
from transformers import PreTrainedModel

from ptq161.errors import UserError
from ptq161.files.atomic import writing
from ptq161.files.fingerprints import KeyedFolder
from ptq161.finetune.distillation import Distillation
from ptq161.finetune.tuning import Tuning
from ptq161.methods.coded import LEARNABLE
from ptq161.models.architectures import decoder_blocks
from ptq161.models.checks import as_tokens, check_causal, check_head, check_quantizable
from ptq161.packed.embedding import embedding_bits
from ptq161.packed.model import packed_linears
from ptq161.packed.trainable import scale_tensors
from ptq161.training.checkpoint import TrainingCheckpoint
from ptq161.training.held_out import HeldOut
from ptq161.training.settings import Training


def check_formats(packed: PreTrainedModel) -> None:
    """Check that the codes of a quantized model can be learned.

    Raises:
        UserError: a linear has a format that is not in ``LEARNABLE``.
    """
    for name, layer in packed_linears(packed).items():
        if layer.packed.format not in LEARNABLE:
            raise UserError(
                f"finetune.update=codes: the codes of {name} (format {layer.packed.format}) cannot be learned, only "
                f"those of the formats {', '.join(LEARNABLE)}; use update=scales."
            )


def check_scales(packed: PreTrainedModel, distillation: Distillation) -> None:
    """Check that there is something to train in a quantized model.

    Raises:
        UserError: its formats store no scales, and its norms are not trained.
    """
    if distillation.train_norms or any(scale_tensors(layer.packed) for layer in packed_linears(packed).values()):
        return
    formats = ", ".join(sorted({layer.packed.format for layer in packed_linears(packed).values()}))
    raise UserError(
        f"finetune.train_norms=false: the format {formats} stores no scales, so there is nothing to train; use "
        "train_norms=true."
    )


def check_pair(packed: PreTrainedModel, full: PreTrainedModel) -> None:
    """Check that two models are a quantized one and the full-precision one that it comes from, as far as shapes tell.

    Raises:
        UserError: one is not what it should be, or their shapes differ.
    """
    check_head(packed)
    if not packed_linears(packed):
        raise UserError("the model to finetune has no packed linears: quantize it first.")
    check_dense_embeddings(packed)
    check_head(full)
    check_quantizable(full)
    check_causal(full.config, "finetune")
    shapes = [(m.config.model_type, len(decoder_blocks(m)), _embedding(m)) for m in (packed, full)]
    if shapes[0] != shapes[1]:
        mine, others = (f"{kind}, {blocks} blocks, embedding {size}" for kind, blocks, size in shapes)
        raise UserError(f"the full-precision model ({others}) is not the one that was quantized ({mine}): give that.")


def check_dense_embeddings(packed: PreTrainedModel) -> None:
    """Check that a quantized model's embeddings are dense.

    Raises:
        UserError: they are packed.
    """
    if bits := embedding_bits(packed):
        raise UserError(
            f"the model's embeddings are quantized to {bits} bits (model.embedding_bits), which finetuning does not "
            "take: quantize it with model.embedding_bits=16."
        )


def split_held_out(
    model: PreTrainedModel, tokens: object, held_out_tokens: object | None, n: int
) -> tuple[Tensor, Tensor]:
    """Return the sequences to train on and those held out, ``[n, seq_len]`` int64 each.

    Args:
        model: of whose vocabulary they are.
        tokens: all sequences, in any form that :func:`ptq161.models.checks.as_tokens` takes.
        held_out_tokens: those held out; None takes the first ``n``.
        n: how many to hold out.

    Raises:
        UserError: they are no tokens of the model, or too few.
    """
    taken = as_tokens(model, tokens, "training", "[n, seq_len]")
    if held_out_tokens is not None:
        return taken, as_tokens(model, held_out_tokens, "held-out", "[n, seq_len]")
    if len(taken) <= n:
        raise UserError(
            f"finetune.held_out={n} leaves nothing to train on: the text has {len(taken)} sequences; set "
            f"finetune.held_out to at most {len(taken) - 1}, or give more text."
        )
    return taken[n:], taken[:n]


def folder_checkpoint(
    folder: KeyedFolder | None, file: str, training: Training, device: torch.device
) -> TrainingCheckpoint | None:
    """Return the checkpoint of a training in its folder, which is made; None where there is none.

    Raises:
        UserError: the folder cannot be written.
    """
    if folder is None:
        return None
    with writing(folder.path, training.names.advice):
        folder.path.mkdir(parents=True, exist_ok=True)
    return TrainingCheckpoint(folder.path / file, training, device)


def held_out_of(tokens: Tensor, settings: Distillation | Tuning) -> HeldOut | None:
    """Return what is held out of a training; None for no tokens."""
    if not len(tokens):
        return None
    return HeldOut(tokens, settings.held_out_every, settings.patience, settings.batch_size)


def _embedding(model: PreTrainedModel) -> list[int]:
    return list(next(model.get_input_embeddings().parameters()).shape)
