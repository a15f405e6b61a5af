"""Compare two records of one configuration: every number, the hashes, and the environment."""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Iterator, Mapping
from typing import Any, NamedTuple

from ptq161.tracking.read import RunData

_TRAININGS = ("preprocess_tokens_per_second", "preprocess_quantize_seconds", "finetune_tokens_per_second")
_CLOCK = frozenset({"time", "seconds", "peak_memory_bytes", "schema_version", *_TRAININGS})
"""Names of values that are not results of the computation: times, memory, the version of the layout."""
_LINES = "metrics.jsonl"
_ENVIRONMENT = ("git", "sources_sha256", "versions", "hardware", "threads", "device", "dtype")
"""Keys of the manifest that may explain a difference."""


class Place(NamedTuple):
    """Where a record holds a value.

    Attributes:
        source: a top-level key of ``results.json``, or ``metrics.jsonl``.
        name: of the value.
        where: what it belongs to, such as block and epoch; empty for a value of the whole run.
    """

    source: str
    name: str
    where: str


@dataclasses.dataclass(frozen=True)
class MetricComparison:
    """All values of one name.

    Attributes:
        source: as in :class:`Place`.
        name: as in :class:`Place`.
        n_values: number of values that both records have.
        n_different: number of those that differ by more than the tolerance.
        largest_relative_difference: relative to the larger of the two values.
        where: the place of the largest difference; None if there is no difference.
        recorded: the value there.
        replayed: the value there.
    """

    source: str
    name: str
    n_values: int
    n_different: int
    largest_relative_difference: float
    where: str | None
    recorded: Any
    replayed: Any


@dataclasses.dataclass(frozen=True)
class Comparison:
    """The differences between a recorded run and its replay.

    Attributes:
        tolerance: relative difference up to which two numbers count as equal.
        metrics: one entry per name.
        missing: places where only the recorded run has a value.
        extra: places where only the replay has a value, as a later version of the package may.
        hashes: name -> SHA-256 (recorded, replayed) of model, calibration tokens and checkpoint.
        environment: key -> values of the two manifests (recorded, replayed), where they differ.
    """

    tolerance: float
    metrics: list[MetricComparison]
    missing: list[Place]
    extra: list[Place]
    hashes: dict[str, tuple[str | None, str | None]]
    environment: dict[str, tuple[Any, Any]]

    @property
    def n_values(self) -> int:
        """Values that both records have."""
        return sum(metric.n_values for metric in self.metrics)

    @property
    def n_different(self) -> int:
        """Values that differ by more than the tolerance."""
        return sum(metric.n_different for metric in self.metrics)

    @property
    def differing_hashes(self) -> list[str]:
        """Names of the hashes that differ."""
        return [name for name, (recorded, replayed) in self.hashes.items() if recorded != replayed]

    @property
    def equal(self) -> bool:
        """Whether every recorded value was reproduced within the tolerance, and every hash if the tolerance is 0."""
        numbers = not self.n_different and not self.missing
        return numbers and (self.tolerance > 0 or not self.differing_hashes)

    def document(self) -> dict[str, Any]:
        """Return the comparison as the content of ``replay.json``."""

        def named(pairs: Mapping[str, tuple[Any, Any]]) -> dict[str, dict[str, Any]]:
            return {key: {"recorded": recorded, "replayed": replayed} for key, (recorded, replayed) in pairs.items()}

        return {
            "equal": self.equal,
            "tolerance": self.tolerance,
            "n_values": self.n_values,
            "n_different": self.n_different,
            "metrics": [dataclasses.asdict(metric) for metric in self.metrics],
            "missing": [place._asdict() for place in self.missing],
            "extra": [place._asdict() for place in self.extra],
            "hashes": named(self.hashes),
            "environment": named(self.environment),
        }


def compare(recorded: RunData, replayed: RunData, tolerance: float = 0.0) -> Comparison:
    """Compare two finished runs.

    Args:
        recorded: the original run.
        replayed: its replay.
        tolerance: relative difference up to which two numbers count as equal; 0 requires the same bits.
    """
    before, after = _values(recorded), _values(replayed)
    shared: dict[tuple[str, str], list[Place]] = {}
    for place in before:
        if place in after:
            shared.setdefault((place.source, place.name), []).append(place)
    return Comparison(
        tolerance=tolerance,
        metrics=[_compare_metric(places, before, after, tolerance) for places in shared.values()],
        missing=[place for place in before if place not in after],
        extra=[place for place in after if place not in before],
        hashes={
            name: (value, replayed.manifest.get(name))
            for name, value in recorded.manifest.items()
            if name.endswith("_sha256") and name not in _ENVIRONMENT
        },
        environment=_environment_differences(recorded.manifest, replayed.manifest),
    )


def _values(run: RunData) -> dict[Place, Any]:
    """Return all values in ``results.json`` and ``metrics.jsonl`` that are results of the computation.

    Of a value that was written twice, as an interrupted run may do, the last one counts.
    """
    found = {
        Place(source, path[-1], "/".join(path[:-1])): value
        for source, part in (run.results or {}).items()
        if source not in _CLOCK
        for path, value in _leaves(part, ())
    }
    for line in run.metrics:
        if line["name"] not in _CLOCK:
            where = {key: value for key, value in line.items() if key not in ("time", "name", "value")}
            place = Place(_LINES, line["name"], " ".join(f"{key}={value}" for key, value in sorted(where.items())))
            found[place] = line["value"]
    return found


def _relative_difference(a: Any, b: Any) -> float:
    """Return ``|a - b| / max(|a|, |b|)`` of two numbers: 0 for equal values and for two NaN.

    It is infinite for different values of which one is not a finite number.
    """
    if a == b or (a != a and b != b):
        return 0.0
    if not (_is_number(a) and _is_number(b) and math.isfinite(a) and math.isfinite(b)):
        return math.inf
    return float(abs(a - b) / max(abs(a), abs(b)))


def _compare_metric(
    places: list[Place], before: Mapping[Place, Any], after: Mapping[Place, Any], tolerance: float
) -> MetricComparison:
    differences = [_relative_difference(before[place], after[place]) for place in places]
    largest = max(differences)
    worst = places[differences.index(largest)]
    return MetricComparison(
        source=worst.source,
        name=worst.name,
        n_values=len(places),
        n_different=sum(difference > tolerance for difference in differences),
        largest_relative_difference=largest,
        where=worst.where if largest else None,
        recorded=before[worst] if largest else None,
        replayed=after[worst] if largest else None,
    )


def _environment_differences(before: Mapping[str, Any], after: Mapping[str, Any]) -> dict[str, tuple[Any, Any]]:
    recorded, replayed = (
        {".".join(path): value for path, value in _leaves({k: m.get(k) for k in _ENVIRONMENT}, ())}
        for m in (before, after)
    )
    return {
        key: (recorded.get(key), replayed.get(key))
        for key in {**recorded, **replayed}
        if recorded.get(key) != replayed.get(key)
    }


def _leaves(value: Any, path: tuple[str, ...]) -> Iterator[tuple[tuple[str, ...], Any]]:
    """Yield (path, value) of everything in nested mappings and lists that ``_CLOCK`` does not name."""
    if isinstance(value, Mapping):
        for key, item in value.items():
            if key not in _CLOCK:
                yield from _leaves(item, (*path, str(key)))
    elif isinstance(value, list):
        for i, item in enumerate(value):
            yield from _leaves(item, (*path, str(i)))
    else:
        yield path or ("",), value


def _is_number(value: Any) -> bool:
    return isinstance(value, int | float) and not isinstance(value, bool)
