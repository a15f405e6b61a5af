"""The jobs of a sweep and their overrides, read from its configuration."""

from __future__ import annotations

import re
from collections.abc import Sequence

# Internal, but the only code that splits overrides into jobs as Hydra itself does.
from hydra._internal.core_plugins.basic_sweeper import BasicSweeper
from hydra.core.config_loader import ConfigLoader
from hydra.core.override_parser.overrides_parser import OverridesParser
from omegaconf import DictConfig, read_write

from ptq161.run.command_line import exact_range


def has_basic_sweeper(config: DictConfig) -> bool:
    """Return whether a sweep's jobs are all combinations of listed values; other sweepers choose them as they go."""
    return "BasicSweeper" in config.hydra.sweeper.get("_target_", "")


def sweep_jobs(config: DictConfig, loader: ConfigLoader | None) -> list[Sequence[str]]:
    """Return the overrides of each job of Hydra's basic sweeper; none for others, which select values as they go.

    Args:
        config: the sweep's composed configuration, with Hydra's node.
        loader: expands ``glob(...)``; None refuses it.

    Raises:
        HydraException: the overrides cannot be read.
    """
    if not has_basic_sweeper(config):
        return []
    parameters = [f"{key}={value}" for key, value in (config.hydra.sweeper.get("params") or {}).items()]
    parsed = OverridesParser.create(config_loader=loader).parse_overrides([*parameters, *config.hydra.overrides.task])
    return [job for batch in BasicSweeper.split_arguments(parsed, max_batch_size=None) for job in batch]


def make_ranges_exact(config: DictConfig) -> None:
    """Replace the swept ranges of floats by their values (:func:`~ptq161.run.command_line.exact_range`), in place.

    What the sweeper, the names of the jobs, their records and identities see is then 0.3, and not 0.30000000000000004.

    Args:
        config: the sweep's composed configuration, with Hydra's node.

    Raises:
        UserError: a range has no values.
    """
    if not has_basic_sweeper(config):  # others draw from a range
        return
    with read_write(config.hydra):
        config.hydra.overrides.task = [exact_range(override) for override in config.hydra.overrides.task]
        for key, value in (config.hydra.sweeper.get("params") or {}).items():
            config.hydra.sweeper.params[key] = exact_range(f"{key}={value}").partition("=")[2]


def own_overrides(overrides: Sequence[str], sweep: DictConfig) -> list[str]:
    """Return the overrides of a job that are not the whole sweep's: those in which it differs from other jobs.

    Args:
        overrides: the job's.
        sweep: the sweep's composed configuration, with Hydra's node.
    """
    shared = {_plain(override) for override in sweep.hydra.overrides.task}
    return [override for override in overrides if _plain(override) not in shared]


def _plain(override: str) -> str:
    """Normalize what Hydra changes in an override as typed: spaces, the case of ``true``, a choice of one value."""
    return re.sub(r"=choice\((.*)\)$", r"=\1", "".join(override.split()).lower())
