"""Reading a run directory back."""

from __future__ import annotations

import dataclasses
from collections.abc import Collection, Mapping
from pathlib import Path
from typing import Any

import yaml

from ptq161.errors import UserError
from ptq161.files.checksums import SUMS, what_is_wrong
from ptq161.files.strict_json import decode_json
from ptq161.tracking.layout import RECORD_FILES, SCHEMA_VERSION

# The C parser is 50 times as fast; PyYAML is built without it on some platforms.
_YAML_LOADER = getattr(yaml, "CSafeLoader", yaml.SafeLoader)

_LINES = {"metrics.jsonl", "samples.jsonl"}
_Types = Mapping[str, type | tuple[type, ...]]
_METRIC: _Types = {"time": (int, float), "name": str, "value": (int, float)}
_SAMPLE: _Types = {"time": (int, float), "name": str, "text": str}
"""The keys that each line has, and their types."""


@dataclasses.dataclass(frozen=True)
class RunData:
    """The content of a run directory.

    Attributes:
        run_dir: the directory.
        config: the resolved configuration.
        manifest: the environment of the run, and how it ended.
        metrics: one entry per metric: time, name, value and what it belongs to (block, epoch, linear).
        samples: one entry per text sample: time, name, text.
        results: the content of ``results.json``; None for a run that did not finish.
        problems: one sentence for each part that could not be read.
    """

    run_dir: Path
    config: dict[str, Any]
    manifest: dict[str, Any]
    metrics: list[dict[str, Any]]
    samples: list[dict[str, Any]]
    results: dict[str, Any] | None
    problems: list[str]


def read_run(run_dir: Path | str, *, with_lines: bool = True) -> RunData:
    """Read the record of a run, which may still be running.

    Damage to a part of it, such as the last line of a killed run, is reported in ``problems``.

    Args:
        run_dir: the directory.
        with_lines: read metrics and samples too, which takes most of the time; otherwise both are empty.

    Raises:
        UserError: the directory holds no record, or one of another layout version.
    """
    folder = Path(run_dir)
    problems: list[str] = []
    run = RunData(
        run_dir=folder,
        manifest=_read_manifest(folder / "manifest.json"),
        config=_read_config(folder / "config.yaml", problems),
        metrics=_read_lines(folder / "metrics.jsonl", _METRIC, problems) if with_lines else [],
        samples=_read_lines(folder / "samples.jsonl", _SAMPLE, problems) if with_lines else [],
        results=_read_results(folder / "results.json", problems),
        problems=problems,
    )
    if not problems:
        _check_unchanged(folder, RECORD_FILES if with_lines else set(RECORD_FILES) - _LINES, problems)
    return run


def read_metrics(run_dir: Path | str, problems: list[str]) -> list[dict[str, Any]]:
    """Read a record's metrics, in the order in which they were written.

    Args:
        run_dir: the directory.
        problems: receives one sentence for each line that cannot be read.
    """
    folder, own = Path(run_dir), list[str]()
    metrics = _read_lines(folder / "metrics.jsonl", _METRIC, own)
    if not own:
        _check_unchanged(folder, ("metrics.jsonl",), own)
    problems += own
    return metrics


def _check_unchanged(folder: Path, names: Collection[str], problems: list[str]) -> None:
    """Compare files that were read with the record's checksums."""
    # A run that has not ended has none, and neither have records of earlier versions.
    if (folder / SUMS).exists() and (wrong := what_is_wrong(folder, among=names)):
        problems.append(f"{folder} was changed after its run ended ({wrong}); delete {SUMS} if the change is meant.")


def _read_manifest(path: Path) -> dict[str, Any]:
    try:
        manifest = decode_json(path.read_text(encoding="utf-8"))
    except (OSError, ValueError) as error:
        raise UserError(f"{path.parent} is not a run directory: its manifest.json cannot be read ({error}).") from error
    _check_version(path, manifest)
    return manifest


def _read_results(path: Path, problems: list[str]) -> dict[str, Any] | None:
    if not path.exists():
        return None
    try:
        results = decode_json(path.read_text(encoding="utf-8"))
    except (OSError, ValueError) as error:
        problems.append(f"{path} cannot be read ({error}).")
        return None
    _check_version(path, results)
    return results


def _check_version(path: Path, document: dict[str, Any]) -> None:
    version = document.get("schema_version")
    if version != SCHEMA_VERSION:
        raise UserError(f"{path} has schema_version {version}; this version of ptq161 reads {SCHEMA_VERSION}.")


def _read_config(path: Path, problems: list[str]) -> dict[str, Any]:
    try:
        config = yaml.load(path.read_text(encoding="utf-8"), Loader=_YAML_LOADER)
    except (OSError, ValueError, yaml.YAMLError) as error:
        problems.append(f"{path} cannot be read ({' '.join(str(error).split())}).")
        return {}
    if not isinstance(config, dict):
        problems.append(f"{path} does not hold a mapping.")
        return {}
    return {str(key): value for key, value in config.items()}


def _read_lines(path: Path, types: _Types, problems: list[str]) -> list[dict[str, Any]]:
    if not path.exists():
        return []
    try:
        lines = path.read_bytes().splitlines()
    except OSError as error:
        problems.append(f"{path} cannot be read ({error}).")
        return []
    entries = []
    for number, line in enumerate(lines, start=1):
        try:
            entry = decode_json(line.decode("utf-8"))
        except ValueError:
            problems.append(f"line {number} of {path} is truncated or no JSON object; it is skipped.")
            continue
        if missing := [key for key in types if key not in entry]:
            problems.append(f"line {number} of {path} lacks {missing[0]!r}; it is skipped.")
            continue
        if wrong := [key for key, expected in types.items() if not _is_a(entry[key], expected)]:
            problems.append(f"line {number} of {path} has no usable {wrong[0]!r}; it is skipped.")
            continue
        entries.append(entry)
    return entries


def _is_a(value: Any, expected: type | tuple[type, ...]) -> bool:
    return isinstance(value, expected) and not isinstance(value, bool)  # to Python, true is an integer
