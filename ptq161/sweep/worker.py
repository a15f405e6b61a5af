"""The process of one job of ``hydra/launcher=local``."""

from __future__ import annotations

import dataclasses
import inspect
import os
import signal
import sys
import threading
from multiprocessing import parent_process
from multiprocessing.connection import Connection, wait
from pathlib import Path
from typing import Any

from hydra import version

# Internal, but run_job requires it in its context: the callbacks of the configuration, as Hydra's launcher passes them.
from hydra._internal.callbacks import Callbacks
from hydra.core.hydra_config import HydraConfig
from hydra.core.utils import JobReturn, JobRuntime, run_job, setup_globals
from hydra.types import HydraContext, TaskFunction
from omegaconf import DictConfig
from tqdm import tqdm

from ptq161.files.streams import never_fail_to_print

CONSOLE = "console.log"


@dataclasses.dataclass(frozen=True)
class TaskReference:
    """The module and name of a task function, in the place of the function: a decorated one cannot be pickled.

    Attributes:
        module: its module; ``__main__`` is the same script in the worker.
        name: its name there.
    """

    module: str
    name: str

    @classmethod
    def to(cls, task: TaskFunction) -> TaskReference:
        """Refer to a function."""
        return cls(task.__module__, getattr(task, "__qualname__", type(task).__qualname__))

    def resolve(self) -> TaskFunction:
        """Return the function, without its decorator."""
        __import__(self.module)
        task: TaskFunction = inspect.unwrap(getattr(sys.modules[self.module], self.name))
        return task


@dataclasses.dataclass(frozen=True)
class Job:
    """One job of a sweep.

    Attributes:
        number: in the sweep, from 0.
        overrides: of the command line, for this job.
        config: composed, with Hydra's node.
        run_dir: its directory.
        attempt: from 1; a killed job is started again.
    """

    number: int
    overrides: list[str]
    config: DictConfig
    run_dir: str
    attempt: int = 1


def work(job: Job, task: TaskReference, gpus: str | None, results: Connection) -> None:
    """Run a job as Hydra's own launcher does, but with its output in a file, and send its ``JobReturn``.

    Args:
        job: the job.
        task: the task function.
        gpus: value of ``CUDA_VISIBLE_DEVICES``; None leaves it unchanged.
        results: receives the ``JobReturn``.
    """
    # Out of the terminal's process group: Ctrl-C reaches the sweep's process alone, which interrupts each job once.
    os.setsid()
    _end_with_parent()
    # Bars of forked processes share a lock, which a process that is killed would never give back.
    tqdm.set_lock(threading.RLock())
    if gpus is not None:
        os.environ["CUDA_VISIBLE_DEVICES"] = gpus
    _write_output_to(Path(job.run_dir, CONSOLE), append=job.attempt > 1)
    never_fail_to_print()
    try:
        results.send(_run(job, task))
    except KeyboardInterrupt as interrupt:
        sys.exit(getattr(interrupt, "exit_code", 130))


def _run(job: Job, task: TaskReference) -> JobReturn:
    version.setbase(job.config.hydra.runtime.version_base)
    setup_globals()
    HydraConfig.instance().set_config(job.config)
    JobRuntime.instance().set("name", job.config.hydra.job.name)
    # A job needs no config loader: its configuration is composed.
    loader: Any = None
    return run_job(
        hydra_context=HydraContext(config_loader=loader, callbacks=Callbacks(job.config)),
        task_function=task.resolve(),
        config=job.config,
        job_dir_key="hydra.sweep.dir",
        job_subdir_key="hydra.sweep.subdir",
    )


def _end_with_parent() -> None:
    """Interrupt this process when the sweep's process has ended, even if that was killed."""
    parent = parent_process()
    assert parent is not None

    def watch() -> None:
        wait([parent.sentinel])
        os.kill(os.getpid(), signal.SIGTERM)

    threading.Thread(target=watch, name="end-with-parent", daemon=True).start()


def _write_output_to(path: Path, append: bool) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    file = os.open(path, os.O_WRONLY | os.O_CREAT | (os.O_APPEND if append else os.O_TRUNC), 0o666)
    for stream in (sys.stdout, sys.stderr):
        stream.flush()
        os.dup2(file, stream.fileno())
    os.close(file)
