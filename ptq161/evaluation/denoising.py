"""The denoising loss: what stands for a perplexity with masked-diffusion language models (LLaDA, arXiv 2502.09992)."""

from __future__ import annotations

import dataclasses
import math

import torch
from torch import Tensor
from torch.nn.functional import cross_entropy
from tqdm import tqdm
from transformers import PreTrainedModel, PreTrainedTokenizerBase

from ptq161.errors import UserError
from ptq161.evaluation.likelihood import check_windows
from ptq161.models.architectures import Diffusion, diffusion_of, max_seq_len
from ptq161.models.checks import as_text, check_head, evaluation_mode
from ptq161.numerics import plain_torch
from ptq161.seeding import stage_generator

MASK_SHARES = tuple((2 * i + 1) / 16 for i in range(8))
"""The shares of a window that are masked: the middles of eight equal parts of [0, 1]."""
MASK_SEED = 0
"""Seed of the masks, which is no setting: every model and every run fills in the same places."""
_ROWS_PER_CHUNK = 512  # of logits that are held in float32 at a time


@dataclasses.dataclass(frozen=True)
class DenoisingLoss:
    """A denoising loss and the text that it was measured on.

    Attributes:
        value: nats per masked token, the mean over the shares of masked tokens.
        standard_error: of ``value``, from the spread of the windows' means; None for one window.
        seq_len: tokens per window.
        n_windows: windows scored, each once for each share.
        n_tokens: tokens in them.
        mask_shares: how many shares, evenly spread over [0, 1].
        mask_seed: of the masks.
    """

    value: float
    standard_error: float | None
    seq_len: int
    n_windows: int
    n_tokens: int
    mask_shares: int = len(MASK_SHARES)
    mask_seed: int = MASK_SEED


@plain_torch()
def denoising_loss(
    model: PreTrainedModel,
    tokens: object,
    seq_len: int,
    *,
    max_windows: int | None = None,
    batch_size: int = 1,
    progress: str | None = None,
) -> DenoisingLoss:
    """Score how well a masked-diffusion language model fills a tokenized text in.

    The text is cut as for a perplexity. In each window a share t of the tokens is masked, and the loss is the mean
    cross-entropy over the masked places; this for each t of ``MASK_SHARES``, and the mean of them is the window's loss.
    Each t counts alike, however many places it masks: that is the weight 1/t of LLaDA's bound on the negative
    log-likelihood, here per token, with a fixed number of masked tokens for each t, over a fixed grid of t. The masks
    of a window grow with t. No prefix stays visible.

    Args:
        model: a masked-diffusion language model; it runs on its own device, in its own dtype.
        tokens: ``[n]`` integers, in any form that :func:`ptq161.models.checks.as_text` takes.
        seq_len: tokens per window.
        max_windows: score only the first windows; None scores all.
        batch_size: windows per forward pass.
        progress: label of the progress bar; None shows none.

    Raises:
        UserError: the model is a causal one or predicts no tokens, or these are not of its vocabulary; the text is
            shorter than one window, or a window too long for the model; a loss is not finite.
    """
    check_head(model)
    diffusion = diffusion_of(model.config)
    if diffusion is None:
        raise UserError(f"a {type(model).__name__} is a causal language model, and fills no masks in: use perplexity.")
    tokens = as_text(model, tokens, "evaluation")
    check_windows(tokens.numel(), seq_len, max_seq_len(model.config))
    n_windows = min(tokens.numel() // seq_len, max_windows or tokens.numel())
    windows = tokens[: n_windows * seq_len].view(n_windows, seq_len)
    ranks = torch.stack([_mask_ranks(seq_len, i) for i in range(n_windows)])
    losses = torch.zeros(n_windows, dtype=torch.float64)
    bar = tqdm(total=n_windows, desc=progress, unit="window", disable=progress is None)
    with bar, torch.no_grad(), evaluation_mode(model):
        for batch in torch.arange(n_windows).split(batch_size):
            for share in MASK_SHARES:
                masked = ranks[batch] < max(1, round(share * seq_len))
                losses[batch] += _masked_losses(model, windows[batch], masked, diffusion) / len(MASK_SHARES)
            bar.update(len(batch))
    if not bool(torch.isfinite(losses).all()):
        raise UserError(
            f"the loss of window {int((~torch.isfinite(losses)).nonzero()[0])} is not finite: the model's weights or "
            "activations overflow; use dtype=float32 or dtype=bfloat16."
        )
    error = float(losses.std()) / math.sqrt(n_windows) if n_windows > 1 else None
    return DenoisingLoss(float(losses.mean()), error, seq_len, n_windows, n_windows * seq_len)


@torch.no_grad()
def denoised_sample(model: PreTrainedModel, tokenizer: PreTrainedTokenizerBase, prompt: str, n_tokens: int) -> str:
    """Continue a prompt by masks, of which one is filled in at a time, the surest first.

    Args:
        model: a masked-diffusion language model.
        tokenizer: its tokenizer.
        prompt: text to continue; not empty.
        n_tokens: new tokens.

    Returns:
        prompt and continuation, without special tokens.
    """
    diffusion = diffusion_of(model.config)
    assert diffusion is not None, "a causal model is continued by greedy_sample"
    model.train(False)
    prompted = tokenizer(prompt, return_tensors="pt")["input_ids"]
    tokens = torch.cat([prompted, torch.full((1, n_tokens), diffusion.mask_token)], dim=1).to(model.device)
    open_places = torch.arange(tokens.shape[1], device=tokens.device) >= prompted.shape[1]
    for _ in range(n_tokens):
        logits = _aligned_logits(model, tokens, diffusion)[0]
        logits[:, diffusion.mask_token] = -torch.inf
        surest, found = logits.float().softmax(-1).max(-1)
        place = surest.masked_fill(~open_places, -1.0).argmax()
        tokens[0, place], open_places[place] = found[place], False
    return str(tokenizer.decode(tokens[0], skip_special_tokens=True))


def _mask_ranks(seq_len: int, window: int) -> Tensor:
    """Return the order in which the places of a window are masked as the share grows: ``[seq_len]``."""
    return torch.randperm(seq_len, generator=stage_generator(MASK_SEED, "denoising", window))


def _masked_losses(model: PreTrainedModel, windows: Tensor, masked: Tensor, diffusion: Diffusion) -> Tensor:
    """Return the mean cross-entropy over the ``masked`` places of each window, as many in each: ``[b]`` float64."""
    inputs = windows.masked_fill(masked, diffusion.mask_token).to(model.device)
    logits = _aligned_logits(model, inputs, diffusion)[masked.to(model.device)]
    targets = windows[masked].to(logits.device)
    losses = [
        cross_entropy(rows.float(), wanted, reduction="none")
        for rows, wanted in zip(logits.split(_ROWS_PER_CHUNK), targets.split(_ROWS_PER_CHUNK), strict=True)
    ]
    return torch.cat(losses).view(len(windows), -1).double().mean(1).cpu()


def _aligned_logits(model: PreTrainedModel, tokens: Tensor, diffusion: Diffusion) -> Tensor:
    """Return the logits ``[b, seq_len, vocabulary]`` of each place's own token."""
    logits: Tensor = model(input_ids=tokens, use_cache=False).logits
    # As its authors do; the first token, which nothing predicts, takes its own place's.
    return torch.cat([logits[:, :1], logits[:, :-1]], dim=1) if diffusion.shifted else logits
