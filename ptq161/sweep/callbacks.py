"""Hydra's callbacks around a run or a sweep: the check of every job, the table of failures, the summary.

Hydra turns every exception of a callback but ``SystemExit`` into a warning, so errors are raised as ``SystemExit``. It
calls ``on_multirun_end`` only if no job has failed, so whatever is printed at the end is registered with ``atexit``.
"""

from __future__ import annotations

import atexit
import copy
import os
from collections.abc import Sequence
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

from hydra.core.config_loader import ConfigLoader
from hydra.core.global_hydra import GlobalHydra
from hydra.core.plugins import Plugins
from hydra.core.utils import JobReturn, JobStatus
from hydra.errors import CompactHydraException, HydraException
from hydra.experimental.callback import Callback
from omegaconf import DictConfig, OmegaConf

from ptq161.errors import UserError
from ptq161.files.atomic import writing
from ptq161.run.command_line import sentence_of
from ptq161.run.config import RunConfig
from ptq161.run.preflight import check_store, checked_config, make_paths_absolute
from ptq161.sweep.directories import compose_job, job_subdir, settle_run_dir, settle_sweep_dir
from ptq161.sweep.failures import FAILURES, STOPPABLE, STOPPED, FailedJob, print_failures
from ptq161.sweep.overrides import has_basic_sweeper, make_ranges_exact, sweep_jobs
from ptq161.sweep.summary import print_summary


class CheckJobs(Callback):
    """Checks a run, or every job of a sweep, and settles its directory before anything starts."""

    def on_run_start(self, config: DictConfig, **kwargs: Any) -> None:
        """End the program with one sentence if the configuration is wrong or its directory cannot be used."""
        try:
            if checked_config(_task_config(config), config.hydra.overrides.task).cache:
                check_store()
            settle_run_dir(config)
        except UserError as error:
            raise SystemExit(str(error)) from error

    def on_multirun_start(self, config: DictConfig, **kwargs: Any) -> None:
        """End the program with one sentence if a job's configuration is wrong or a directory cannot be used."""
        loader = GlobalHydra.instance().config_loader()
        jobs, subdirs = list[RunConfig](), list[Path]()
        try:
            make_ranges_exact(config)
            for number, overrides in enumerate(sweep_jobs(config, loader)):
                composed, checked = _checked_job(config, overrides, number, loader)
                jobs.append(checked)
                subdirs.append(job_subdir(config, composed))
            if not jobs and has_basic_sweeper(config):
                raise UserError("this sweep has no jobs: a glob(...) matches nothing; give a value for each key.")
            if not subdirs:  # a sweeper that selects the jobs as it goes: two that stand for all
                subdirs = [job_subdir(config, compose_job(config, [], number, loader)) for number in (0, 1)]
            # A cluster's nodes may have a store that this machine has not.
            if any(job.cache for job in jobs) and str(config.hydra.launcher._target_).endswith(STOPPABLE):
                check_store()
            settle_sweep_dir(config, subdirs)
        except (UserError, HydraException) as error:
            raise SystemExit(sentence_of(error)) from error


def _checked_job(
    config: DictConfig, overrides: Sequence[str], number: int, loader: ConfigLoader
) -> tuple[DictConfig, RunConfig]:
    try:
        job = compose_job(config, overrides, number, loader)
        return job, checked_config(_task_config(job), overrides)
    except (UserError, CompactHydraException) as error:
        raise UserError(f"Job {' '.join(overrides)} of this sweep cannot run: {sentence_of(error)}") from error


def _task_config(config: DictConfig) -> DictConfig:
    """Return the configuration without Hydra's own node, parts of which cannot be resolved outside of a job."""
    task = copy.deepcopy(OmegaConf.masked_copy(config, [str(key) for key in config if key != "hydra"]))
    make_paths_absolute(task)
    return task


class SweepFailures(Callback):
    """Prints the table of failures when the sweep's process ends; ``on_error=stop`` ends it at the first failure.

    Hydra also creates its callbacks in the processes of a sweep's jobs, where this one has nothing to do.
    """

    def __init__(self) -> None:
        self._sweep_process: int | None = None  # id of the process in which on_multirun_start was called

    def on_multirun_start(self, config: DictConfig, **kwargs: Any) -> None:
        """Delete the failures of an earlier sweep in this directory, and register the table for the end."""
        try:
            _check_launcher(config)
            path = Path(config.hydra.sweep.dir, FAILURES).absolute()
            with writing(path):
                path.unlink(missing_ok=True)
        except UserError as error:
            raise SystemExit(str(error)) from error
        self._sweep_process = os.getpid()
        atexit.register(print_failures, str(path.parent), config)

    def on_job_end(self, config: DictConfig, job_return: JobReturn, **kwargs: Any) -> None:
        """End the sweep if the job ran in its process; a launcher with processes of its own handles ``on_error``."""
        job_return.__class__ = FailedJob  # Hydra has no other way to choose the class
        failed = job_return.status == JobStatus.FAILED
        if failed and config.on_error == "stop" and self._sweep_process == os.getpid():
            raise SystemExit(STOPPED)


def _check_launcher(config: DictConfig) -> None:
    launcher = str(config.hydra.launcher.get("_target_"))
    if launcher not in Plugins.instance().class_name_to_class:
        raise UserError(f"hydra/launcher: {launcher} is not installed; install it with pip install -e '.[cluster]'.")
    if config.on_error == "stop" and not launcher.endswith(STOPPABLE):
        raise UserError(
            f"on_error=stop: {launcher.rpartition('.')[2]} queues all jobs at once; "
            "use hydra/launcher=basic, hydra/launcher=local or on_error=continue."
        )


class SweepSummary(Callback):
    """Prints the summary of a sweep when its process ends."""

    def on_multirun_start(self, config: DictConfig, **kwargs: Any) -> None:
        """Register the summary for the end, for the runs that begin from now on."""
        began = datetime.now(UTC).isoformat(timespec="milliseconds")
        atexit.register(print_summary, Path(config.hydra.sweep.dir).absolute(), began)
