"""One Hydra job: from the composed configuration to the pipeline, and from its errors to Hydra."""

from __future__ import annotations

import sys
from pathlib import Path
from typing import Any

from hydra.core.hydra_config import HydraConfig
from hydra.core.utils import env_override
from hydra.types import RunMode
from omegaconf import DictConfig, OmegaConf

from ptq161.errors import UserError
from ptq161.run.preflight import checked_config, make_paths_absolute, name_local_model
from ptq161.sweep.failures import FailedRunError, Failure, print_failure, record_failure
from ptq161.tracking.settings import LONGEST_NAME
from ptq161.tracking.wandb_settings import own_run_id


def run_job(cfg: DictConfig) -> None:
    """Run one Hydra job.

    Raises:
        FailedRunError: the run failed for a reason that the user can put right.
    """
    hydra_config = HydraConfig.get()
    sweeping = hydra_config.mode == RunMode.MULTIRUN
    overrides = list(hydra_config.overrides.task)
    try:
        make_paths_absolute(cfg, hydra_config.runtime.cwd)
        name_local_model(cfg, overrides)
        config = checked_config(cfg, overrides)
        # Imports take seconds, which a wrong configuration need not wait for.
        from ptq161.estimate.predict import check_fits
        from ptq161.run.pipeline import run
        from ptq161.run.session import RunContext

        context = RunContext(
            run_dir=hydra_config.runtime.output_dir,
            resolved=_resolved(cfg),
            overrides=overrides,
            job_name=_job_name(overrides, hydra_config.job.num if sweeping else None),
            group=_sweep_name(hydra_config.sweep.dir) if sweeping else None,
            sweep={"dir": hydra_config.sweep.dir, "job": hydra_config.job.num} if sweeping else None,
        )
        check_fits(config)
        with env_override(own_run_id(hydra_config.job.num) if sweeping and config.tracker.name == "wandb" else {}):
            run(config, context)
    except Exception as error:
        if sweeping:  # Hydra would show only the first failure, after the last job
            sentence = str(error) if isinstance(error, UserError) else f"{type(error).__name__}: {error}"
            failure = Failure(hydra_config.job.num, overrides, sentence, hydra_config.runtime.output_dir)
            try:
                record_failure(hydra_config.sweep.dir, failure)
            except UserError as unwritable:  # it must not hide why the job failed
                print(unwritable, file=sys.stderr)
            print_failure(failure)
            raise failure.error() from error
        if isinstance(error, UserError):
            raise FailedRunError(str(error)) from error
        raise


def _resolved(cfg: DictConfig) -> dict[str, Any]:
    container = OmegaConf.to_container(cfg, resolve=True)
    assert isinstance(container, dict)
    return {str(key): value for key, value in container.items()}


def _job_name(overrides: list[str], number: int | None) -> str:
    name = ("" if number is None else f"{number}: ") + (" ".join(overrides) or "default")
    return name[:LONGEST_NAME]


def _sweep_name(folder: str) -> str:
    """Name a sweep after the last two parts of its directory, as the whole path may be too long."""
    return "/".join(Path(folder).parts[-2:])[-LONGEST_NAME:]
