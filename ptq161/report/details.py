"""What runs say of their blocks and linears, from their ``metrics.jsonl``."""

from __future__ import annotations

from collections.abc import Mapping

import pandas as pd

from ptq161.report.collect import Run
from ptq161.report.results import Results, metric_names, pareto_front
from ptq161.report.texts import comparisons
from ptq161.tracking.metric_names import is_perplexity
from ptq161.tracking.read import read_metrics

MOST_RUNS = 40
"""Runs whose ``metrics.jsonl`` is read: what a reader can tell apart in a figure, and what is read in a second."""

_PLACES = {
    "loss": ("epoch", "block"),
    "preprocess_loss": ("round", "step"),
    "finetune_loss": ("step",),
    "finetune_held_out_loss": ("step",),
    "output_error": ("kind", "block"),
    "salient_channels": ("kind", "block"),
    "code_bits": ("kind", "block"),
    "seconds": ("block",),
}
"""Number of ``metrics.jsonl`` that is drawn -> what it must belong to."""
_LINEAR = r"^(?P<of_block>\d+)\.(?:.*\.)?(?P<kind>[^.]+)$"
"""The linear ``3.self_attn.q_proj`` is ``q_proj`` of block 3."""


def chosen_runs(results: Results, most: int = MOST_RUNS) -> dict[str, Run]:
    """Choose the runs whose details are shown, by what tells them apart.

    All of them where there are few; of many, those on a Pareto front of bits and the first perplexity go first, then
    one seed of every other result, then the other seeds.

    Args:
        results: of the report.
        most: how many to choose.
    """
    results = results.quantized
    perplexity = next((name for name in metric_names(results) if is_perplexity(name)), None)
    compared = comparisons(results.of(perplexity)) if perplexity else ()
    front = [result for *_, rows in compared for result in pareto_front(rows, str(perplexity)).index]
    runs = pd.DataFrame(
        [
            (label if len(seeds) == 1 else f"{label} seed={run.seed}", run, n > 0, result not in front)
            for result, label, seeds in results.rows[["label", "runs"]].itertuples()
            for n, run in enumerate(seeds)
        ],
        columns=["label", "run", "is_further_seed", "is_off_front"],
    )
    kept = runs.sort_values(["is_further_seed", "is_off_front"], kind="stable")[:most].sort_index()
    return dict(zip(kept.label, kept.run, strict=True))


def read_details(runs: Mapping[str, Run], problems: list[str]) -> dict[str, pd.DataFrame]:
    """Read the numbers of some runs that belong to a block, a linear or a step.

    Of a number that was written twice, as after a kill, the later one counts. The experts of a mixture are one linear
    of their block, with their mean. Lines of other shapes are left out.

    Args:
        runs: what tells each from the others -> a run with a record of its own.
        problems: takes a sentence for each line that cannot be read.

    Returns:
        ``loss``, ``preprocess_loss``, ``finetune_loss``, ``finetune_held_out_loss``, ``output_error`` (relative
        squared, of a linear's outputs), ``salient_channels``, ``code_bits`` (mean bits of a linear's codes) and
        ``seconds`` -> a row per number: ``label`` of its run, ``value``, and what it belongs to: ``epoch`` or
        ``round``, ``step``, ``kind`` of linear such as ``q_proj``, ``block`` (of a window, its first).
    """
    lines = [
        line | {"label": label}
        for label, run in runs.items()
        if run.run_dir
        for line in read_metrics(run.run_dir, problems)
        if line["name"] in _PLACES and isinstance(line["value"], int | float)
    ]
    frame = pd.DataFrame(lines, columns=["label", "name", "value", "block", "epoch", "round", "step", "linear"])
    frame = frame.join(frame.linear.astype("string").str.extract(_LINEAR))
    for place in ("block", "of_block", "epoch", "round", "step"):
        number = pd.to_numeric(frame[place], errors="coerce")
        frame[place] = number.where(number % 1 == 0).astype("Int64")
    frame = frame.fillna({"block": frame.of_block, "epoch": 0, "round": 0})
    return {name: _placed(frame[frame.name == name], list(places)) for name, places in _PLACES.items()}


def _placed(lines: pd.DataFrame, places: list[str]) -> pd.DataFrame:
    lines = lines.astype({"value": float}).dropna(subset=places)
    lines = lines.drop_duplicates(["label", *places, "linear"], keep="last")
    lines = lines.groupby(["label", *places], sort=False, as_index=False).value.mean()
    numbers = [place for place in places if place != "kind"]
    runs = [run.sort_values(numbers, kind="stable") for _, run in lines.groupby("label", sort=False)]
    return pd.concat(runs or [lines], ignore_index=True)[["label", *places, "value"]].astype(
        dict.fromkeys(numbers, int)
    )
