"""The state of every run in a folder, read from the records, and of the jobs of its sweeps that have none yet."""

from __future__ import annotations

import dataclasses
import functools
import os
import platform
from collections.abc import Iterator, Mapping, Sequence
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

import psutil
from omegaconf import DictConfig, OmegaConf

from ptq161.errors import UserError
from ptq161.files.strict_json import decode_json
from ptq161.sweep.failures import read_failures
from ptq161.sweep.overrides import own_overrides, sweep_jobs
from ptq161.tracking.find import MANIFEST, SWEEP, find, natural_order
from ptq161.tracking.metric_names import ON_TEXTS
from ptq161.tracking.read import RunData, read_run

STATES = ("running", "starting", "failed", "lost", "interrupted", "waiting", "finished")
"""States of a run, and of a job without a record, in the order in which a small terminal shows them."""

_ACTIVE = ("running", "starting", "waiting")
_LOSSES = ("loss", "preprocess_loss", "preprocess_quantize_loss", "finetune_loss")
_TAIL_BYTES = 1 << 16
"""Read from the end of a running job's metrics: far more than one window emits."""
_CLOCK_SECONDS = 60.0
"""Tolerance for clocks that disagree, by which a process may seem to have started after its own record."""


@dataclasses.dataclass(frozen=True)
class Row:
    """One run, as the table shows it.

    Attributes:
        job: its directory below the watched one.
        label: its overrides.
        state: one of ``STATES``.
        progress: its stage, block or step, by the last metric.
        loss: the last loss.
        seconds: since its start; its duration once it has ended.
        outcome: its perplexities, or why it failed.
    """

    job: str
    label: str
    state: str
    progress: str = ""
    loss: float | None = None
    seconds: float | None = None
    outcome: str = ""


@dataclasses.dataclass(frozen=True)
class Snapshot:
    """The runs of a folder at one moment.

    Attributes:
        rows: of all runs, in the order of their directories.
        problems: one sentence for each record that cannot be read.
    """

    rows: list[Row]
    problems: list[str]

    @property
    def ended(self) -> bool:
        """Whether all runs have ended."""
        return bool(self.rows) and not any(row.state in _ACTIVE for row in self.rows)


def read_snapshot(folder: Path) -> Snapshot:
    """Read the state of all runs in a folder, and of the jobs of its sweeps that have not started."""
    found = find(folder)
    problems = list(found.problems)
    waiting: dict[_Job | None, Row] = {key: row for sweep in found.sweeps for key, row in _planned(sweep, folder)}
    rows = []
    for path in found.begun:
        planned = waiting.pop(_job(path, found.sweeps, _hydra_number(path)), Row("", "", "waiting"))
        state = "starting" if planned.state == "waiting" else planned.state
        rows.append(dataclasses.replace(planned, job=_relative(path, folder), state=state))
    for run_dir in found.runs:
        try:
            row, number = _row(run_dir, folder)
        except UserError as error:
            problems.append(f"{run_dir} is skipped: {error}")
            continue
        job = waiting.pop(_job(run_dir, found.sweeps, number), None)
        rows.append(row if job is None else dataclasses.replace(row, label=job.label))
    return Snapshot(sorted([*rows, *waiting.values()], key=lambda row: natural_order(row.job)), problems)


_Job = tuple[Path, int]
"""A job: the directory of its sweep, and its number there."""


def _planned(sweep: Path, folder: Path) -> Iterator[tuple[_Job, Row]]:
    """Yield each job of a sweep's configuration with a row: waiting, or failed before its record began."""
    try:
        config = OmegaConf.load(sweep / SWEEP)
        assert isinstance(config, DictConfig)
        jobs = list(sweep_jobs(config, loader=None))
        labels = [" ".join(own_overrides(overrides, config)) for overrides in jobs]
    # The file may be half-written, or another program's; then only the jobs that have directories are shown.
    except Exception:
        return
    failed = {failure.job: failure.sentence for failure in read_failures(sweep)}
    for number, label in enumerate(labels):
        # Its directory may have another name, which is not known before it begins.
        row = Row(_relative(sweep / str(number), folder), label, "waiting")
        yield (
            (sweep, number),
            dataclasses.replace(row, state="failed", outcome=failed[number]) if number in failed else row,
        )


def _job(run_dir: Path, sweeps: Sequence[Path], number: int | None) -> _Job | None:
    """Return the job whose directory this is; None where no sweep that was found holds it.

    Args:
        run_dir: the directory.
        sweeps: directories of sweeps.
        number: of the job, if known; else the directory's name is taken for it.
    """
    sweep = next((parent for parent in (run_dir, *run_dir.parents) if parent in sweeps), None)
    if sweep is None:
        return None
    if number is None and not run_dir.name.isdecimal():
        return None
    return sweep, int(run_dir.name) if number is None else number


def _hydra_number(path: Path) -> int | None:
    """Return the number of a job that has no record yet from what Hydra wrote for it."""
    try:
        return _number_or_none(OmegaConf.select(OmegaConf.load(path / ".hydra" / "hydra.yaml"), "hydra.job.num"))
    # Half-written, or not Hydra's.
    except Exception:
        return None


