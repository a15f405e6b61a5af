"""Texts of the Hugging Face hub that the papers calibrate and score on: a table of pinned files.

``datasets`` runs no data set scripts anymore, so each text is a list of plain files at a fixed revision. A file that
is in the local hub cache is used without the network (a compute node behind a firewall needs nothing else).

Verified without the hub: each layout, on a small local copy (``root``). Not verified: that the hub still serves these
files. ``wikitext2``, ``c4`` and ``redpajama`` are pinned to commits; ``ptb`` is the hub's own conversion of a data set
that was a script, a branch that has no commit to rely on.
"""

from __future__ import annotations

import dataclasses
import functools
import json
from collections.abc import Mapping
from pathlib import Path

import datasets
import huggingface_hub
from huggingface_hub.errors import LocalEntryNotFoundError

from ptq161.data import hub
from ptq161.errors import UserError


@dataclasses.dataclass(frozen=True)
class HubText:
    """The files of a text on the hub.

    Attributes:
        repo: data set on the hub.
        revision: commit, or a branch where no commit can be relied on.
        layout: ``parquet``, or ``jsonl`` for one JSON object a line (``.gz`` is unpacked).
        column: the field that holds the text.
        files: split -> files in the repository, in order.
    """

    repo: str
    revision: str
    layout: str
    column: str
    files: Mapping[str, tuple[str, ...]]


_REDPAJAMA_PARTS = (
    "arxiv",
    "book",
    "c4",
    "cc_2019-30",
    "cc_2020-05",
    "cc_2021-04",
    "cc_2022-05",
    "cc_2023-06",
    "github",
    "stackexchange",
    "wikipedia",
)

HUB_TEXTS = {
    "wikitext2": HubText(
        repo="Salesforce/wikitext",
        revision="b08601e04326c79dfdd32d625aee71d232d685c3",
        layout="parquet",
        column="text",
        files={
            "train": ("wikitext-2-raw-v1/train-00000-of-00001.parquet",),
            "test": ("wikitext-2-raw-v1/test-00000-of-00001.parquet",),
        },
    ),
    "c4": HubText(
        repo="allenai/c4",
        revision="1588ec454efa1a09f29cd18ddd04fe05fc8653a2",
        layout="jsonl",
        column="text",
        files={
            "train": ("en/c4-train.00000-of-01024.json.gz",),
            "validation": ("en/c4-validation.00000-of-00008.json.gz",),
        },
    ),
    "ptb": HubText(
        repo="ptb-text-only/ptb_text_only",
        revision="refs/convert/parquet",
        layout="parquet",
        column="sentence",
        files={
            "train": ("penn_treebank/train/0000.parquet",),
            "test": ("penn_treebank/test/0000.parquet",),
        },
    ),
    "redpajama": HubText(
        repo="togethercomputer/RedPajama-Data-1T-Sample",
        revision="98f93b765c118b999b1af570c3e399c207d08da7",
        layout="jsonl",
        column="text",
        files={"train": tuple(f"{part}_sample.jsonl" for part in _REDPAJAMA_PARTS)},
    ),
}


def hub_documents(name: str, split: str, instead: str, root: Path | None = None) -> datasets.Dataset:
    """Open a text of the hub.

    Args:
        name: a key of ``HUB_TEXTS``.
        split: one of its splits.
        instead: advice for a user without the hub, for the error.
        root: a folder with the same layout, ``<root>/<repo>/<file>``, in place of the hub.

    Returns:
        a memory-mapped data set with the one column ``text``, a document a row.

    Raises:
        UserError: a file is not in the local cache and cannot be fetched.
    """
    text, paths = HUB_TEXTS[name], hub_files(name, split, instead, root)
    if text.layout == "parquet":
        rows = datasets.load_dataset("parquet", data_files=paths, split="train", columns=[text.column])
        return rows if text.column == "text" else rows.rename_column(text.column, "text")
    # Lines are decoded when a row is read: the json builder needs one type per field over all files, and RedPajama's
    # metadata differ.
    lines = datasets.load_dataset("text", data_files=paths, split="train")
    return lines.with_transform(lambda batch: {"text": [json.loads(line)[text.column] for line in batch["text"]]})


def hub_files(name: str, split: str, instead: str, root: Path | None = None) -> list[str]:
    """Return the local paths of a text's files, fetching what the hub's cache lacks.

    Arguments and errors are those of :func:`hub_documents`.
    """
    text = HUB_TEXTS[name]
    return [str(root / text.repo / file) if root else _download(text, file, instead) for file in text.files[split]]


def _download(text: HubText, file: str, instead: str) -> str:
    """Return the local path of a file; fetch it where the hub's cache lacks it."""
    get = functools.partial(
        huggingface_hub.hf_hub_download, text.repo, file, repo_type="dataset", revision=text.revision
    )
    try:
        return str(get(local_files_only=True))
    except LocalEntryNotFoundError:
        pass
    sentence = f"{file} of the Hugging Face data set {text.repo} is needed and cannot be fetched"
    if not hub.is_reachable():
        raise UserError(f"{sentence}, because the hub cannot be reached: {instead}.")
    try:
        return str(get())
    except OSError as error:  # what every exception of the hub and a full disk derive from
        raise UserError(f"{sentence} ({type(error).__name__}): {instead}.") from error
