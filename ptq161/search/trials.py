"""The trials of a search: an Optuna study in the search's folder, a recorded run of run.py for each trial.

Any number of processes, on any machines that share the folder, may work on one search. A trial belongs to the process
that holds its lock; its run inherits the lock, which is free only when neither runs anymore. The next process then
claims the trial, and run.py continues in its directory.
"""

from __future__ import annotations

import dataclasses
import fcntl
import json
import math
import os
import signal
import subprocess
import sys
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any, Literal

import numpy
import optuna
from filelock import FileLock
from optuna.distributions import distribution_to_json
from optuna.samplers import TPESampler
from optuna.storages import JournalStorage
from optuna.storages.journal import JournalFileBackend
from optuna.study import Study
from optuna.trial import TrialState

from ptq161.errors import UserError
from ptq161.files.atomic import writing
from ptq161.run.command_line import as_value
from ptq161.search.space import Space, as_overrides
from ptq161.tracking.find import is_run
from ptq161.tracking.read import read_run
from ptq161.tracking.wandb_settings import own_run_id

Direction = Literal["minimize", "maximize"]
_RUN = (sys.executable, "-m", "ptq161", "run")
"""The command line of a run, before its settings."""
_JOURNAL = "study.journal"
_LOCKS = ".locks"
_OUTPUT = "output.log"
_ATTEMPTS = 2
"""Starts of a run that a signal kills, before its trial counts as failed."""
_GRACE_SECONDS = 30.0
"""Time in which an interrupted run may close its record before it is killed."""


@dataclasses.dataclass(frozen=True)
class Search:
    """A search, opened.

    Attributes:
        folder: holds the study, and the run of each trial under its number.
        study: Optuna's.
        space: the keys that vary, and their distributions.
        objectives: names of two results.
        overrides: of run.py, for all trials.
        seed: of the sampler, together with the number of trials so far.
    """

    folder: Path
    study: Study
    space: Space
    objectives: tuple[str, str]
    overrides: list[str]
    seed: int

    def run_dir(self, number: int) -> Path:
        """Return the directory of a trial's run."""
        return self.folder / str(number)


@dataclasses.dataclass(frozen=True)
class Claim:
    """A trial that this process alone may run.

    Attributes:
        number: of the trial.
        values: the point of the space.
        lock: file descriptor that holds the claim until it is closed, here and in the trial's run.
    """

    number: int
    values: dict[str, Any]
    lock: int


@dataclasses.dataclass(frozen=True)
class Outcome:
    """How a trial ended.

    Attributes:
        values: of the objectives; None where it failed.
        reason: why it failed; empty otherwise.
        seconds: duration of the run; None if its record does not have it.
    """

    values: tuple[float, float] | None
    reason: str = ""
    seconds: float | None = None


def open_search(
    folder: Path,
    space: Space,
    objectives: tuple[str, str],
    directions: Sequence[Direction],
    overrides: list[str],
    *,
    seed: int = 0,
    first: dict[str, Any] | None = None,
) -> Search:
    """Begin a search, or join the one that the folder holds.

    Args:
        folder: is made where it does not exist.
        space: the keys that vary, and their distributions.
        objectives: names of two results.
        directions: ``minimize`` or ``maximize`` for each.
        overrides: of run.py, for all trials.
        seed: of the sampler.
        first: point of the first trial; None lets the sampler select it.

    Raises:
        UserError: the folder cannot be written, its study is damaged, or it holds another search.
    """
    optuna.logging.set_verbosity(optuna.logging.WARNING)
    with writing(folder):
        (folder / _LOCKS).mkdir(parents=True, exist_ok=True)
    with _locked(folder):
        try:
            study = optuna.create_study(
                storage=JournalStorage(JournalFileBackend(str(folder / _JOURNAL))),
                study_name="search",
                directions=directions,
                load_if_exists=True,
            )
        except (ValueError, KeyError) as error:
            raise UserError(f"{folder / _JOURNAL} is damaged ({error}); choose a new folder with --out.") from error
        requested = {
            "space": {key: json.loads(distribution_to_json(space[key])) for key in sorted(space)},
            "objectives": list(objectives),
            "overrides": overrides,
        }
        if "search" not in study.user_attrs:
            study.set_user_attr("search", requested)
            if first is not None:
                study.enqueue_trial(first)
        _check_same(folder, study.user_attrs["search"], requested)
    return Search(folder, study, space, objectives, overrides, seed)


def claim_trial(search: Search, n_trials: int) -> Claim | None:
    """Claim an unfinished trial that no process runs, else begin a new one; None if the search has all its trials.

    Args:
        search: an open search.
        n_trials: number of trials in all, failed ones included.
    """
    with _locked(search.folder):
        begun = [trial for trial in search.study.get_trials(deepcopy=False) if trial.state != TrialState.WAITING]
        for trial in begun:
            if trial.state == TrialState.RUNNING and (lock := _lock(search, trial.number)) is not None:
                if set(trial.params) == set(search.space):
                    return Claim(trial.number, dict(trial.params), lock)
                # Its process was killed before all values were sampled.
                search.study.tell(trial.number, state=TrialState.FAIL)
                os.close(lock)
        if len(begun) >= n_trials:
            return None
        # A new sampler for each trial: its point depends on the seed and the trials so far, not on the process.
        seed = numpy.random.SeedSequence([search.seed, len(begun)]).generate_state(1)[0]
        search.study.sampler = TPESampler(seed=int(seed))
        new = search.study.ask(search.space)
        lock = _lock(search, new.number)
        assert lock is not None
        return Claim(new.number, dict(new.params), lock)


