"""Token perplexity over non-overlapping windows: the protocol of GPTQ that the papers of the field use."""

from __future__ import annotations

import dataclasses
import math

import torch
from torch import Tensor
from torch.nn.functional import cross_entropy
from tqdm import tqdm
from transformers import PreTrainedModel

from ptq161.errors import UserError
from ptq161.models.architectures import diffusion_of, max_seq_len
from ptq161.models.checks import as_text, check_head, check_seq_len, evaluation_mode
from ptq161.numerics import plain_torch

# Rows of logits that are held in float32 at a time: 512 rows of a vocabulary of 128k take 262 MB.
_ROWS_PER_CHUNK = 512


@dataclasses.dataclass(frozen=True)
class Perplexity:
    """A perplexity and the text that it was measured on.

    Attributes:
        value: exp of the mean negative log-likelihood (nats) per predicted token.
        standard_error: of ``value``, from the spread of the windows' means (delta method); None for one window.
        seq_len: tokens per window.
        n_windows: windows scored.
        n_tokens: tokens in them; each window predicts all but its first.
    """

    value: float
    standard_error: float | None
    seq_len: int
    n_windows: int
    n_tokens: int


def check_windows(n_tokens: int, seq_len: int, max_length: int | None, text: str = "the text") -> None:
    """Check that a text fills a window, and that the window is not too long for the model.

    Args:
        n_tokens: length of the text.
        seq_len: tokens per window.
        max_length: longest sequence that the model takes; None if it has no bound.
        text: name of the text in the error.

    Raises:
        UserError: the text is too short, or the window too long.
    """
    check_seq_len("eval.seq_len", seq_len, max_length)
    if n_tokens < seq_len:
        raise UserError(
            f"eval.seq_len={seq_len}: {text} has only {n_tokens} tokens; "
            f"set eval.seq_len to at most {n_tokens}, or use a longer text."
        )


@plain_torch()
def perplexity(
    model: PreTrainedModel,
    tokens: object,
    seq_len: int,
    *,
    max_windows: int | None = None,
    batch_size: int = 1,
    progress: str | None = None,
) -> Perplexity:
    """Score a tokenized text the way GPTQ does.

    The text is cut into windows of ``seq_len`` tokens that do not overlap, the incomplete last one is dropped, and
    nothing is put before a window. Each window predicts its last ``seq_len - 1`` tokens; all windows are of one
    length, so the papers' sum of ``mean * seq_len`` over ``n_windows * seq_len`` is the mean over the windows.
    Source: Frantar et al., GPTQ, ICLR 2023, Section 4, and its released evaluation.

    Args:
        model: a causal language model; it runs on its own device, in its own dtype.
        tokens: ``[n]`` integers, in any form that :func:`ptq161.models.checks.as_text` takes.
        seq_len: tokens per window.
        max_windows: score only the first windows; None scores all.
        batch_size: windows per forward pass.
        progress: label of the progress bar; None shows none.

    Raises:
        UserError: the model is a masked-diffusion one, which has no perplexity, or predicts no tokens, or these are
            not of its vocabulary; the text is shorter than one window, or a window too long for the model; a loss is
            not finite.
    """
    check_head(model)
    if diffusion_of(model.config) is not None:
        raise UserError(
            f"a {type(model).__name__} is a masked-diffusion model, for which a perplexity is not defined: use "
            "ptq161.evaluation.denoising_loss."
        )
    tokens = as_text(model, tokens, "evaluation")
    check_windows(tokens.numel(), seq_len, max_seq_len(model.config))
    n_windows = tokens.numel() // seq_len
    if max_windows is not None:
        n_windows = min(n_windows, max_windows)
    windows = tokens[: n_windows * seq_len].view(n_windows, seq_len)
    losses = []
    bar = tqdm(total=n_windows, desc=progress, unit="window", disable=progress is None)
    with bar, torch.no_grad(), evaluation_mode(model):
        for batch in windows.split(batch_size):
            losses.append(_window_losses(model, batch.to(model.device)))
            bar.update(len(batch))
    return _summarize(torch.cat(losses), seq_len)


def _window_losses(model: PreTrainedModel, windows: Tensor) -> Tensor:
    """Return the mean negative log-likelihood of each window ``[b, seq_len]``: ``[b]``, float64, on the CPU."""
    logits = model(input_ids=windows, use_cache=False).logits[:, :-1].flatten(0, 1)
    targets = windows[:, 1:].flatten().to(logits.device)
    losses = [
        cross_entropy(rows.float(), wanted, reduction="none")
        for rows, wanted in zip(logits.split(_ROWS_PER_CHUNK), targets.split(_ROWS_PER_CHUNK), strict=True)
    ]
    return torch.cat(losses).view(len(windows), -1).double().mean(1).cpu()


def _summarize(losses: Tensor, seq_len: int) -> Perplexity:
    if not torch.isfinite(losses).all():
        raise UserError(
            f"the loss of window {int((~torch.isfinite(losses)).nonzero()[0])} is not finite: the model's weights or "
            "activations overflow; use dtype=float32 or dtype=bfloat16."
        )
    n_windows = len(losses)
    mean = float(losses.mean())
    value = math.exp(mean) if mean < 700 else math.inf
    error = value * float(losses.std()) / math.sqrt(n_windows) if n_windows > 1 else None
    return Perplexity(value, error, seq_len, n_windows, n_windows * seq_len)
