"""The mirror of a record in Weights & Biases. A failure there is logged and never ends the run."""

from __future__ import annotations

import contextlib
import logging
import os
import re
import sys
import threading
from collections.abc import Callable, Iterable, Iterator, Mapping
from concurrent.futures import Future
from pathlib import Path
from typing import Any, Protocol, TypeVar

from ptq161.tracking.settings import LONGEST_NAME, TrackerConfig
from ptq161.tracking.wandb_settings import shortened, valid_tags, wandb_mode

# W&B's own limits are 90 s and none at all. What is not sent in time stays on disk for `wandb sync`.
_INIT_TIMEOUT_SECONDS = 30
_FINISH_TIMEOUT_SECONDS = 120
# Added to both limits: W&B itself keeps them only while its service process responds.
_GRACE_SECONDS = 15
_MIRRORED_FILES = ("manifest.json", "results.json", "run.log")

_T = TypeVar("_T")

log = logging.getLogger(__name__)


class Mirror(Protocol):
    """Receives what a record receives. None of its methods raises."""

    def metric(self, name: str, value: float, where: Mapping[str, int | str]) -> None:
        """Mirror one metric; ``where`` says to what it belongs (block, epoch, linear)."""

    def sample(self, name: str, text: str) -> None:
        """Mirror one text sample."""

    def results(self, results: Mapping[str, Any]) -> None:
        """Mirror the content of ``results.json``."""

    def close(self, state: str, exit_code: int, exception: Mapping[str, str] | None) -> None:
        """End the mirrored run.

        Args:
            state: ``exit_state`` of the manifest.
            exit_code: 0 for a finished run.
            exception: type and message of what ended the run; None for a finished one.
        """


class NullMirror:
    """The mirror of a run that is recorded in its directory alone: it drops everything."""

    def metric(self, name: str, value: float, where: Mapping[str, int | str]) -> None:
        """Drop the metric."""

    def sample(self, name: str, text: str) -> None:
        """Drop the text sample."""

    def results(self, results: Mapping[str, Any]) -> None:
        """Drop the results."""

    def close(self, state: str, exit_code: int, exception: Mapping[str, str] | None) -> None:
        """Return at once: there is no mirrored run to end."""


def open_mirror(
    tracker: TrackerConfig,
    run_dir: Path,
    config: Mapping[str, Any],
    job_name: str,
    group: str | None,
    tags: list[str],
) -> Mirror:
    """Return the mirror of ``tracker.name``; where W&B cannot start, log that once and mirror nothing."""
    if tracker.name == "none":
        return NullMirror()
    try:
        run = _within(
            _INIT_TIMEOUT_SECONDS + _GRACE_SECONDS,
            lambda: _init(tracker, run_dir, config, job_name, group, tags),
        )
    except Exception as error:
        _give_up("start", error)
        return NullMirror()
    return NullMirror() if run is None else _WandbMirror(run, run_dir)


class _WandbMirror:
    """One W&B run. The first failure is logged in one line, and nothing is sent after it.

    Args:
        run: a started ``wandb.Run``.
        run_dir: of the record; its files are uploaded when the run ends.
    """

    def __init__(self, run: Any, run_dir: Path) -> None:
        self._run = run
        self._run_dir = run_dir
        self._axes: set[str] = set()
        self._defined: set[str] = set()

    def metric(self, name: str, value: float, where: Mapping[str, int | str]) -> None:
        """Log one number on a chart of its own, against step, epoch or block (see :func:`_chart`)."""
        key, axis = _chart(name, where)

        def send() -> None:
            if axis is None:
                self._run.log({key: value})
                return
            if key not in self._defined:
                self._define(key, axis)
            self._run.log({key: value, axis: where[axis]})

        self._guard("log", send)

    def sample(self, name: str, text: str) -> None:
        """Put a text sample into the run's summary."""
        self._guard("log", lambda: self._run.summary.update({f"sample/{name}": text}))

    def results(self, results: Mapping[str, Any]) -> None:
        """Put every result into the run's summary, under its own name and a plain one (:func:`_plain_names`)."""
        values = dict(results.get("metrics", {}))
        for model in ("full_precision", "merged", "before_finetune"):
            values |= {f"{model}/{name}": value for name, value in results.get(model, {}).items()}
        values |= {plain: values[name] for name, plain in _plain_names(values).items()}
        self._guard("log", lambda: self._run.summary.update(values))

    def close(self, state: str, exit_code: int, exception: Mapping[str, str] | None) -> None:
        """Finish the run, and end W&B's service and threads in this process."""
        summary: dict[str, Any] = {"exit_state": state}
        if exception is not None:
            summary["exception"] = f"{exception['type']}: {exception['message']}"

        def end() -> None:
            self._run.summary.update(summary)
            for name in _MIRRORED_FILES:
                if (self._run_dir / name).exists():
                    self._run.save(str(self._run_dir / name), base_path=str(self._run_dir), policy="now")
            self._run.finish(exit_code=exit_code)
            _teardown()

        self._guard("finish", lambda: _within(_FINISH_TIMEOUT_SECONDS + _GRACE_SECONDS, end))

    def _define(self, key: str, axis: str) -> None:
        if axis not in self._axes:
            self._run.define_metric(axis, hidden=True, summary="none")
            self._axes.add(axis)
        # The summary is a row of the project's table: it gets the results, and not the last value of each curve.
        self._run.define_metric(key, step_metric=axis, summary="none")
        self._defined.add(key)

    def _guard(self, action: str, call: Callable[[], None]) -> None:
        if self._run is None:
            return
        try:
            call()
        except Exception as error:
            self._run = None
            _give_up(action, error)


