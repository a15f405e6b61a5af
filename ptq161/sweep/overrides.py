"""The jobs of a sweep and their overrides, read from its configuration."""

from __future__ import annotations

import re
from collections.abc import Iterator, Sequence
from typing import Any

# Internal, but the only code that splits overrides into jobs as Hydra itself does.
from hydra._internal.core_plugins.basic_sweeper import BasicSweeper
from hydra.core.config_loader import ConfigLoader
from hydra.core.override_parser.overrides_parser import OverridesParser
from omegaconf import DictConfig

_PLAIN = re.compile(r"[\w./:+-]+", re.ASCII)


def sweep_jobs(config: DictConfig, loader: ConfigLoader | None) -> Iterator[Sequence[str]]:
    """Yield the overrides of each job of Hydra's basic sweeper; nothing for others, which select values as they go.

    Args:
        config: the sweep's composed configuration, with Hydra's node.
        loader: expands ``glob(...)``; None refuses it.

    Raises:
        HydraException: the overrides cannot be read.
    """
    if "BasicSweeper" not in config.hydra.sweeper.get("_target_", ""):
        return
    parameters = [f"{key}={value}" for key, value in (config.hydra.sweeper.get("params") or {}).items()]
    parsed = OverridesParser.create(config_loader=loader).parse_overrides([*parameters, *config.hydra.overrides.task])
    for batch in BasicSweeper.split_arguments(parsed, max_batch_size=None):
        yield from batch


def own_overrides(overrides: Sequence[str], sweep: DictConfig) -> list[str]:
    """Return the overrides of a job that are not the whole sweep's: those in which it differs from other jobs.

    Args:
        overrides: the job's.
        sweep: the sweep's composed configuration, with Hydra's node.
    """
    shared = {_plain(override) for override in sweep.hydra.overrides.task}
    return [override for override in overrides if _plain(override) not in shared]


def as_value(value: Any) -> str:
    """Return a plain value in the grammar of Hydra's overrides."""
    if value is None or isinstance(value, bool):
        return {None: "null", True: "true", False: "false"}[value]
    text = str(value)
    if not isinstance(value, str) or _PLAIN.fullmatch(text):
        return text
    # Inside quotes, backslashes before a quote or at the end are escapes in Hydra's grammar.
    escaped = re.sub(r"(\\*)('|$)", lambda found: 2 * found[1] + ("\\'" if found[2] else ""), text)
    return f"'{escaped}'"


def _plain(override: str) -> str:
    """Normalize what Hydra changes in an override as typed: spaces, and the case of ``true``."""
    return "".join(override.split()).lower()
