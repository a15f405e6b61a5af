"""``hydra/launcher=local``: a sweep on one machine, one subprocess per job, as many at a time as there are slots.

The processes are forked from one that has imported everything and done nothing else (the standard library's fork
server), so that a job starts without the seconds that the imports take. That process never initializes CUDA, which
cannot be used after a fork.
"""

from __future__ import annotations

import collections
import contextlib
import dataclasses
import logging
import os
import signal
import sys
import time
from collections.abc import Generator, Iterable, Mapping, Sequence
from multiprocessing.connection import Connection, wait
from multiprocessing.context import ForkServerContext, SpawnContext
from multiprocessing.process import BaseProcess
from typing import Any

import torch
from hydra.core.utils import JobReturn, JobStatus, configure_log, env_override, filter_overrides, setup_globals
from hydra.types import HydraContext, TaskFunction
from omegaconf import DictConfig, open_dict

from ptq161.checks import check_at_least
from ptq161.errors import UserError
from ptq161.run.config import build
from ptq161.sweep.failures import STOPPED, FailedJob, FailedRunError, Failure, print_failure, record_failure
from ptq161.sweep.overrides import own_overrides
from ptq161.sweep.worker import CONSOLE, Job, TaskReference, work
from ptq161.tracking.interrupts import Interrupts

log = logging.getLogger(__name__)

_PRELOADED = ("ptq161.sweep.job", "ptq161.run.pipeline", "wandb")
_THREAD_COUNTS = ("OMP_NUM_THREADS", "MKL_NUM_THREADS", "OPENBLAS_NUM_THREADS")
_GRACE_SECONDS = 30.0
"""Time in which an interrupted job may close its record before it is killed."""
# Apple's libraries are not safe after a fork: there, each process imports everything anew.
_CONTEXT: ForkServerContext | SpawnContext = ForkServerContext() if sys.platform == "linux" else SpawnContext()


@dataclasses.dataclass(frozen=True)
class Settings:
    """The keys of ``conf/hydra/launcher/local.yaml``.

    Attributes:
        slots: jobs at a time; None is one for each ``gpus_per_job`` GPUs, and one without a GPU.
        gpus_per_job: GPUs that are visible to a job.
        threads: threads of a job; None is cores // slots.
        retries: how often a job that was killed by a signal is started again.
    """

    slots: int | None = None
    gpus_per_job: int = 1
    threads: int | None = None
    retries: int = 1

    def __post_init__(self) -> None:
        """Reject counts that are too small."""
        check_at_least("hydra.launcher.slots", self.slots, 1)
        check_at_least("hydra.launcher.gpus_per_job", self.gpus_per_job, 0)
        check_at_least("hydra.launcher.threads", self.threads, 1)
        check_at_least("hydra.launcher.retries", self.retries, 0)


@dataclasses.dataclass(frozen=True)
class Slot:
    """A share of the machine, used by one job at a time.

    Attributes:
        gpus: ``CUDA_VISIBLE_DEVICES`` of its jobs; None leaves it as it is.
    """

    gpus: str | None


def _plan_slots(settings: Settings, gpus: Sequence[str]) -> list[Slot]:
    """Divide the machine into slots.

    Args:
        settings: of the launcher.
        gpus: names of all GPUs, as in ``CUDA_VISIBLE_DEVICES``.

    Raises:
        UserError: a job is to have more GPUs than there are.
    """
    per_job = settings.gpus_per_job
    if not gpus:
        return [Slot(None)] * (settings.slots or 1)
    if per_job > len(gpus):
        raise UserError(
            f"hydra.launcher.gpus_per_job={per_job}: this machine has {len(gpus)} GPUs; use at most {len(gpus)}."
        )
    if per_job == 0:
        return [Slot("")] * (settings.slots or 1)
    groups = [",".join(gpus[i : i + per_job]) for i in range(0, len(gpus) - per_job + 1, per_job)]
    return [Slot(groups[i % len(groups)]) for i in range(settings.slots or len(groups))]


