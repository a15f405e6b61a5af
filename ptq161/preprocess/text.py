"""Training text, tokenized once and packed into sequences without padding.

No evaluation sees what is trained on: the embedded passages share no run of 13 words with the perplexity text (BoolQ,
LAMBADA), the hub's texts are training splits, and the file that ``eval.text_file`` scores is refused
(:mod:`ptq161.preflight`).
"""

from __future__ import annotations

import contextlib
import hashlib
import logging
import tempfile
from collections.abc import Iterator, Sequence
from pathlib import Path

import torch
from safetensors import SafetensorError
from safetensors.torch import load_file, save
from torch import Tensor
from transformers import PreTrainedTokenizerBase

from ptq161.assets import cache_dir
from ptq161.data import encode, passages, read_text
from ptq161.errors import UserError
from ptq161.hub_text import HUB_TEXTS, hub_documents
from ptq161.preprocess.restoration import Restoration
from ptq161.seeding import stage_generator
from ptq161.tracking.files import write_atomically

log = logging.getLogger(__name__)

# Documents are read until there are so many characters per token that is wanted: no tokenizer in use takes more.
CHARACTERS_PER_TOKEN = 8
INSTEAD = "use preprocess.corpora=[squad,drop,coqa], or preprocess.corpora=[text_file] preprocess.text_file=FILE"


def training_tokens(
    tokenizer: PreTrainedTokenizerBase, restoration: Restoration, seed: int, *, hub_root: Path | None = None
) -> Tensor:
    """Return the sequences of a training, documents of all its corpora in random order one after the other.

    Args:
        tokenizer: each document gets its special tokens, and its end token at the end where it has one.
        restoration: corpora, sequence length, and how many sequences a round takes; fewer are returned where the text
            is shorter, and each is then used more than once.
        seed: of the run; the order of the documents follows from it.
        hub_root: local copy in place of the hub (see :func:`ptq161.hub_text.hub_documents`).

    Returns:
        int64 ``[n, seq_len]``.

    Raises:
        UserError: a text is out of reach, unreadable, or all of it is shorter than one sequence.
    """
    wanted = restoration.sequences * restoration.seq_len
    documents = list(_until(_shuffled(restoration, seed, hub_root), CHARACTERS_PER_TOKEN * wanted))
    tokens = _encode_once(tokenizer, documents)
    n = min(len(tokens) // restoration.seq_len, restoration.sequences)
    if n == 0:
        raise UserError(
            f"preprocess.seq_len={restoration.seq_len} is more than the {len(tokens)} tokens of "
            f"preprocess.corpora={restoration.corpora}: set preprocess.seq_len to at most {len(tokens)}."
        )
    if n < restoration.sequences:
        log.info("training takes %d sequences and the text has %d: they are repeated", restoration.sequences, n)
    return tokens[: n * restoration.seq_len].view(n, restoration.seq_len)


def _shuffled(restoration: Restoration, seed: int, hub_root: Path | None) -> Iterator[str]:
    """Yield the documents of all corpora in random order."""
    sources: list[Sequence[str]] = [_documents(name, restoration, hub_root) for name in restoration.corpora]
    ends = torch.tensor([len(source) for source in sources]).cumsum(0)
    for index in torch.randperm(int(ends[-1]), generator=stage_generator(seed, "restoration text")).tolist():
        source = int(torch.searchsorted(ends, index, right=True))
        yield sources[source][index - (int(ends[source - 1]) if source else 0)]


def _documents(name: str, restoration: Restoration, hub_root: Path | None) -> Sequence[str]:
    if name in HUB_TEXTS:
        documents: Sequence[str] = hub_documents(name, "train", INSTEAD, hub_root)["text"]
        return documents
    if name == "text_file":
        return [read_text("preprocess.text_file", restoration.text_file)]
    return passages(name)


def _until(documents: Iterator[str], characters: int) -> Iterator[str]:
    for document in documents:
        yield document
        characters -= len(document)
        if characters <= 0:
            return


def _encode_once(tokenizer: PreTrainedTokenizerBase, documents: list[str]) -> Tensor:
    """Tokenize documents one after the other, int64 ``[n]``, or take what an earlier run has made of the same ones."""
    file = cache_dir() / "tokens" / f"{_key(tokenizer, documents)}.safetensors"
    with contextlib.suppress(OSError, SafetensorError, KeyError):
        return load_file(file)["tokens"].long()
    end = [] if tokenizer.eos_token_id is None else [torch.tensor([tokenizer.eos_token_id])]
    parts = [part for document in documents for part in (encode(tokenizer, document), *end)]
    tokens = torch.cat(parts) if parts else torch.empty(0, dtype=torch.int64)
    _keep(file, save({"tokens": tokens.int()}))
    return tokens


def _key(tokenizer: PreTrainedTokenizerBase, documents: list[str]) -> str:
    digest = hashlib.sha256(repr((type(tokenizer).__name__, tokenizer.eos_token_id)).encode())
    digest.update(_tokenizer_content(tokenizer))
    for document in documents:
        content = document.encode()
        digest.update(b"%d\0" % len(content))
        digest.update(content)
    return digest.hexdigest()


def _tokenizer_content(tokenizer: PreTrainedTokenizerBase) -> bytes:
    with tempfile.TemporaryDirectory() as folder:
        tokenizer.save_pretrained(folder)
        return b"".join(file.read_bytes() for file in sorted(Path(folder).iterdir()) if file.is_file())


def _keep(file: Path, content: bytes) -> None:
    """Write a file at once; a cache that cannot be written is no reason to end a run."""
    try:
        file.parent.mkdir(parents=True, exist_ok=True)
        write_atomically(file, content)
    except (OSError, UserError) as error:
        log.warning("the tokens of the training text are not kept: %s", error)