def run_trial(search: Search, claim: Claim) -> Outcome:
    """Run a claimed trial, unless its run has finished already, and record its outcome in the study.

    Raises:
        UserError: the run does not measure an objective, or its folder cannot be written.
        KeyboardInterrupt: the search was interrupted; the run has ended too, and continues when the trial is claimed
            again.
    """
    run_dir = search.run_dir(claim.number)
    status = 0
    try:
        for _ in range(_ATTEMPTS):
            if _is_finished(run_dir):
                break
            status = _run(_command(search, claim), run_dir, claim.lock, own_run_id(claim.number))
            if status >= 0:
                break
        outcome = outcome_of(search, claim.number, status)
        state = TrialState.FAIL if outcome.values is None else TrialState.COMPLETE
        search.study.tell(claim.number, outcome.values, state)
        return outcome
    finally:
        os.close(claim.lock)


def _command(search: Search, claim: Claim) -> list[str]:
    """Return the command line of a trial's run."""
    group = [] if any("tracker.group=" in o for o in search.overrides) else [f"++tracker.group={_group(search)}"]
    run_dir = f"hydra.run.dir={as_value(str(search.run_dir(claim.number)))}"
    return [*_RUN, *as_overrides(claim.values), *search.overrides, *group, run_dir]


def outcome_of(search: Search, number: int, status: int | None = None) -> Outcome:
    """Read the outcome of a trial from its record.

    Args:
        search: an open search.
        number: of the trial.
        status: exit status of its run, if known.

    Raises:
        UserError: the run finished without measuring an objective.
    """
    run_dir = search.run_dir(number)
    if not _is_finished(run_dir):
        return Outcome(None, _reason(run_dir, status))
    run = read_run(run_dir, with_lines=False)
    metrics = (run.results or {}).get("metrics", {})
    for name in search.objectives:
        if name not in metrics:
            raise UserError(
                f"--objectives {name}: trial {number} did not measure it; it measured {', '.join(metrics)}."
            )
    first, second = (float(metrics[name]) for name in search.objectives)
    seconds = run.manifest.get("duration_seconds")
    for name, value in zip(search.objectives, (first, second), strict=True):
        if not math.isfinite(value):
            return Outcome(None, f"{name} is {value}", seconds)
    return Outcome((first, second), "", seconds)


def _run(arguments: list[str], run_dir: Path, lock: int, variables: Mapping[str, str]) -> int:
    """Run a command, its output in a file; if this process is interrupted, end it with time to close its record.

    Args:
        arguments: the command.
        run_dir: is made where it does not exist.
        lock: a file handle that the command holds as well.
        variables: are added to the environment.
    """
    with writing(run_dir / _OUTPUT):
        run_dir.mkdir(exist_ok=True)
        output = (run_dir / _OUTPUT).open("ab")
    with output:
        # Out of the terminal's process group: Ctrl-C reaches this process alone, which terminates the run below, once.
        process = subprocess.Popen(
            arguments,
            env={**os.environ, **variables},
            stdin=subprocess.DEVNULL,
            stdout=output,
            stderr=output,
            pass_fds=[lock],
            process_group=0,
        )
        try:
            return process.wait()
        except BaseException:
            process.terminate()
            try:
                process.wait(_GRACE_SECONDS)
            except subprocess.TimeoutExpired:
                process.kill()
            raise


def _is_finished(run_dir: Path) -> bool:
    return is_run(run_dir) and read_run(run_dir, with_lines=False).manifest.get("exit_state") == "finished"


def _reason(run_dir: Path, status: int | None) -> str:
    """Return why a run failed: from its record, else the last line of its output, else its exit status."""
    if status is not None and status < 0:
        return f"killed by {signal.Signals(-status).name} {_ATTEMPTS} times"
    if is_run(run_dir):
        exception = read_run(run_dir, with_lines=False).manifest.get("exception")
        if exception:
            return str(exception["message"])
    output = run_dir / _OUTPUT
    lines = output.read_text(encoding="utf-8", errors="replace").splitlines() if output.exists() else []
    return next((line.strip() for line in reversed(lines) if line.strip()), f"exit status {status}")


def _locked(folder: Path) -> FileLock:
    """Return the lock for changes of the study that take several steps; it is free when its process is killed."""
    return FileLock(folder / _LOCKS / "study.lock")


def _lock(search: Search, number: int) -> int | None:
    """Open and lock a trial's file; None if another process, or the trial's run, holds the lock."""
    handle = os.open(search.folder / _LOCKS / f"{number}.lock", os.O_RDWR | os.O_CREAT, 0o666)
    try:
        fcntl.flock(handle, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except OSError:
        os.close(handle)
        return None
    return handle


def _group(search: Search) -> str:
    return as_value(f"search/{search.folder.name}")


def _check_same(folder: Path, stored: dict[str, Any], requested: dict[str, Any]) -> None:
    """Refuse a search with other settings than the stored one: their trials must not be mixed."""
    for part, flag in (("space", "--space"), ("objectives", "--objectives"), ("overrides", "the settings")):
        if stored[part] != requested[part]:
            was = json.dumps(stored[part])
            raise UserError(
                f"--out {folder} holds a search with another value of {flag}, {was}: use that, or another folder."
            )
