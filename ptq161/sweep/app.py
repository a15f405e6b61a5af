"""The command ``ptq161 run``, and ``python run.py``: Hydra composes the configuration, each job is a run."""

from __future__ import annotations

import os
import sys
from collections.abc import Sequence

import hydra
from hydra.core.utils import env_override
from hydra.errors import HydraException
from omegaconf import DictConfig
from omegaconf.errors import OmegaConfBaseException

from ptq161.errors import UserError
from ptq161.files.paths import absolute_path
from ptq161.run.command_line import check_arguments, sentence_of
from ptq161.run.conf import CONF

_FOLDERS = ("PTQ161_STORE", "PTQ161_CACHE")
"""Environment variables that name a folder."""


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
        the exit status: 1, with one sentence on stderr, where the run or a job of the sweep failed for a reason that
        the user can put right. ``HYDRA_FULL_ERROR=1`` shows the traceback of it instead.
    """
    traceback = os.environ.get("HYDRA_FULL_ERROR") == "1"
    try:
        # What Hydra reads.
        sys.argv[1:] = check_arguments(sys.argv[1:] if arguments is None else arguments)
        for name in _FOLDERS:  # for jobs in other working directories too
            if folder := os.environ.get(name):
                os.environ[name] = str(absolute_path(name, folder))
        # So Hydra raises, where it would print several lines of its own.
        with env_override({"HYDRA_FULL_ERROR": "1"}):
            job()
    except (UserError, HydraException, OmegaConfBaseException) as error:
        if traceback:
            raise
        print(sentence_of(error), file=sys.stderr)
        return 1
    except SystemExit as end:  # of a callback
        if traceback and end.__cause__ is not None:
            raise end.__cause__ from None
        raise
    return 0
