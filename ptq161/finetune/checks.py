"""What is checked before a finetuning: formats, models and tokens."""

from __future__ import annotations

from torch import Tensor
from transformers import PreTrainedModel

from ptq161.errors import UserError
from ptq161.methods.coded import LEARNABLE
from ptq161.models.architectures import decoder_blocks
from ptq161.models.checks import as_tokens, check_causal, check_head, check_quantizable
from ptq161.packed.model import packed_linears


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


def check_pair(packed: PreTrainedModel, full: PreTrainedModel) -> None:
    """Check that two models are a quantized one and the full-precision one that it comes from, as far as shapes tell.

    Raises:
        UserError: one is not what it should be, or their shapes differ.
    """
    check_head(packed)
    if not packed_linears(packed):
        raise UserError("the model to finetune has no packed linears: quantize it first.")
    check_head(full)
    check_quantizable(full)
    check_causal(full.config, "finetune")
    shapes = [(m.config.model_type, len(decoder_blocks(m)), _embedding(m)) for m in (packed, full)]
    if shapes[0] != shapes[1]:
        mine, others = (f"{kind}, {blocks} blocks, embedding {size}" for kind, blocks, size in shapes)
        raise UserError(f"the full-precision model ({others}) is not the one that was quantized ({mine}): give that.")


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


def _embedding(model: PreTrainedModel) -> list[int]:
    return list(next(model.get_input_embeddings().parameters()).shape)
