"""Results: runs that differ in nothing but their seed, taken together, as frames with a row each.

Usage::

    results = results_of(collect(folders).runs)
    best = results.of("ppl/boolq@512").sort_values("value").iloc[0]
"""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np
import pandas as pd

from ptq161.report.collect import FULL_PRECISION, Run
from ptq161.report.keys import config_of, describe, differing_keys
from ptq161.report.seeds import estimate
from ptq161.report.texts import NO_TEXT
from ptq161.tracking.metric_names import SIZES, better, is_perplexity

FULL, RESTORED, QUANTIZED = "full precision", "restored", "quantized"
"""Kinds of results: an unquantized model, a preprocessed one before it is quantized, and anything quantized."""
NOT_QUANTIZED = ", not quantized"
"""Follows the method in a row with the scores of a preprocessed model before it is quantized."""


@dataclasses.dataclass(frozen=True)
class Results:
    """Results: full precision first, then restored models, then what is quantized.

    Attributes:
        rows: a row per result, by its identity: ``kind``, ``method``, ``model``, ``label`` (what tells it from the
            others), ``calibration_text``, ``runs`` (one :class:`Run` for each seed), ``seeds`` (as text), ``bits`` and
            ``nominal_bits`` per weight, ``seconds`` (mean of a run over all its stages), ``peak_memory_bytes`` (the
            largest), ``commit`` and ``run_dir`` (of all runs, as text).
        config: the same rows, a column per configured key as :meth:`Run.value` takes it; None where a method does not
            read the key.
        scores: a row per result and metric, sizes among them: ``result``, ``metric``, ``value``, ``low``, ``high``,
            ``standard_error`` (:class:`ptq161.report.seeds.Estimate`).
        seconds: the rows of ``rows``, a column per stage: its mean seconds over the runs that went through it.
    """

    rows: pd.DataFrame
    config: pd.DataFrame
    scores: pd.DataFrame
    seconds: pd.DataFrame

    def select(self, chosen: pd.Series) -> Results:
        """Return the results for which ``chosen``, a truth value for each row, holds."""
        rows = self.rows[chosen]
        scores = self.scores[self.scores.result.isin(rows.index)]
        return Results(rows, self.config[chosen], scores, self.seconds[chosen])

    @property
    def quantized(self) -> Results:
        """The results of something quantized."""
        return self.select(self.rows.kind == QUANTIZED)

    def score(self, metric: str) -> pd.DataFrame:
        """Return a metric's columns of ``scores`` for each row, NaN where it has none."""
        return self.scores[self.scores.metric == metric].set_index("result").reindex(self.rows.index)

    def of(self, metric: str) -> pd.DataFrame:
        """Return the rows whose score has a place on its axis, with their scores.

        ``down`` and ``up`` say how far a score reaches: to the ends of its interval, or by its standard error; NaN for
        neither.
        """
        found = self.rows.join(self.score(metric))
        found = found[is_drawable(metric, found.value)]
        down = (found.value - found.low).clip(lower=0).fillna(found.standard_error)
        up = (found.high - found.value).clip(lower=0).fillna(found.standard_error)
        return found.assign(down=down.where(down > 0), up=up.where(up > 0))


def results_of(runs: Sequence[Run], problems: list[str] | None = None) -> Results:
    """Take runs that differ in nothing but their seed together, and add the unquantized models' scores.

    A run that repeats another one, seed included, is no further evidence: the first counts. Results are in the order
    in which each first occurs.

    Args:
        runs: finished runs.
        problems: takes a sentence that names the repetitions, but for those that took over an earlier run's numbers.
    """
    runs = _without_repetitions(runs, [] if problems is None else problems)
    restored = [run for run in runs if run.method.endswith(NOT_QUANTIZED)]  # of an earlier report
    quantized = [run for run in runs if not (run.method == FULL_PRECISION or run.method.endswith(NOT_QUANTIZED))]
    kinds = {
        FULL: _full_precision(runs),
        RESTORED: [*restored, *_restored(quantized)],
        QUANTIZED: [*quantized, *_before(quantized)],
    }
    shown = [run for found in kinds.values() for run in found]
    derived = [{"run": run, "seconds": run.total_seconds, "folder": run.run_dir or run.recorded_as} for run in shown]
    table = pd.DataFrame([vars(run) | more for run, more in zip(shown, derived, strict=True)], dtype=object)
    table = table.assign(kind=[kind for kind, found in kinds.items() for _ in found])
    rows = table.astype({"seconds": float, "peak_memory_bytes": float}).groupby("identity", sort=False)
    rows = rows.agg(
        kind=("kind", "first"),
        method=("method", "first"),
        model=("model", "first"),
        calibration_text=("calibration_text", "first"),
        seconds=("seconds", "mean"),
        peak_memory_bytes=("peak_memory_bytes", "max"),
        seeds=("seed", _joined),
        commit=("commit", _joined),
        run_dir=("folder", _joined),
        runs=("run", list),
    )
    config = config_of([found[0] for found in rows.runs], rows.index)
    seconds = pd.DataFrame([run.seconds for run in shown], dtype=float).groupby(table.identity, sort=False).mean()
    results = Results(rows.assign(label=_labels(rows, config)), config, _scores(shown), seconds)
    bits, nominal = (results.score(size).value for size in ("bits_per_weight", "nominal_bits_per_weight"))
    return dataclasses.replace(results, rows=results.rows.assign(bits=bits, nominal_bits=nominal))


