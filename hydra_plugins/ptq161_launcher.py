"""Makes :mod:`ptq161.sweep.launcher` known to Hydra, which takes launchers from this namespace package alone.

Hydra imports every module here whenever it starts, so this one imports nothing heavy by itself.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from hydra.core.utils import JobReturn
from hydra.plugins.launcher import Launcher
from hydra.types import HydraContext, TaskFunction
from omegaconf import DictConfig


class LocalLauncher(Launcher):
    """One subprocess per job on this machine (``hydra/launcher=local``).

    Args:
        settings: the keys of ``conf/hydra/launcher/local.yaml``; :meth:`setup` checks them.
    """

    def __init__(self, **settings: Any) -> None:
        self._settings = settings

    def setup(self, *, hydra_context: HydraContext, task_function: TaskFunction, config: DictConfig) -> None:
        """Check the launcher's settings against this machine and keep the sweep's configuration.

        Raises:
            FailedRunError: a setting of the launcher is wrong or does not fit this machine.
        """
        from ptq161.sweep.launcher import Sweep

        self._sweep = Sweep.open(self._settings, hydra_context, task_function, config)

    def launch(self, job_overrides: Sequence[Sequence[str]], initial_job_idx: int) -> Sequence[JobReturn]:
        """Run the jobs and return what each returned, in their order."""
        return self._sweep.launch(job_overrides, initial_job_idx)
