"""The session of a run, which all stages share: its record, the cache, and the time that each stage takes."""

from __future__ import annotations

import contextlib
import dataclasses
import functools
import logging
import resource
import shutil
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any, Concatenate, ParamSpec, TypeVar

from ptq161.cache.results import FOLDERS, reuse_result, store_result
from ptq161.cache.stages import Stages
from ptq161.cache.store import Entry, Store, store_dir
from ptq161.errors import UserError
from ptq161.files.fingerprints import key_of
from ptq161.models.loading import is_packed_folder
from ptq161.run.config import RunConfig
from ptq161.run.contents import identity, text_files
from ptq161.run.preflight import unread_of_packed
from ptq161.tracking.ownership import owned
from ptq161.tracking.record import RunRecord

log = logging.getLogger(__name__)

_P = ParamSpec("_P")
_R = TypeVar("_R")
Results = dict[str, Any]
"""The content of ``results.json``."""


@dataclasses.dataclass(frozen=True)
class RunContext:
    """The facts of a run that do not change its result.

    Attributes:
        run_dir: directory of the record and the checkpoint.
        resolved: the composed configuration with every interpolation resolved.
        overrides: of the command line.
        job_name: name of the run in the mirror.
        group: the sweep it belongs to, as the mirror names it.
        sweep: the sweep's directory (``dir``) and the number of the job in it (``job``).
    """

    run_dir: str
    resolved: dict[str, Any]
    overrides: list[str]
    job_name: str
    group: str | None = None
    sweep: dict[str, str | int] | None = None


@dataclasses.dataclass(frozen=True)
class Session:
    """The arguments that every stage of a run has in common.

    Attributes:
        config: of the run.
        identity: everything that the result depends on, by content (:func:`ptq161.run.contents.identity`).
        record: receives metrics, facts and samples; models are saved in its ``run_dir``.
        stages: cache of the results of stages.
        seconds: stage -> seconds that it has taken so far.
    """

    config: RunConfig
    identity: dict[str, Any]
    record: RunRecord
    stages: Stages
    seconds: dict[str, float] = dataclasses.field(default_factory=dict)

    @contextlib.contextmanager
    def clock(self, stage: str) -> Iterator[None]:
        """Add the time that the context takes to a stage's seconds."""
        began = time.perf_counter()
        yield
        self.seconds[stage] = round(self.seconds.get(stage, 0.0) + time.perf_counter() - began, 2)


def timed(stage: str) -> Callable[[Callable[Concatenate[Session, _P], _R]], Callable[Concatenate[Session, _P], _R]]:
    """Decorate a function of a session so that its time counts as a stage's."""

    def decorate(function: Callable[Concatenate[Session, _P], _R]) -> Callable[Concatenate[Session, _P], _R]:
        @functools.wraps(function)
        def wrapper(session: Session, /, *args: _P.args, **kwargs: _P.kwargs) -> _R:
            with session.clock(stage):
                return function(session, *args, **kwargs)

        return wrapper

    return decorate


def is_packed_model(config: RunConfig) -> bool:
    """Return whether the model of a run is a packed checkpoint, which is evaluated and not quantized."""
    return config.model.path is not None and is_packed_folder(config.model.path)


def run_once(config: RunConfig, context: RunContext, compute: Callable[[Session], Results]) -> Results:
    """Record a run; reuse the results of an identical run that finished before, else compute them.

    Args:
        config: the run.
        context: its directory and names.
        compute: takes the session and returns the results.

    Returns:
        the content of ``results.json``.

    Raises:
        UserError: any error that the user can put right.
    """
    store = Store(store_dir(), force=config.force) if config.cache else None
    # The locks on directory and result outlive the record, which is stored after it is closed.
    with contextlib.ExitStack() as locks:
        locks.enter_context(owned(Path(context.run_dir)))
        with _open_record(config, context) as record:
            content = identity(config, store)
            record.describe(
                identity=key_of(content),
                identity_without_seed=key_of({**content, "seed": None}),
                text_files=text_files(content),
            )
            entry = None if store is None else locks.enter_context(store.entry("results", content))
            found = reuse_result(entry, record) if entry is not None and entry.finished else None
            results = _computed(Session(config, content, record, Stages(store)), compute) if found is None else found
            record.finish(results)
        if entry is not None and found is None:
            _store(entry, record.run_dir)
    return results


def _open_record(config: RunConfig, context: RunContext) -> contextlib.AbstractContextManager[RunRecord]:
    unread = unread_of_packed(config) if is_packed_model(config) else ()  # what is not used is not recorded
    return RunRecord.open(
        context.run_dir,
        config={key: value for key, value in context.resolved.items() if key not in unread},
        tracker=config.tracker,
        seeds={"seed": config.seed},
        job_name=context.job_name,
        group=context.group,
        sweep=context.sweep,
        tags=[config.model.name] if unread else [config.model.name, config.method_name],
    )


def _computed(session: Session, compute: Callable[[Session], Results]) -> Results:
    config, record = session.config, session.record
    for folder in FOLDERS:  # left by an earlier run in this directory
        shutil.rmtree(record.run_dir / folder, ignore_errors=True)
    log.info("dtype of evaluation and storage: %s (%s)", config.dtype, config.dtype_reason)
    record.describe(device=str(config.device), dtype=config.dtype)
    results = compute(session)
    peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024
    return {**results, "seconds": session.seconds, "peak_memory_bytes": peak}


def _store(entry: Entry, run_dir: Path) -> None:
    try:
        store_result(entry, run_dir)
    except UserError as error:
        log.warning("the result is complete, but was not stored for later runs: %s", error)