def metric_names(results: Results) -> list[str]:
    """Return the names of what was scored, perplexities first; sizes are no scores."""
    names = [name for name in results.scores.metric.unique() if name not in SIZES]
    return sorted(names, key=lambda name: not is_perplexity(name))


def is_drawable(metric: str, values: pd.Series) -> pd.Series:
    """Say which values have a place on their metric's axis."""
    return np.isfinite(values) & ((values > 0) | (not is_perplexity(metric)))


def pareto_front(frame: pd.DataFrame, metric: str) -> pd.DataFrame:
    """Return the rows that no other one equals or beats in both bits and score and beats in one; by bits.

    Args:
        frame: rows with ``bits`` and the metric's ``value``.
        metric: name of the score.
    """
    frame = frame.assign(cost=-better(metric) * frame.value).dropna(subset="bits").sort_values(["bits", "cost"])
    return frame[frame.cost < frame.cost.cummin().shift(fill_value=math.inf)]


def method_name(method: str) -> str:
    """Return what a reader calls a method."""
    return "full precision" if method == FULL_PRECISION else method


def _without_repetitions(runs: Sequence[Run], problems: list[str]) -> list[Run]:
    first: dict[tuple[str, int | None], Run] = {}
    repeated = []
    for run in runs:
        other = first.setdefault((run.identity, run.seed), run)
        if other is not run and not (run.reused_from or other.reused_from):
            repeated.append(f"{run.run_dir} repeats {other.run_dir}")
    if repeated:
        problems.append(f"Runs with the same configuration, seed and sources count once: {'; '.join(repeated)}.")
    return list(first.values())


def _full_precision(runs: Sequence[Run]) -> list[Run]:
    """Return the unquantized models' scores, each model's once where all runs agree on them.

    A run with ``method=none`` goes before what quantized runs say of their models, since its record has the standard
    errors too.
    """
    found = [run for run in runs if run.method == FULL_PRECISION]
    for run in runs:
        if run.full_precision and run.method != FULL_PRECISION and not any(_agree(run, other) for other in found):
            found.append(_unquantized(run, FULL_PRECISION, run.full_precision, f"full precision {len(found)}"))
    return found


def _agree(run: Run, full: Run) -> bool:
    """Say whether ``full`` has everything that ``run`` says of its unquantized model."""
    return run.model == full.model and all(
        name in full.metrics and math.isclose(value, full.metrics[name], rel_tol=1e-9)
        for name, value in run.full_precision.items()
    )


def _restored(runs: Sequence[Run]) -> list[Run]:
    """Return the preprocessed models before they were quantized, one for each seed, and equal ones once."""
    seeds: dict[str, list[Run]] = {}
    for run in runs:
        if run.merged:
            seeds.setdefault(run.identity, []).append(run)
    found: dict[str, list[Run]] = {}
    for identity, restored in seeds.items():
        method = f"{restored[0].method}{NOT_QUANTIZED}"
        scores = [sorted(run.merged.items()) for run in restored]
        rows = [_unquantized(run, method, run.merged, f"restored {identity}") for run in restored]
        found.setdefault(repr((method, restored[0].model, scores)), rows)
    return [run for rows in found.values() for run in rows]


def _before(runs: Sequence[Run]) -> list[Run]:
    """Return the quantized models before they were finetuned, but for those that another result shows already."""

    def facts(run: Run) -> str:
        return repr((run.method, run.model, run.seed, sorted(run.metrics.items())))

    shown, found = {facts(run) for run in runs}, []
    for run in runs:
        if run.before_finetune is not None and (mine := facts(run.before_finetune)) not in shown:
            shown.add(mine)
            found.append(run.before_finetune)
    return found


def _unquantized(run: Run, method: str, metrics: Mapping[str, float], identity: str) -> Run:
    return Run(
        run_dir=None,
        method=method,
        model=run.model,
        config={key: value for key, value in run.config.items() if not key.startswith("method.")},
        metrics=metrics,
        commit=run.commit,
        seed=None if method == FULL_PRECISION else run.seed,
        calibration_text=NO_TEXT if method == FULL_PRECISION else run.calibration_text,
        identity=identity,
    )


def _scores(runs: Sequence[Run]) -> pd.DataFrame:
    rows = [
        (run.identity, metric, float(value), run.standard_errors.get(metric, math.nan))
        for run in runs
        for metric, value in run.metrics.items()
    ]
    single = pd.DataFrame(rows, columns=["result", "metric", "value", "standard_error"])
    scores = []
    for (result, metric), seeds in single.groupby(["result", "metric"], sort=False):
        found = estimate(seeds.value.tolist(), seeds.standard_error.iloc[0])
        scores.append({"result": result, "metric": metric, **dataclasses.asdict(found)})
    return pd.DataFrame(scores, columns=["result", "metric", "value", "low", "high", "standard_error"])


def _labels(rows: pd.DataFrame, config: pd.DataFrame) -> pd.Series:
    """Return for each result what tells it from the others of its method, and a number where nothing does."""
    leads = ["method", "model"] if rows.model.nunique() > 1 else ["method"]
    groups = [
        describe(config.loc[group.index], differing_keys(config.loc[group.index]), [group[lead] for lead in leads])
        for _, group in rows.assign(method=rows.method.map(method_name)).groupby("method", sort=False)
    ]
    labels = pd.concat(groups).reindex(rows.index)
    number = labels.groupby(labels).cumcount() + 1
    return labels.where(number == 1, labels + " (" + number.astype(str) + ")")


def _joined(values: Any) -> str:
    return " ".join(dict.fromkeys(str(value) for value in values if value is not None))