def _chart(name: str, where: Mapping[str, int | str]) -> tuple[str, str | None]:
    """Return the W&B key of a metric and the key of its x-axis (None: W&B's own step).

    A loss per epoch and block is one curve per block, ``loss/block_03`` against ``epoch``; an error per linear is
    one curve per kind of linear, ``output_error/self_attn/q_proj`` against ``block``.
    """
    axis = next((key for key in ("step", "epoch", "block") if isinstance(where.get(key), int)), None)
    parts = [name]
    for key, value in where.items():
        if key == axis:
            continue
        if key == "linear":
            # Full names begin with the block's index. A dot means nesting to W&B, a slash does not.
            parts.append(re.sub(r"^\d+\.", "", str(value)).replace(".", "/"))
        else:
            parts.append(f"{key}_{value:02d}" if isinstance(value, int) else f"{key}_{value}")
    return "/".join(parts), axis


def _plain_names(names: Iterable[str]) -> dict[str, str]:
    """Return name -> a name of letters, digits and underscores, which W&B can sort and filter by.

    Names that are plain already are left out; two names never get the same plain one.
    """
    taken = set(names)
    plain: dict[str, str] = {}
    for name in names:
        candidate = base = re.sub(r"^(?=\d)", "_", re.sub(r"\W", "_", name, flags=re.ASCII))
        if candidate == name:
            continue
        number = 2
        while candidate in taken:
            candidate, number = f"{base}_{number}", number + 1
        taken.add(candidate)
        plain[name] = candidate
    return plain


def _init(
    tracker: TrackerConfig, run_dir: Path, config: Mapping[str, Any], job_name: str, group: str | None, tags: list[str]
) -> Any:
    """Start a W&B run; None where W&B is switched off."""
    # W&B reads it when it is first used in a process; set WANDB_SILENT=false to see its messages.
    os.environ.setdefault("WANDB_SILENT", "true")
    # Imported here: it takes over a second, which a run without a tracker need not spend. `wandb.setup` is avoided: it
    # starts the service while it holds a lock that its own error path takes again, so a missing service hangs it.
    import wandb

    with _untouched_hooks():
        mode = wandb_mode(tracker)
        if mode == "disabled":
            return None
        if mode == "offline":
            # W&B's telemetry ignores the mode of the run; an offline run must not use the network at all.
            os.environ.setdefault("WANDB_ERROR_REPORTING", "false")
        run = wandb.init(
            project=tracker.project,
            entity=tracker.entity,
            name=shortened(job_name, LONGEST_NAME),
            group=None if group is None else shortened(group, LONGEST_NAME),
            tags=valid_tags(tags),
            dir=str(run_dir),
            config=dict(config),
            mode=mode,
            reinit="create_new",
            settings=wandb.Settings(
                console="off",
                init_timeout=_INIT_TIMEOUT_SECONDS,
                finish_timeout=_FINISH_TIMEOUT_SECONDS,
                finish_timeout_raises=True,
            ),
        )
    if not Path(run.dir).is_relative_to(run_dir):
        run.finish(exit_code=1)
        raise OSError(f"{run_dir / 'wandb'} cannot be written")
    if mode == "online":
        log.info("W&B shows this run at %s", run.url)
    return run


def _give_up(action: str, error: Exception) -> None:
    sentence = " ".join(str(error).split()) or type(error).__name__
    log.warning("W&B failed to %s (%s); the run continues without it; its record is complete.", action, sentence)
    # A broken service may also fail, or hang, while it is shut down.
    with contextlib.suppress(Exception):
        _within(_GRACE_SECONDS, _teardown)


def _teardown() -> None:
    """End W&B's service process and threads, which would otherwise live until this process ends."""
    import wandb

    wandb.teardown()


def _within(seconds: float, call: Callable[[], _T]) -> _T:
    """Return the value of ``call``, made on a thread of its own that is abandoned after ``seconds``.

    Raises:
        TimeoutError: it has not returned in time.
        Exception: whatever ``call`` raises.
    """
    outcome: Future[_T] = Future()

    def work() -> None:
        try:
            outcome.set_result(call())
        # The waiting thread raises it.
        except BaseException as error:
            outcome.set_exception(error)

    # An executor's threads would be joined when the process ends; a daemon's are not.
    threading.Thread(target=work, name="wandb-mirror", daemon=True).start()
    try:
        return outcome.result(seconds)
    except TimeoutError as error:
        raise TimeoutError(str(error) or f"no answer within {seconds:g} s") from error


@contextlib.contextmanager
def _untouched_hooks() -> Iterator[None]:
    """Restore ``sys.excepthook`` and ``sys.exit``, which W&B replaces: its hook prints tracebacks of user errors."""
    excepthook, leave = sys.excepthook, sys.exit
    try:
        yield
    finally:
        sys.excepthook, sys.exit = excepthook, leave
