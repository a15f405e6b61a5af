"""Between Hydra and the pipeline: one job, its errors, and the check of every job before the first one."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any

from hydra.core.global_hydra import GlobalHydra
from hydra.core.hydra_config import HydraConfig
from hydra.errors import CompactHydraException
from hydra.experimental.callback import Callback
from hydra.types import RunMode
from omegaconf import DictConfig, OmegaConf

from ptq161.errors import UserError
from ptq161.failures import FailedRunError, Failure, print_failure, record_failure
from ptq161.jobs import sweep_jobs
from ptq161.preflight import check_writable, checked_config, name_local_model

MAX_NAME = 128
"""Characters of a name that every tracker takes."""


def run_job(cfg: DictConfig) -> None:
    """Run one Hydra job.

    Raises:
        FailedRunError: the run failed for a reason that the user can put right.
    """
    hydra_config = HydraConfig.get()
    sweeping = hydra_config.mode == RunMode.MULTIRUN
    overrides = list(hydra_config.overrides.task)
    try:
        name_local_model(cfg, overrides)
        config = checked_config(cfg, overrides)
        from ptq161.pipeline import RunContext, run  # takes seconds, which a wrong configuration need not wait for

        run(
            config,
            RunContext(
                run_dir=hydra_config.runtime.output_dir,
                resolved=_resolved(cfg),
                overrides=overrides,
                job_name=_job_name(overrides, hydra_config.job.num if sweeping else None),
                group=_sweep_name(hydra_config.sweep.dir) if sweeping else None,
            ),
        )
    except Exception as error:
        if sweeping:  # Hydra tells only the first failure, and that after the last job
            sentence = str(error) if isinstance(error, UserError) else f"{type(error).__name__}: {error}"
            failure = Failure(hydra_config.job.num, overrides, sentence, hydra_config.runtime.output_dir)
            print_failure(failure)
            record_failure(hydra_config.sweep.dir, failure)
            raise failure.error() from error
        if isinstance(error, UserError):
            raise FailedRunError(str(error)) from error
        raise


class CheckJobs(Callback):
    """Checks the configuration of a run, or of every job of a sweep, before anything is done.

    Hydra turns a callback's exceptions into warnings, all but ``SystemExit``; before the first job, leaving is right.
    """

    def on_run_start(self, config: DictConfig, **kwargs: Any) -> None:
        """End the program with one sentence where the configuration is wrong or its directory cannot be written."""
        try:
            checked_config(_task_config(config), config.hydra.overrides.task)
            check_writable("hydra.run.dir", config.hydra.run.dir)
        except UserError as error:
            raise SystemExit(str(error)) from error

    def on_multirun_start(self, config: DictConfig, **kwargs: Any) -> None:
        """End the program with one sentence where a job's configuration is wrong."""
        for overrides in sweep_jobs(config, GlobalHydra.instance().config_loader()):
            try:
                checked_config(_compose(config, overrides), overrides)
            except (UserError, CompactHydraException) as error:
                raise SystemExit(f"Job {' '.join(overrides)} of this sweep cannot run: {error}") from error
        try:
            check_writable("hydra.sweep.dir", config.hydra.sweep.dir)
        except UserError as error:
            raise SystemExit(str(error)) from error


def _compose(config: DictConfig, overrides: Sequence[str]) -> DictConfig:
    loader = GlobalHydra.instance().config_loader()
    return _task_config(loader.load_sweep_config(config, list(overrides)))


def _task_config(config: DictConfig) -> DictConfig:
    """Leave Hydra's own node out: parts of it are only known inside a job."""
    return OmegaConf.masked_copy(config, [str(key) for key in config if key != "hydra"])


def _resolved(cfg: DictConfig) -> dict[str, Any]:
    container = OmegaConf.to_container(cfg, resolve=True)
    assert isinstance(container, dict)
    return {str(key): value for key, value in container.items()}


def _job_name(overrides: list[str], number: int | None) -> str:
    name = ("" if number is None else f"{number}: ") + (" ".join(overrides) or "default")
    return name[:MAX_NAME]


def _sweep_name(folder: str) -> str:
    """Name a sweep by the end of its directory, as a whole path may be too long."""
    return "/".join(Path(folder).parts[-2:])[-MAX_NAME:]
