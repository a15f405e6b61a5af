"""What a run says of its blocks and linears, from its ``metrics.jsonl``."""

from __future__ import annotations

import collections
import dataclasses
from collections.abc import Iterable, Mapping, Sequence
from typing import Any

from ptq161.report.collect import Run
from ptq161.report.results import Result, metric_names, pareto_front, quantized
from ptq161.tracking.metric_names import is_perplexity
from ptq161.tracking.read import read_metrics

MOST_RUNS = 40
"""Runs whose ``metrics.jsonl`` is read: what a reader can tell apart in a figure, and what is read in a second."""

Grid = Mapping[str, Mapping[int, float]]
"""Kind of linear, such as ``q_proj`` -> decoder block -> value."""


@dataclasses.dataclass(frozen=True)
class Details:
    """The numbers of one run that belong to a block or a linear; each is empty where the method has none.

    Attributes:
        run: the run.
        label: what tells it from the others.
        loss: epoch -> first block of the window -> mean loss.
        preprocess_loss: round -> step -> loss.
        error: relative squared error of a linear's outputs.
        salient: salient input channels of a linear.
        seconds: first block of the window -> seconds.
    """

    run: Run
    label: str
    loss: Mapping[int, Mapping[int, float]]
    preprocess_loss: Mapping[int, Mapping[int, float]]
    error: Grid
    salient: Grid
    seconds: Mapping[int, float]


def chosen_runs(results: Sequence[Result], labels: Sequence[str], most: int = MOST_RUNS) -> list[tuple[Run, str]]:
    """Choose the runs whose details are shown, with what tells them apart.

    All of them where there are few; of many, those on the Pareto front of bits and the first perplexity go first, then
    one seed of every other result, then the other seeds.

    Args:
        results: of the report.
        labels: what tells each result from the others.
        most: how many to choose.
    """
    named = {id(result): text for result, text in zip(results, labels, strict=True)}
    rows = [result for result in quantized(results) if result.runs[0].run_dir]
    perplexities = [name for name in metric_names(rows) if is_perplexity(name)]
    front = pareto_front(rows, perplexities[0]) if perplexities else []
    first = {id(result) for result in front}
    ordered = [*front, *(result for result in rows if id(result) not in first)]
    firsts = [(result, result.runs[0]) for result in ordered]
    others = [(result, run) for result in ordered for run in result.runs[1:]]
    kept = {id(run) for _, run in [*firsts, *others][:most]}
    return [
        (run, named[id(result)] + (f" seed={run.seed}" if len(result.runs) > 1 else ""))
        for result in rows
        for run in result.runs
        if id(run) in kept
    ]


def read_details(run: Run, label: str, problems: list[str]) -> Details:
    """Read a run's details.

    Of a number that was written twice, as after a kill, the later one counts. Lines of other shapes are left out.

    Args:
        run: with a record of its own.
        label: what tells it from the others.
        problems: takes a sentence for each line that cannot be read.
    """
    assert run.run_dir is not None
    by_name: dict[str, list[dict[str, Any]]] = collections.defaultdict(list)
    for entry in read_metrics(run.run_dir, problems):
        if isinstance(entry["value"], int | float):
            by_name[str(entry["name"])].append(entry)
    return Details(
        run=run,
        label=label,
        loss=_nested(by_name["loss"], "epoch", "block"),
        preprocess_loss=_nested(by_name["preprocess_loss"], "round", "step"),
        error=_grid(by_name["output_error"]),
        salient=_grid(by_name["salient_channels"]),
        seconds={entry["block"]: entry["value"] for entry in by_name["seconds"] if isinstance(entry.get("block"), int)},
    )


def _nested(entries: Iterable[Mapping[str, Any]], outer: str, inner: str) -> dict[int, dict[int, float]]:
    found: dict[int, dict[int, float]] = {}
    for entry in entries:
        first, second = entry.get(outer, 0), entry.get(inner)
        if isinstance(first, int) and isinstance(second, int):
            found.setdefault(first, {})[second] = entry["value"]
    return {key: dict(sorted(values.items())) for key, values in sorted(found.items())}


def _grid(entries: Iterable[Mapping[str, Any]]) -> Grid:
    """Order values by the kind of linear and its block: the linear ``3.self_attn.q_proj`` is ``q_proj`` of block 3."""
    found: dict[str, dict[int, float]] = {}
    for entry in entries:
        block, _, path = str(entry.get("linear", "")).partition(".")
        if block.isdecimal() and path:
            found.setdefault(path.rpartition(".")[2], {})[int(block)] = entry["value"]
    return found
