"""Results: runs that differ in nothing but their seed, taken together, and what tells results apart.

Usage::

    results = results_of(collect(folders).runs)
    rows = [*baselines(results), *quantized(results)]
"""

from __future__ import annotations

import dataclasses
import functools
import math
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from ptq161.report.collect import FULL_PRECISION, MERGED, Run
from ptq161.report.seeds import GROUPS, Estimate, estimate
from ptq161.tracking.metric_names import SIZES, is_perplexity

UNREAD = ("seed", "tracker", "hydra", "debug")
"""Keys that tell no results apart."""


@dataclasses.dataclass(frozen=True)
class Result:
    """Runs that differ in nothing but their seed.

    Attributes:
        runs: one for each seed, at least one.
    """

    runs: tuple[Run, ...]

    @property
    def method(self) -> str:
        """Name of the method."""
        return self.runs[0].method

    @property
    def model(self) -> str:
        """Name of the model."""
        return self.runs[0].model

    @property
    def seeds(self) -> list[int]:
        """The seeds."""
        return [run.seed for run in self.runs if run.seed is not None]

    @functools.cached_property
    def estimates(self) -> Mapping[str, Estimate]:
        """Metric name -> its value over the seeds that have it, sizes among them."""
        names = dict.fromkeys(name for run in self.runs for name in run.metrics)
        errors = self.runs[0].standard_errors
        return {
            name: estimate([run.metrics[name] for run in self.runs if name in run.metrics], errors.get(name))
            for name in names
        }

    @functools.cached_property
    def metrics(self) -> Mapping[str, float]:
        """Metric name -> its mean over the seeds."""
        return {name: found.value for name, found in self.estimates.items()}

    @property
    def bits(self) -> float | None:
        """Measured bits per weight."""
        return self.metrics.get("bits_per_weight")

    @property
    def nominal_bits(self) -> float | None:
        """Bits per weight as the method's paper counts them."""
        return self.metrics.get("nominal_bits_per_weight")

    @property
    def seconds(self) -> Mapping[str, float]:
        """Stage -> its mean seconds over the runs that went through it."""
        stages = dict.fromkeys(stage for run in self.runs for stage in run.seconds)
        return {stage: _mean([run.seconds[stage] for run in self.runs if stage in run.seconds]) for stage in stages}

    @property
    def total_seconds(self) -> float | None:
        """Mean seconds of a run over all its stages."""
        found = [run.total_seconds for run in self.runs if run.total_seconds is not None]
        return _mean(found) if found else None

    @property
    def peak_memory_bytes(self) -> float | None:
        """The largest of the runs' peaks."""
        return max((run.peak_memory_bytes for run in self.runs if run.peak_memory_bytes is not None), default=None)

    @property
    def commit(self) -> str | None:
        """Commits of the sources."""
        return " ".join(dict.fromkeys(run.commit for run in self.runs if run.commit)) or None

    def value(self, key: str) -> Any:
        """Return a configured value by its key, as :meth:`ptq161.report.collect.Run.value` does."""
        return self.runs[0].value(key)


def results_of(runs: Sequence[Run], problems: list[str] | None = None) -> list[Result]:
    """Take runs that differ in nothing but their seed together, in the order in which each result first occurs.

    A run that repeats another one, seed included, is no further evidence: the first counts.

    Args:
        runs: finished runs.
        problems: takes a sentence that names the repetitions, but for those that took over an earlier run's numbers.
    """
    found: dict[str, dict[int | None, Run]] = {}
    repeated = []
    for run in runs:
        seeds = found.setdefault(run.identity, {})
        if run.seed in seeds and not (run.reused_from or seeds[run.seed].reused_from):
            repeated.append(f"{run.run_dir} repeats {seeds[run.seed].run_dir}")
        seeds.setdefault(run.seed, run)
    if repeated and problems is not None:
        problems.append(f"Runs with the same configuration, seed and sources count once: {'; '.join(repeated)}.")
    return [Result(tuple(seeds.values())) for seeds in found.values()]


def baselines(results: Sequence[Result]) -> list[Result]:
    """Return the unquantized models' scores, each model's once where all runs agree on them.

    A run with ``method=none`` goes before what quantized runs say of their models, since its record has the standard
    errors too. Preprocessed models, before they were quantized, follow.
    """
    found = [result for result in results if result.method == FULL_PRECISION]
    for run in [run for result in quantized(results) for run in result.runs]:
        if run.full_precision and not any(_agree(run, other) for other in found):
            found.append(Result((_baseline(run, FULL_PRECISION, run.full_precision),)))
    merged: dict[tuple[Any, ...], Result] = {}
    for result in quantized(results):
        rows = tuple(_baseline(run, f"{run.method}{MERGED}", run.merged) for run in result.runs if run.merged)
        if rows:
            scores = (tuple(sorted(row.metrics.items())) for row in rows)
            merged.setdefault((result.model, result.method, *scores), Result(rows))
    return [*found, *merged.values()]


def quantized(results: Sequence[Result]) -> list[Result]:
    """Return the results of something quantized."""
    return [result for result in results if is_quantized(result)]


