"""Strict JSON that keeps NaN and infinities."""

from __future__ import annotations

import json
import math
import os
from collections.abc import Mapping
from typing import Any

_DIGITS = 300
"""Most digits of an integer, so that every number is also a float."""


def encode_json(value: Mapping[str, Any], indent: int | None = None) -> str:
    """Return strict JSON of an object.

    JSON has no NaN and no infinity: such a value becomes null, and a key ``nonfinite`` of the object holds it as text
    at the same place: ``{"value": NaN}`` is ``{"value": null, "nonfinite": {"value": "nan"}}``.
    Numbers of numpy and torch become plain ones, paths become strings.

    Raises:
        TypeError: JSON has no form for a value.
    """
    clean, nonfinite = _split(value)
    if nonfinite:
        clean["nonfinite"] = nonfinite
    return json.dumps(clean, indent=indent, allow_nan=False, ensure_ascii=False)


def decode_json(text: str) -> dict[str, Any]:
    """Undo :func:`encode_json`.

    Raises:
        ValueError: the text is not one JSON object.
    """
    try:
        value = json.loads(text, parse_int=_integer, parse_constant=_no_constant)
    except RecursionError as error:
        raise ValueError("it is nested too deeply") from error
    if not isinstance(value, dict):
        raise ValueError("not a JSON object")
    if "nonfinite" not in value:
        return value
    nonfinite = value.pop("nonfinite")
    if not isinstance(nonfinite, dict):
        raise ValueError("its nonfinite is no object")
    restored: dict[str, Any] = _merge(value, nonfinite)
    return restored


def _integer(text: str) -> int:
    if len(text) > _DIGITS:
        raise ValueError(f"it has a number of {len(text)} digits")
    return int(text)


def _no_constant(name: str) -> None:
    raise ValueError(f"it holds {name}, which JSON has not")


def _split(value: Any) -> tuple[Any, Any]:
    """Return ``value`` without its non-finite numbers, and these numbers as text in a mapping of the same shape."""
    if value is None or isinstance(value, bool | int | str):
        return value, None
    if isinstance(value, float):
        return (value, None) if math.isfinite(value) else (None, str(float(value)))
    if isinstance(value, os.PathLike):
        return os.fspath(value), None
    if isinstance(value, Mapping):
        parts = {str(key): _split(item) for key, item in value.items()}
        return {k: clean for k, (clean, _) in parts.items()}, {k: text for k, (_, text) in parts.items() if text}
    if isinstance(value, list | tuple):
        items = [_split(item) for item in value]
        return [clean for clean, _ in items], {str(i): text for i, (_, text) in enumerate(items) if text}
    if callable(getattr(value, "item", None)):
        return _split(value.item())
    raise TypeError(f"{type(value).__name__} cannot be written as JSON")


def _merge(value: Any, nonfinite: Any) -> Any:
    if isinstance(nonfinite, str):
        return float(nonfinite)
    if not isinstance(nonfinite, dict):
        raise ValueError("its nonfinite holds more than numbers as text")
    if isinstance(value, dict):
        return {k: _merge(item, nonfinite[k]) if k in nonfinite else item for k, item in value.items()}
    if isinstance(value, list):
        return [_merge(item, nonfinite[str(i)]) if str(i) in nonfinite else item for i, item in enumerate(value)]
    return value
