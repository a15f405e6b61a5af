"""Runs from their records: what every table, figure and page is made of.

Usage::

    found = collect(["multirun/2026-01-01/12-00-00"])
    for run in found.runs:
        print(run.method, run.metrics)
"""

from __future__ import annotations

import dataclasses
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

from ptq161.errors import UserError
from ptq161.files.reading import one_line
from ptq161.report.seeds import GROUPS, identity_without_seed
from ptq161.report.texts import UNKNOWN, text_seen
from ptq161.tracking.find import find
from ptq161.tracking.read import RunData, read_run

FULL_PRECISION = "none"
"""The method of a run that quantizes nothing."""
TRAININGS = {"preprocess": "+preprocessing", "finetune": "+finetuning"}
"""Group of a training -> what follows the name of the method of a run that has one."""
_STORED = "stored checkpoint"
"""The method of a run that evaluates a packed checkpoint as it is."""


@dataclasses.dataclass(frozen=True)
class Run:
    """One finished run.

    Attributes:
        run_dir: its record; None for scores that no run of its own stands behind.
        method: name of the method, with ``+preprocessing`` where the weights were preprocessed, and ``+finetuning``
            where what is packed was.
        model: name of the model.
        config: the resolved configuration, flat: ``calib.n_samples`` -> 32.
        metrics: flat name -> value, sizes among them.
        standard_errors: the same names -> standard error, where the protocol has one.
        full_precision: the same names -> value of the unquantized model; empty where it was not scored.
        merged: the same names -> value of the preprocessed, unquantized model; empty where there is none.
        before_finetune: the quantized model before it was finetuned, as a run; None where it was not, or not scored.
        seconds: stage -> seconds.
        peak_memory_bytes: of the process, at its largest.
        commit: git commit of the sources, with ``+`` where they had been changed since.
        seed: of the run.
        calibration_text: what it was calibrated or trained on (:func:`ptq161.report.texts.text_seen`).
        identity: what decides its result but for the seed (:func:`ptq161.report.seeds.identity_without_seed`).
        started: when, in ISO format.
        reused_from: the run that computed its numbers, where it did not itself.
        recorded_as: the name of its record in an earlier report's table, where the record is not at hand.
        missing: what :meth:`value` gives for a key that the configuration lacks: None, which says that the method does
            not read it, or pandas' NA, where it is not known.
    """

    run_dir: Path | None
    method: str
    model: str
    config: Mapping[str, Any]
    metrics: Mapping[str, float]
    standard_errors: Mapping[str, float] = dataclasses.field(default_factory=dict)
    full_precision: Mapping[str, float] = dataclasses.field(default_factory=dict)
    merged: Mapping[str, float] = dataclasses.field(default_factory=dict)
    before_finetune: Run | None = None
    seconds: Mapping[str, float] = dataclasses.field(default_factory=dict)
    peak_memory_bytes: float | None = None
    commit: str | None = None
    seed: int | None = None
    calibration_text: str = UNKNOWN
    identity: str = ""
    started: str | None = None
    reused_from: str | None = None
    recorded_as: str | None = None
    missing: Any = None

    @property
    def total_seconds(self) -> float | None:
        """Seconds over all stages."""
        return sum(self.seconds.values()) if self.seconds else None

    def value(self, key: str) -> Any:
        """Return a configured value by its key; a group's key, such as ``calib``, gives its name.

        A key that the run's method does not read, such as ``mask_ratio`` of a method without a mask, gives ``missing``.
        """
        return self.method if key == "method" else self.config.get(configured_key(key), self.missing)


def configured_key(key: str) -> str:
    """Return the key of a configuration that a column or an axis means: of a group its name, of some keys the method's.

    Example:
        >>> configured_key("calib"), configured_key("mask_ratio"), configured_key("calib.n_samples")
        ('calib.name', 'method.mask_ratio', 'calib.n_samples')
    """
    if key in GROUPS:
        return f"{key}.name"
    return f"method.{key}" if key in ("mask_ratio", "block_size") else key


@dataclasses.dataclass(frozen=True)
class Collection:
    """What was found.

    Attributes:
        runs: the finished ones, in the order of the folders.
        problems: one sentence for each run, or part of one, that could not be read.
    """

    runs: list[Run]
    problems: list[str]