def is_quantized(result: Result) -> bool:
    """Say whether a result is of something quantized, and no baseline."""
    return result.method != FULL_PRECISION and not result.method.endswith(MERGED)


def differing_keys(results: Sequence[Result]) -> list[str]:
    """Return the configured keys in which results differ, ``method``, ``model`` and ``seed`` left out.

    Two results are compared on a group's keys only where both chose the same option of the group: BiLLM and RTN do not
    differ in ``method.bits``. A key that repeats another one, as ``method.compute_dtype`` does ``dtype``, is left out.
    """
    keys = sorted(dict.fromkeys(key for r in results for key in r.runs[0].config), key=lambda key: "." in key)
    found: dict[str, list[Any]] = {}
    for key in keys:
        group, _, leaf = key.partition(".")
        if group in UNREAD or key in ("method.name", "model.name", "method._target_"):
            continue
        chooses = group in GROUPS and leaf == "name"
        name = group if chooses else key
        values = [result.value(name) for result in results]
        if _differs(results, group if leaf and not chooses else "", values) and not _repeats(values, found):
            found[name] = values
    return list(found)


def swept_numbers(results: Sequence[Result]) -> list[str]:
    """Return the differing keys whose values are numbers wherever a method reads them, with two values at least."""
    found = []
    for key in differing_keys(results):
        values = {value for value in (result.value(key) for result in results) if value is not None}
        if len(values) > 1 and all(isinstance(v, int | float) and not isinstance(v, bool) for v in values):
            found.append(key)
    return found


def metric_names(results: Sequence[Result | Run]) -> list[str]:
    """Return the names of what was scored, perplexities first; sizes are no scores."""
    names = dict.fromkeys(name for result in results for name in result.metrics if name not in SIZES)
    return sorted(names, key=lambda name: not is_perplexity(name))


def drawable(metric: str, value: float | None) -> bool:
    """Say whether a value has a place on its metric's axis."""
    return value is not None and math.isfinite(value) and (value > 0 or not is_perplexity(metric))


def pareto_front(results: Sequence[Result], metric: str) -> list[Result]:
    """Return the results that no other one equals or beats in both bits and score and beats in one; by bits."""
    sign = 1 if is_perplexity(metric) else -1
    points = [
        (result.bits, sign * result.metrics[metric], i)
        for i, result in enumerate(results)
        if result.bits is not None and drawable(metric, result.metrics.get(metric))
    ]
    front: list[Result] = []
    best = math.inf
    for _, score, i in sorted(points):
        if score < best:
            best = score
            front.append(results[i])
    return front


def method_name(method: str) -> str:
    """Return what a reader calls a method."""
    return "full precision" if method == FULL_PRECISION else method


def label(result: Result, keys: Sequence[str], *, model: bool = False) -> str:
    """Return what tells a result from others: its method, its model if asked, and its values of ``keys``.

    Keys are named by their last part, ``n_samples=32`` for ``calib.n_samples``, and so are paths.
    """
    named = [(key.rpartition(".")[2], result.value(key)) for key in keys if result.value(key) is not None]
    values = [f"{key}={Path(value).name if isinstance(value, str) else value}" for key, value in named]
    return " ".join([method_name(result.method), *([result.model] if model else []), *values])


def labels(results: Sequence[Result]) -> list[str]:
    """Return for each result what tells it from the others of its method."""
    groups: dict[str, list[Result]] = {}
    for result in results:
        groups.setdefault(result.method, []).append(result)
    keys = {method: differing_keys(group) for method, group in groups.items()}
    several = len({result.model for result in results}) > 1
    return [label(result, keys[result.method], model=several) for result in results]


def _baseline(run: Run, method: str, metrics: Mapping[str, float]) -> Run:
    return Run(
        run_dir=None,
        method=method,
        model=run.model,
        config={key: value for key, value in run.config.items() if not key.startswith("method.")},
        metrics=metrics,
        commit=run.commit,
        seed=None if method == FULL_PRECISION else run.seed,
    )


def _agree(run: Run, full: Result) -> bool:
    """Say whether ``full`` has everything that ``run`` says of its unquantized model."""
    metrics = full.runs[0].metrics
    return run.model == full.model and all(
        name in metrics and math.isclose(value, metrics[name], rel_tol=1e-9)
        for name, value in run.full_precision.items()
    )


def _differs(results: Sequence[Result], group: str, values: Sequence[Any]) -> bool:
    """Say whether a key differs between results with the same option of its group; ``group`` is empty for others."""
    different: dict[Any, set[str]] = {}
    for result, value in zip(results, values, strict=True):
        # Without a group, None says that the method does not read the key.
        if group or value is not None:
            different.setdefault(result.value(group) if group else None, set()).add(repr(value))
    return any(len(found) > 1 for found in different.values())


def _repeats(values: Sequence[Any], found: Mapping[str, Sequence[Any]]) -> bool:
    return any(
        all(value is None or value == other for value, other in zip(values, others, strict=True))
        for others in found.values()
    )


def _mean(values: Sequence[float]) -> float:
    return math.fsum(values) / len(values)
