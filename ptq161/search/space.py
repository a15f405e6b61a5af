"""The space of a search: a YAML file in, Optuna's distributions and Hydra's overrides out."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

from omegaconf import OmegaConf
from optuna.distributions import BaseDistribution, CategoricalDistribution, FloatDistribution, IntDistribution

from ptq161.errors import UserError
from ptq161.run.command_line import as_value

Space = dict[str, BaseDistribution]
_FORMS = "{low: A, high: B}, {low: A, high: B, log: true} or {choices: [A, B]}"


def load_space(file: Path) -> Space:
    """Read a search space.

    Returns:
        key of run.py -> distribution of its values.

    Raises:
        UserError: the file cannot be read, or an entry has none of the forms of ``conf/search.yaml``.
    """
    try:
        entries = OmegaConf.to_container(OmegaConf.load(file))
    # YAML and OmegaConf each bring a family of exceptions of their own, with no common base but this.
    except Exception as error:
        raise UserError(f"--space {file} cannot be read ({' '.join(str(error).split())}).") from error
    if not isinstance(entries, dict) or not entries:
        raise UserError(f"--space {file} is empty: give at least one KEY: {_FORMS}.")
    space: Space = {}
    for key, entry in {str(key): entry for key, entry in entries.items()}.items():
        try:
            space[key] = _distribution(entry)
        except ValueError as error:
            raise UserError(f"{key} of --space {file}: {error}; use {_FORMS}.") from error
    return space


def _ends(distribution: BaseDistribution) -> list[Any]:
    """Return a distribution's choices, or its least and its largest value."""
    if isinstance(distribution, CategoricalDistribution):
        return list(distribution.choices)
    assert isinstance(distribution, IntDistribution | FloatDistribution)
    return [distribution.low, distribution.high]


def corners(space: Space) -> Iterator[dict[str, Any]]:
    """Yield points to check: each end of each key, with the other keys once at their first and once at their last end.

    All combinations would be too many to compose; an error that only another combination has fails its trial.
    """
    seen = []
    for side in (0, -1):
        rest = {key: _ends(distribution)[side] for key, distribution in space.items()}
        for key, distribution in space.items():
            for value in _ends(distribution):
                corner = {**rest, key: value}
                if corner not in seen:
                    seen.append(corner)
                    yield corner


def contains(space: Space, values: Mapping[str, Any]) -> bool:
    """Return whether ``values`` is a point of the space."""
    return set(values) == set(space) and all(_has(space[key], value) for key, value in values.items())


def as_overrides(values: Mapping[str, Any]) -> list[str]:
    """Return a point of a space as overrides of Hydra."""
    return [f"{key}={as_value(value)}" for key, value in values.items()]


def _distribution(entry: Any) -> BaseDistribution:
    if not isinstance(entry, dict) or set(entry) not in ({"choices"}, {"low", "high"}, {"low", "high", "log"}):
        raise ValueError(f"{entry!r} is not a range and not a list of choices")
    if "choices" in entry:
        choices = entry["choices"]
        if not isinstance(choices, list) or not choices:
            raise ValueError(f"choices: {choices!r} is no list of values")
        if nested := [choice for choice in choices if isinstance(choice, dict | list)]:
            raise ValueError(f"the choice {nested[0]!r} is not a plain value")
        return CategoricalDistribution(choices)
    low, high, log = entry["low"], entry["high"], entry.get("log", False)
    if any(isinstance(end, bool) or not isinstance(end, int | float) for end in (low, high)):
        raise ValueError(f"low: {low!r}, high: {high!r} are not two numbers")
    if not isinstance(log, bool):
        raise ValueError(f"log: {log!r} is neither true nor false")
    if not low < high:
        raise ValueError(f"low: {low} is not below high: {high}")
    if log and low <= 0:
        raise ValueError(f"low: {low} has no logarithm")
    if isinstance(low, int) and isinstance(high, int):
        return IntDistribution(low, high, log=log)
    return FloatDistribution(low, high, log=log)


def _has(distribution: BaseDistribution, value: Any) -> bool:
    if isinstance(distribution, CategoricalDistribution):
        return value in distribution.choices
    if isinstance(value, bool) or not isinstance(value, int | float):
        return False
    low, high = _ends(distribution)
    return bool(low <= value <= high)