def collect(folders: Sequence[Path | str]) -> Collection:
    """Read the runs in some folders.

    Args:
        folders: run directories, sweep directories, or any folders above them. A run that lies in several of them is
            read once.
    """
    runs: list[Run] = []
    problems: list[str] = []
    seen: set[Path] = set()
    for folder in map(Path, folders):
        found = find(folder)
        problems += found.problems
        problems += [f"{path} is skipped: its job ended before it began a record." for path in found.begun]
        if not found.runs:
            problems.append(f"{folder} holds no run.")
        for run_dir in found.runs:
            if run_dir.resolve() not in seen and (run := _read(run_dir, problems)):
                runs.append(run)
            seen.add(run_dir.resolve())
    return Collection(runs, problems)


def _read(run_dir: Path, problems: list[str]) -> Run | None:
    try:
        data = read_run(run_dir, with_lines=False)
        problems.extend(data.problems)
        return _run(data, problems)
    except UserError as error:
        problems.append(f"{run_dir} is skipped: {error}")
    # The files of a foreign folder hold anything: what they break is reported, and the other runs are shown.
    except Exception as error:
        problems.append(f"{run_dir} is skipped: its record is malformed ({type(error).__name__}: {one_line(error)}).")
    return None


def _run(data: RunData, problems: list[str]) -> Run:
    if data.results is None:
        raise UserError(_unfinished(data.manifest))
    config = dict(_flat(data.config))
    if "model.name" not in config:
        raise UserError("its configuration does not name the model.")
    memory = {key: value for key, value in data.results.items() if key == "peak_memory_bytes"}
    run = Run(
        run_dir=data.run_dir,
        method=_method(config),
        model=str(config["model.name"]),
        config=config,
        metrics=_numbers(data, data.results["metrics"], problems),
        standard_errors={
            name: float(settings["standard_error"])
            for name, settings in data.results.get("protocol", {}).items()
            if settings.get("standard_error") is not None
        },
        full_precision=_numbers(data, data.results.get("full_precision", {}), problems),
        merged=_numbers(data, data.results.get("merged", {}), problems),
        seconds=_numbers(data, data.results.get("seconds", {}), problems),
        peak_memory_bytes=_numbers(data, memory, problems).get("peak_memory_bytes"),
        commit=_commit(data.manifest.get("git")),
        seed=config["seed"] if isinstance(config.get("seed"), int) else None,
        calibration_text=text_seen(config, data.manifest),
        identity=identity_without_seed(config, data.manifest),
        started=_text(data.manifest.get("start")),
        reused_from=_text((data.manifest.get("reused_from") or {}).get("run_dir")),
    )
    before = _numbers(data, data.results.get("before_finetune", {}), problems)
    return dataclasses.replace(run, before_finetune=_before_finetune(run, before, data.manifest)) if before else run


def _before_finetune(run: Run, metrics: Mapping[str, float], manifest: Mapping[str, Any]) -> Run:
    """Return the first part of a run, up to the quantized model, as a run."""
    config = {key: value for key, value in run.config.items() if not key.startswith("finetune.")}
    config["finetune.name"] = "none"
    return Run(
        run_dir=None,
        method=_method(config),
        model=run.model,
        config=config,
        metrics=metrics,
        commit=run.commit,
        seed=run.seed,
        calibration_text=text_seen(config, manifest),
        identity=f"before {run.identity}",
    )


def _text(value: Any) -> str | None:
    """Return a text of a manifest; None where it is of another kind, which would break the report of all runs."""
    return value if isinstance(value, str) else None


def _unfinished(manifest: Mapping[str, Any]) -> str:
    state = manifest.get("exit_state", "unknown")
    reason = (manifest.get("exception") or {}).get("message")
    return f"it has no results (state: {state}{f', {reason}' if reason else ''})."


def _method(config: Mapping[str, Any]) -> str:
    name = str(config.get("method.name", _STORED))
    for group, suffix in TRAININGS.items():
        if config.get(f"{group}.name", "none") != "none":
            name += suffix
    return name


def _commit(git: Mapping[str, Any] | None) -> str | None:
    if not git or not git.get("commit"):
        return None
    return f"{git['commit'][:8]}{'+' if git.get('dirty') else ''}"


def _flat(config: Mapping[str, Any], prefix: str = "") -> Iterator[tuple[str, Any]]:
    for key, value in config.items():
        if isinstance(value, Mapping):
            yield from _flat(value, f"{prefix}{key}.")
        else:
            yield f"{prefix}{key}", value


def _numbers(data: RunData, values: Mapping[str, Any], problems: list[str]) -> dict[str, float]:
    numbers = {}
    for name, value in values.items():
        if isinstance(value, int | float) and not isinstance(value, bool):
            numbers[name] = value
        else:
            problems.append(f"{name} of {data.run_dir} is left out: {value!r} is no number.")
    return numbers