def _number_or_none(value: Any) -> int | None:
    return value if isinstance(value, int) else None


def _row(run_dir: Path, folder: Path) -> tuple[Row, int | None]:
    """Return the row of a run, and the number of the job where it belongs to a sweep."""
    try:
        changed = (run_dir / MANIFEST).stat().st_mtime_ns
    except OSError as error:
        raise UserError(f"its manifest.json cannot be read ({error.strerror})") from error
    run, state = _read(run_dir, changed)
    manifest = run.manifest
    sweep = manifest.get("sweep")
    number = _number_or_none(sweep.get("job")) if isinstance(sweep, Mapping) else None
    row = Row(_relative(run_dir, folder), str(manifest.get("job_name") or ""), state)
    return _with_state(row, run), number


def _with_state(row: Row, run: RunData) -> Row:
    manifest = run.manifest
    if row.state != "running":
        return dataclasses.replace(row, seconds=_number(manifest.get("duration_seconds")), outcome=_outcome(run))
    if _is_gone(manifest):
        return dataclasses.replace(row, state="lost", outcome="its process is gone; run its command again")
    metrics = _last_metrics(run.run_dir / "metrics.jsonl")
    losses = [_number(metric.get("value")) for metric in metrics if metric.get("name") in _LOSSES]
    return dataclasses.replace(
        row,
        progress=_progress(metrics[-1], manifest.get("n_blocks")) if metrics else "loading",
        loss=losses[-1] if losses else None,
        seconds=_since(manifest.get("start")),
    )


@functools.lru_cache(maxsize=4096)
def _read(run_dir: Path, changed: int) -> tuple[RunData, str]:
    """Read a record and its state, once for each version of its manifest (``changed``: time of its last change)."""
    run = read_run(run_dir, with_lines=False)
    state = str(run.manifest.get("exit_state"))
    if state not in STATES:
        raise UserError(f"its manifest has the unknown exit_state {state!r}")
    return run, state


def _is_gone(manifest: Mapping[str, Any]) -> bool:
    """Return whether the process of a running record has ended; False for a process of another machine."""
    hardware, pid = manifest.get("hardware"), manifest.get("pid")
    if not isinstance(hardware, Mapping) or hardware.get("host") != platform.node() or not isinstance(pid, int):
        return False
    try:
        process = psutil.Process(pid)
        began = _time(manifest.get("start"))
        # The operating system reuses process ids: a process that started after the record is not this run's.
        reused = began is not None and process.create_time() > began.timestamp() + _CLOCK_SECONDS
        return reused or process.status() == psutil.STATUS_ZOMBIE
    except psutil.NoSuchProcess:
        return True
    except psutil.Error:
        return False


def _last_metrics(path: Path) -> list[dict[str, Any]]:
    """Read the metrics at the end of a growing file; an incomplete first or last line is skipped."""
    try:
        with path.open("rb") as file:
            size = file.seek(0, os.SEEK_END)
            file.seek(max(0, size - _TAIL_BYTES))
            lines = file.read().split(b"\n")
    except OSError:
        return []
    metrics = []
    for line in lines:
        try:
            metric = decode_json(line.decode("utf-8"))
        except ValueError:
            continue
        if "name" in metric:
            metrics.append(metric)
    return metrics


def _progress(metric: Mapping[str, Any], n_blocks: int | None) -> str:
    name = str(metric["name"])
    stage = next((f"{group}: " for group in ("preprocess", "finetune") if name.startswith(f"{group}_")), "")
    if "step" in metric:
        return f"{stage}step {metric['step']}"
    if "block" in metric or "linear" in metric:
        block = metric["block"] if "block" in metric else str(metric["linear"]).partition(".")[0]
        total = f" of {n_blocks}" if n_blocks else ""
        epoch = f", epoch {metric['epoch']}" if "epoch" in metric else ""
        return f"{stage}block {block}{total}{epoch}"
    return f"{metric['model']}: {name}" if "model" in metric else name


def _outcome(run: RunData) -> str:
    exception = run.manifest.get("exception")
    if isinstance(exception, Mapping):
        return str(exception.get("message"))
    metrics = (run.results or {}).get("metrics")
    found = metrics.items() if isinstance(metrics, Mapping) else ()
    return ", ".join(f"{name} {value:.4g}" for name, value in found if name.startswith(ON_TEXTS) and _number(value))


def _relative(path: Path, folder: Path) -> str:
    return str(path.relative_to(folder)) if path != folder else path.absolute().name


def _number(value: Any) -> float | None:
    return float(value) if isinstance(value, int | float) else None


def _time(value: Any) -> datetime | None:
    try:
        return datetime.fromisoformat(str(value)).astimezone(UTC)
    except ValueError:
        return None


def _since(start: Any) -> float | None:
    began = _time(start)
    return None if began is None else max(0.0, (datetime.now(UTC) - began).total_seconds())
