"""Configured keys: in which of them results differ, and what tells one result from another."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any

import pandas as pd

from ptq161.report.collect import Run
from ptq161.report.seeds import GROUPS

_UNREAD = ("seed", "tracker", "hydra", "debug")
"""Keys, and groups of keys, that tell no results apart."""
_WITHOUT_EFFECT = (
    "cache",
    "force",
    "on_error",
    "finetune.score_before",
    "finetune.checkpoint_every",
    "preprocess.checkpoint_every",
    "model.stream",
)
"""Keys that change no result."""
_BEFORE: dict[str, Any] = {
    "calib.masking": "none",
    "calib.masking_prefix": 0.25,
    "model.trust_remote_code": False,
    "model.stream": False,
    "model.embedding_bits": 16,
}
"""What runs did that were recorded before a key existed."""
_NAMES = ("method", "model", "method._target_")
"""Keys whose values stand beside the differing ones anyway."""
_OWN = ("method", "mask_ratio", "block_size")
"""Keys whose values are those of the method (:meth:`ptq161.report.collect.Run.value`)."""
_LONGEST = 32
"""Characters of a value in a label; lists and prompts are cut."""


def config_of(runs: Sequence[Run], index: pd.Index) -> pd.DataFrame:
    """Lay configurations out, a row for each run and a column for each key as :meth:`Run.value` takes it.

    Args:
        runs: one for each row.
        index: of the rows.
    """
    names = {f"{group}.name": group for group in GROUPS}
    keys = dict.fromkeys(names.get(key, key) for run in runs for key in (*_OWN, *run.config))
    columns = {key: pd.Series([run.value(key) for run in runs], index, dtype=object) for key in keys}
    for key in _BEFORE.keys() & columns.keys():
        columns[key] = columns[key].map(lambda value, key=key: _BEFORE[key] if value is None else value)
    return pd.DataFrame(columns, index)


def differing_keys(config: pd.DataFrame) -> list[str]:
    """Return the configured keys in which results differ, ``method``, ``model`` and ``seed`` left out.

    Two results are compared on a group's keys only where both chose the same option of the group: BiLLM and RTN do not
    differ in ``method.bits``; and on any key only where its value is known. A key that repeats another one, as
    ``method.compute_dtype`` does ``dtype``, is left out.
    """
    texts = config.map(repr)
    found: list[str] = []
    for key in sorted(texts.columns[texts.nunique() > 1], key=lambda key: "." in key):
        group = key.partition(".")[0]
        if group in _UNREAD or key in (*_NAMES, *_WITHOUT_EFFECT):
            continue
        # Without a group, None says that the method does not read the key.
        is_read = config[key].notna() | ((group != key) & (texts[key] != repr(pd.NA)))
        options = texts[group] if group != key and group in texts else pd.Series("", texts.index)
        if texts[key][is_read].groupby(options).nunique().max() > 1 and not any(
            (config[key].isna() | (texts[key] == texts[other])).all() for other in found
        ):
            found.append(key)
    return found


def swept_numbers(config: pd.DataFrame) -> list[str]:
    """Return the differing keys whose values are numbers wherever a method reads them, with two values at least."""
    return [key for key in differing_keys(config) if are_numbers(config[key]) and config[key].nunique() > 1]


def are_numbers(values: pd.Series) -> bool:
    """Say whether all values that are not None are numbers."""
    return all(isinstance(value, int | float) and not isinstance(value, bool) for value in values.dropna())


def describe(config: pd.DataFrame, keys: Sequence[str], leads: Sequence[pd.Series] = ()) -> pd.Series:
    """Return for each row what its values of ``keys`` are, after the texts of ``leads``.

    Keys are named by their last part, ``n_samples=32`` for ``calib.n_samples``, and so are paths. Keys that a method
    does not read are left out.
    """
    columns = [*leads, *(config[key].map(lambda value, key=key: _named(key, value)) for key in keys)]
    texts = [" ".join(filter(None, row)) for row in zip(*columns, strict=True)] if columns else ""
    return pd.Series(texts, config.index, dtype=object)


def line_names(config: pd.DataFrame, x: str) -> pd.Series:
    """Return for each result what it differs in from others beside ``x``: those of one name are joined by a line.

    Results that have no partner to be joined to are left out, where others have.
    """
    names = _line_names(config, x)
    has_partner = config[x].map(str).groupby(names).transform("nunique") > 1
    if has_partner.any() and not has_partner.all():
        return _line_names(config[has_partner], x)
    return names


def _line_names(config: pd.DataFrame, x: str) -> pd.Series:
    keys = [key for key in differing_keys(config) if key != x]
    leads = [config[lead] for lead in ("method", "model") if lead != x and config[lead].nunique() > 1]
    return describe(config, keys, leads)


def _named(key: str, value: Any) -> str:
    if value is None or value is pd.NA:
        return ""
    text = Path(value).name if isinstance(value, str) else str(value)
    return f"{key.rpartition('.')[2]}={text if len(text) <= _LONGEST else text[: _LONGEST - 1] + '…'}"
