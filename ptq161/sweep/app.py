"""The command ``ptq161 run``, and ``python run.py``: Hydra composes the configuration, each job is a run."""

from __future__ import annotations

import sys
from collections.abc import Sequence

import hydra
from omegaconf import DictConfig

from ptq161.run.conf import CONF


@hydra.main(version_base="1.3", config_path=str(CONF), config_name="config")
def job(cfg: DictConfig) -> None:
    """Run one job of the composed configuration."""
    from ptq161.sweep.job import run_job  # takes seconds, which --help need not wait for

    run_job(cfg)


def main(arguments: Sequence[str] | None = None) -> int:
    """Run the command, a sweep with ``-m``.

    Args:
        arguments: of the command line; None takes the process's own.

    Returns:
        the exit status 0. Hydra itself ends the process with status 1 if a job fails.
    """
    if arguments is not None:
        sys.argv[1:] = arguments  # what Hydra reads
    job()
    return 0
