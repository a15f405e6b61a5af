"""Between Hydra and the pipeline: one job, its errors, and the check of a sweep before its first job."""

from __future__ import annotations

import sys
from typing import Any

from hydra._internal.core_plugins.basic_sweeper import BasicSweeper
from hydra.core.global_hydra import GlobalHydra
from hydra.core.hydra_config import HydraConfig
from hydra.core.override_parser.overrides_parser import OverridesParser
from hydra.errors import CompactHydraException
from hydra.experimental.callback import Callback
from hydra.types import RunMode
from omegaconf import DictConfig, OmegaConf

from ptq161.config import load_run_config
from ptq161.errors import UserError
from ptq161.pipeline import RunContext, run


class FailedRunError(CompactHydraException):
    """A job's one sentence; Hydra prints it without a traceback (the run's log has that) and exits non-zero."""


def run_job(cfg: DictConfig) -> None:
    """Run one Hydra job.

    Raises:
        FailedRunError: the run failed for a reason that the user can put right.
    """
    hydra_config = HydraConfig.get()
    sweeping = hydra_config.mode == RunMode.MULTIRUN
    overrides = list(hydra_config.overrides.task)
    try:
        run(
            load_run_config(cfg),
            RunContext(
                run_dir=hydra_config.runtime.output_dir,
                resolved=_resolved(cfg),
                overrides=overrides,
                job_name=_job_name(overrides, sweeping),
                group=_sweep_name(hydra_config) if sweeping else None,
            ),
        )
    except UserError as error:
        if sweeping:  # Hydra tells only the first failure, and that after the last job
            print(f"Job {hydra_config.job.num} ({' '.join(overrides)}) failed: {error}", file=sys.stderr, flush=True)
        raise FailedRunError(str(error)) from error


class ValidateSweep(Callback):
    """Composes and checks the configuration of every job of a sweep before the first one runs."""

    def on_multirun_start(self, config: DictConfig, **kwargs: Any) -> None:
        """End the program with one sentence where a job's configuration is wrong."""
        if "BasicSweeper" not in config.hydra.sweeper.get("_target_", ""):
            return  # a search chooses its values as it goes; each job is checked when it starts
        loader = GlobalHydra.instance().config_loader()
        arguments = [*_sweep_parameters(config), *config.hydra.overrides.task]
        parsed = OverridesParser.create(config_loader=loader).parse_overrides(arguments)
        for batch in BasicSweeper.split_arguments(parsed, max_batch_size=None):
            for overrides in batch:
                try:
                    load_run_config(loader.load_sweep_config(config, list(overrides)))
                except (UserError, CompactHydraException) as error:
                    # Hydra turns a callback's exceptions into warnings; before the first job, leaving is right.
                    raise SystemExit(f"Job {' '.join(overrides)} of this sweep cannot run: {error}") from error


def _sweep_parameters(config: DictConfig) -> list[str]:
    parameters = config.hydra.sweeper.get("params") or {}
    return [f"{key}={value}" for key, value in parameters.items()]


def _resolved(cfg: DictConfig) -> dict[str, Any]:
    container = OmegaConf.to_container(cfg, resolve=True)
    assert isinstance(container, dict)
    return {str(key): value for key, value in container.items()}


def _job_name(overrides: list[str], sweeping: bool) -> str:
    num = f"{HydraConfig.get().job.num}: " if sweeping else ""
    return num + (" ".join(overrides) or "default")


def _sweep_name(hydra_config: Any) -> str:
    return str(hydra_config.sweep.dir)
