"""Calibration tokens: windows at random places of a text (GPTQ's ``datautils.py``)."""

from __future__ import annotations

import logging
from collections.abc import Sequence
from pathlib import Path

import torch
from torch import Tensor
from transformers import PreTrainedTokenizerBase

from ptq161.data.embedded import passages
from ptq161.data.hub_text import HUB_TEXTS, hub_documents
from ptq161.data.masking import mask_linearly
from ptq161.data.settings import CalibConfig
from ptq161.data.text import BLANK_LINE, encode, read_text
from ptq161.errors import UserError
from ptq161.seeding import stage_generator

log = logging.getLogger(__name__)

CALIBRATION_INSTEAD = "use calib=squad, or calib=text_file calib.text_file=FILE"
# What joins the training documents to one text: wikitext2 as in PTQ1.61 and GPTQ (the released BiLLM joins by a space),
# ptb as in GPTQ's `get_ptb_new`. The sets that are missing here are sampled document by document.
CALIBRATION_JOINERS = {"wikitext2": BLANK_LINE, "ptb": " "}


def calibration_tokens(
    tokenizer: PreTrainedTokenizerBase, config: CalibConfig, seed: int, *, hub_root: Path | None = None
) -> Tensor:
    """Draw calibration windows at random starts; overlap is allowed (GPTQ's ``datautils.py``), masked if wanted.

    The embedded sets, ``wikitext2``, ``ptb`` and ``text_file`` are tokenized as one text. ``c4`` (its first training
    shard) and ``redpajama`` are sampled by documents: a window lies in a random document that is longer than
    ``seq_len`` tokens.

    Args:
        tokenizer: called with its defaults, so it adds BOS where its model wants it, once per tokenized text.
        config: the set, the number of windows, their length, and whether they are masked.
        seed: of the run; the draw depends on nothing else.
        hub_root: local copy in place of the hub (see :func:`ptq161.data.hub_text.hub_documents`).

    Returns:
        int64 ``[n_samples, seq_len]``.

    Raises:
        UserError: the text cannot be fetched or read, or is shorter than one window.
    """
    tokens = _visible_tokens(tokenizer, config, seed, hub_root)
    if config.masking == "none":
        return tokens
    assert config.mask_token is not None, "CalibConfig refuses masking without a mask token"
    return mask_linearly(
        tokens, config.mask_token, config.masking_prefix, lambda i: stage_generator(seed, "calibration masking", i)
    )


def _visible_tokens(
    tokenizer: PreTrainedTokenizerBase, config: CalibConfig, seed: int, hub_root: Path | None
) -> Tensor:
    generator = stage_generator(seed, "calibration")
    if config.name in HUB_TEXTS:
        rows = hub_documents(config.name, "train", CALIBRATION_INSTEAD, hub_root)
        if config.name not in CALIBRATION_JOINERS:
            return _windows_of_documents(tokenizer, rows["text"], config, generator)
        text = CALIBRATION_JOINERS[config.name].join(rows["text"])
    elif config.name == "text_file":
        text = read_text("calib.text_file", config.text_file)
    else:
        text = BLANK_LINE.join(passages(config.name))
    return _windows_of_text(encode(tokenizer, text), config, generator)


def _windows_of_text(tokens: Tensor, config: CalibConfig, generator: torch.Generator) -> Tensor:
    """Cut ``[n_samples, seq_len]`` out of ``tokens [n]``."""
    n = len(tokens)
    if n < config.seq_len:
        raise UserError(
            f"calib.seq_len={config.seq_len} is more than the {n} tokens of calib={config.name}: "
            f"set calib.seq_len to at most {n}, or use a longer text."
        )
    wanted = config.n_samples * config.seq_len
    if wanted > n:
        log.warning(
            "calib.n_samples=%d x calib.seq_len=%d = %d tokens are more than the %d of calib=%s: windows overlap",
            config.n_samples,
            config.seq_len,
            wanted,
            n,
            config.name,
        )
    starts = torch.randint(n - config.seq_len + 1, (config.n_samples,), generator=generator)
    return torch.stack([tokens[start : start + config.seq_len] for start in starts.tolist()])


def _windows_of_documents(
    tokenizer: PreTrainedTokenizerBase, documents: Sequence[str], config: CalibConfig, generator: torch.Generator
) -> Tensor:
    """Cut a window out of each document that is long enough, in random order, again and again until all are drawn."""
    windows: list[Tensor] = []
    longest = 0
    while len(windows) < config.n_samples:
        before = len(windows)
        for index in torch.randperm(len(documents), generator=generator).tolist():
            tokens = encode(tokenizer, documents[index])
            longest = max(longest, len(tokens))
            if len(tokens) > config.seq_len:
                start = int(torch.randint(len(tokens) - config.seq_len + 1, (), generator=generator))
                windows.append(tokens[start : start + config.seq_len])
            if len(windows) == config.n_samples:
                break
        if len(windows) == before:
            raise UserError(
                f"calib.seq_len={config.seq_len} is not below the longest document of calib={config.name}, which has "
                f"{longest} tokens: set calib.seq_len to at most {longest - 1}."
            )
    return torch.stack(windows)
