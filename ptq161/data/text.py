"""Reading and tokenizing text."""

from __future__ import annotations

from pathlib import Path

import torch
from torch import Tensor
from transformers import PreTrainedTokenizerBase

from ptq161.errors import UserError

BLANK_LINE = "\n\n"


def read_text(setting: str, path: str | None) -> str:
    r"""Read a UTF-8 text file unchanged, except that line ends become ``\n`` (Python's text mode).

    Raises:
        UserError: the file is not set, missing, unreadable or not UTF-8; the sentence begins with ``setting``.
    """
    if not path:
        raise UserError(f"{setting} is not set: give the path of a UTF-8 text file.")
    try:
        return Path(path).expanduser().read_text(encoding="utf-8")
    except UnicodeDecodeError as error:
        raise UserError(f"{setting}={path} is not UTF-8 text (byte {error.start}): convert it to UTF-8.") from error
    except OSError as error:
        raise UserError(f"{setting}={path} cannot be read ({error.strerror}): give a UTF-8 text file.") from error


def encode(tokenizer: PreTrainedTokenizerBase, text: str) -> Tensor:
    """Tokenize a text of any length with the tokenizer's own special tokens; int64 ``[n]``."""
    # verbose=False: texts longer than the model's context are cut into windows later, so that is no warning.
    ids = tokenizer(text, truncation=False, padding=False, verbose=False)["input_ids"]
    return torch.tensor(ids, dtype=torch.int64)


def bos_rule(tokenizer: PreTrainedTokenizerBase, tokens: Tensor) -> str:
    """Describe, for the record of a metric, whether ``tokens [n]`` of :func:`encode` begin with the BOS token."""
    if tokenizer.bos_token_id is not None and int(tokens[0]) == tokenizer.bos_token_id:
        return f"{tokenizer.bos_token} once, before the whole text"
    return "none: the tokenizer adds none"