def _visible_gpus() -> list[str]:
    """Return the names of the GPUs that this process may use."""
    count = torch.cuda.device_count()
    named = os.environ.get("CUDA_VISIBLE_DEVICES", "").split(",")
    return named[:count] if len(named) >= count and named != [""] else [str(i) for i in range(count)]


@dataclasses.dataclass(frozen=True)
class Sweep:
    """A sweep as Hydra passes it to a launcher, checked.

    Attributes:
        settings: of the launcher.
        slots: the shares of the machine.
        hydra_context: holds the config loader.
        task: what every job runs.
        config: the sweep's composed configuration.
    """

    settings: Settings
    slots: list[Slot]
    hydra_context: HydraContext
    task: TaskReference
    config: DictConfig

    @classmethod
    def open(
        cls, settings: Mapping[str, Any], hydra_context: HydraContext, task: TaskFunction, config: DictConfig
    ) -> Sweep:
        """Check the launcher's settings.

        Raises:
            FailedRunError: one is wrong.
        """
        try:
            checked = build(Settings, settings, "hydra.launcher")
            slots = _plan_slots(checked, _visible_gpus())
        except UserError as error:
            raise FailedRunError(str(error)) from error
        return cls(checked, slots, hydra_context, TaskReference.to(task), config)

    @property
    def threads(self) -> int:
        """Threads of a job."""
        cores = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1
        return self.settings.threads or max(1, cores // len(self.slots))

    def launch(self, job_overrides: Sequence[Sequence[str]], first: int) -> list[JobReturn]:
        """Run jobs, and log how each ended.

        Args:
            job_overrides: of each job.
            first: number of the first one.

        Returns:
            one ``JobReturn`` for each job, in their order, as Hydra's own launcher does.

        Raises:
            SystemExit: a job failed, and ``on_error`` is ``stop``.
            Interrupted: SIGINT or SIGTERM; the jobs have been ended.
        """
        setup_globals()
        configure_log(self.config.hydra.hydra_logging, self.config.hydra.verbose)
        count = len(job_overrides)
        log.info("Launching %d jobs, %d at a time with %d threads each", count, len(self.slots), self.threads)
        # A generator, so that the first jobs start before the last ones are composed.
        jobs = (self._compose(first + i, overrides) for i, overrides in enumerate(job_overrides))
        returns: dict[int, JobReturn] = {}
        with (
            Interrupts().installed(),
            # Set before the fork server starts: libraries read these when they are imported, once, in that process.
            env_override(dict.fromkeys(_THREAD_COUNTS, str(self.threads))),
            contextlib.closing(_run_jobs(jobs, self.slots, self.task, self.settings.retries)) as ended,
        ):
            for job, result, seconds in ended:
                returns[job.number] = result
                self._report(job, result, f"{seconds:.1f} s, {len(returns)} of {count}")
        return [returns[number] for number in sorted(returns)]

    def _compose(self, number: int, overrides: Sequence[str]) -> Job:
        config = self.hydra_context.config_loader.load_sweep_config(self.config, list(overrides))
        with open_dict(config):
            config.hydra.job.id = config.hydra.job.num = number
        folder = os.path.join(str(config.hydra.sweep.dir), str(config.hydra.sweep.subdir))
        return Job(number, list(filter_overrides(overrides)), config, folder)

    def _report(self, job: Job, result: JobReturn, where: str) -> None:
        # Only the overrides in which this job differs from the others.
        label = " ".join(own_overrides(job.overrides, self.config))
        log.info("\t#%d : %s %s (%s)", job.number, label, result.status.name.lower(), where)
        if result.status == JobStatus.COMPLETED:
            return
        error = result._return_value
        print_failure(Failure(job.number, job.overrides, getattr(error, "sentence", str(error)), job.run_dir))
        if self.config.on_error == "stop":
            raise SystemExit(STOPPED)


@dataclasses.dataclass(frozen=True)
class _Worker:
    job: Job
    slot: Slot
    process: BaseProcess
    results: Connection
    began: float


def _run_jobs(
    jobs: Iterable[Job], slots: Sequence[Slot], task: TaskReference, retries: int
) -> Generator[tuple[Job, JobReturn, float], None, None]:
    """Run jobs in processes of their own, one per slot at a time.

    A job whose process was killed by a signal is started again, at most ``retries`` times. Closing the iterator, or an
    exception while it waits, interrupts all running jobs: each closes its record as ``interrupted``.

    Yields:
        each job as it ends, with what it returned and the seconds that it took.
    """
    _CONTEXT.set_forkserver_preload(list(_PRELOADED))
    coming, again, free = iter(jobs), list[Job](), collections.deque(slots)
    workers: list[_Worker] = []
    try:
        while True:
            while free and (job := again.pop() if again else next(coming, None)):
                workers.append(_start(job, free.popleft(), task))
            if not workers:
                return
            # Ready when a result arrives, or when the process that holds the other end has gone.
            ready = wait([worker.results for worker in workers])
            for worker in [worker for worker in workers if worker.results in ready]:
                result = _receive(worker)
                workers.remove(worker)
                free.append(worker.slot)
                if result is None and _was_killed(worker) and worker.job.attempt <= retries:
                    log.info("\t#%d : %s; it is started again", worker.job.number, _how_it_ended(worker))
                    again.append(dataclasses.replace(worker.job, attempt=worker.job.attempt + 1))
                else:
                    yield worker.job, result or _without_result(worker), time.monotonic() - worker.began
    finally:
        _interrupt(workers)


def _start(job: Job, slot: Slot, task: TaskReference) -> _Worker:
    receiver, sender = _CONTEXT.Pipe(duplex=False)
    process = _CONTEXT.Process(target=work, args=(job, task, slot.gpus, sender), name=f"job-{job.number}")
    process.start()
    sender.close()
    return _Worker(job, slot, process, receiver, time.monotonic())


def _receive(worker: _Worker) -> JobReturn | None:
    """Return the result of a job, or None if its process ended without one; then join the process."""
    try:
        result: JobReturn | None = worker.results.recv()
    except (EOFError, OSError):
        result = None
    worker.results.close()
    _join([worker.process])
    return result


def _interrupt(workers: Sequence[_Worker]) -> None:
    for worker in workers:
        worker.process.terminate()
    _join([worker.process for worker in workers])


def _join(processes: Sequence[BaseProcess]) -> None:
    """Wait for processes that should be ending, and kill those that still run after ``_GRACE_SECONDS``."""
    deadline = time.monotonic() + _GRACE_SECONDS
    for process in processes:
        process.join(max(0.0, deadline - time.monotonic()))
        if process.is_alive():
            process.kill()
            process.join()


def _was_killed(worker: _Worker) -> bool:
    return worker.process.exitcode is not None and worker.process.exitcode < 0


def _how_it_ended(worker: _Worker) -> str:
    code = worker.process.exitcode
    if code is not None and code < 0:
        return f"killed by {signal.Signals(-code).name}"
    return f"its process exited with status {code} without a result"


def _without_result(worker: _Worker) -> JobReturn:
    job = worker.job
    attempts = f" in attempt {job.attempt}" if job.attempt > 1 else ""
    sentence = f"{_how_it_ended(worker)}{attempts}; its output is in {os.path.join(job.run_dir, CONSOLE)}."
    failure = Failure(job.number, job.overrides, sentence, job.run_dir)
    record_failure(job.config.hydra.sweep.dir, failure)
    result = FailedJob(overrides=job.overrides, cfg=job.config, task_name=job.config.hydra.job.name)
    result.status, result.return_value = JobStatus.FAILED, failure.error()
    return result
