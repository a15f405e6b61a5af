"""Reading and tokenizing text."""

from __future__ import annotations

import codecs
import stat
from pathlib import Path

import torch
from torch import Tensor
from transformers import PreTrainedTokenizerBase

from ptq161.errors import UserError
from ptq161.files.paths import absolute_path
from ptq161.files.reading import LFS_POINTER

BLANK_LINE = "\n\n"

_GIVE = "give a UTF-8 text file"
# The longer marks first: that of UTF-16 begins that of UTF-32.
_MARKS = {
    codecs.BOM_UTF8: "utf-8",
    codecs.BOM_UTF32_LE: "utf-32-le",
    codecs.BOM_UTF32_BE: "utf-32-be",
    codecs.BOM_UTF16_LE: "utf-16-le",
    codecs.BOM_UTF16_BE: "utf-16-be",
}
_PACKED = {
    b"\x1f\x8b": "gzip",
    b"PK\x03\x04": "zip",
    b"BZh": "bzip2",
    b"\xfd7zXZ\x00": "xz",
    b"\x28\xb5\x2f\xfd": "zstd",
    b"PAR1": "Parquet",
    b"%PDF-": "PDF",
}
"""First bytes of files that hold text in another form -> the name of that form."""
_HEAD_BYTES = 4096


def read_text(setting: str, path: str | None) -> str:
    r"""Read a text file as any editor writes it.

    UTF-8, or UTF-16 or UTF-32 with a byte order mark; the mark is no part of the text. Line ends become ``\n``.

    Raises:
        UserError: as :func:`check_text`, or some byte is no text; the sentence begins with ``setting``.
    """
    file = check_text(setting, path)
    try:
        data = file.read_bytes()
    except OSError as error:
        raise UserError(f"{setting}={path} cannot be read ({error.strerror}): {_GIVE}.") from error
    mark, encoding = _encoding(data)
    try:
        text = data[len(mark) :].decode(encoding)
    except UnicodeDecodeError as error:
        byte, place = error.object[error.start], error.start + len(mark)
        other = f" ({chr(byte)} in Latin-1)" if chr(byte).isprintable() and not mark else ""
        raise UserError(
            f"{setting}={path} is not {encoding.upper()} text: byte {place} is 0x{byte:02X}{other}; "
            "convert it to UTF-8."
        ) from error
    if (place := text.find("\0")) >= 0:
        raise UserError(f"{setting}={path} is no text: character {place} is NUL; {_GIVE}.")
    return text.replace("\r\n", "\n").replace("\r", "\n")


def check_text(setting: str, path: str | None) -> Path:
    """Check what the first bytes of a text file show, and return its absolute path.

    Raises:
        UserError: the file is not set, missing, unreadable, empty or no text; the sentence begins with ``setting``.
    """
    if not path:
        raise UserError(f"{setting} is not set: give the path of a UTF-8 text file.")
    file = absolute_path(setting, path)
    try:
        mode = file.stat().st_mode
        if stat.S_ISDIR(mode):
            raise UserError(f"{setting}={path} is a folder: {_GIVE}.")
        if not stat.S_ISREG(mode):
            # The text is read several times: for its hash, its check and its tokens.
            raise UserError(f"{setting}={path} is a pipe or a device, which can be read only once: {_GIVE}.")
        with file.open("rb") as opened:
            head = opened.read(_HEAD_BYTES)
    except FileNotFoundError as error:
        raise UserError(f"{setting}={path}: there is no such file; {_GIVE}.") from error
    except OSError as error:
        raise UserError(f"{setting}={path} cannot be read ({error.strerror}): {_GIVE}.") from error
    if problem := _problem(head):
        raise UserError(f"{setting}={path} {problem}.")
    return file


def _problem(head: bytes) -> str | None:
    """Return why a file that begins with ``head`` is no text, as the rest of a sentence."""
    mark, encoding = _encoding(head)
    if not head[len(mark) :].strip():
        return f"is empty: {_GIVE}" if len(head) < _HEAD_BYTES else None
    if head.startswith(LFS_POINTER):
        return "is only git-lfs's pointer to a text: fetch the text with `git lfs pull`"
    for first, name in _PACKED.items():
        if head.startswith(first):
            return f"is a {name} file: {_GIVE}, unpacked"
    if encoding == "utf-8" and b"\0" in head:
        return f"is no UTF-8 text: byte {head.index(0)} is NUL; convert it to UTF-8"
    return None


def _encoding(data: bytes) -> tuple[bytes, str]:
    """Return the byte order mark that ``data`` begins with, and the encoding that it means; none means UTF-8."""
    return next(((mark, name) for mark, name in _MARKS.items() if data.startswith(mark)), (b"", "utf-8"))


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
