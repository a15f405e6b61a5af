"""The record of a run: local files that are complete without any service, and their mirror.

Usage::

    with RunRecord.open(run_dir, config=config, tracker=tracker, seeds={"run": 0}, job_name="demo") as record:
        record.describe(model_sha256=sha256_of_tensors(model.state_dict()))
        record.metric("loss", 0.5, block=3, epoch=0)
        record.finish({"metrics": {"ppl/boolq@512": 30.1}})
"""

from __future__ import annotations

import contextlib
import time
from collections.abc import Iterator, Mapping, Sequence
from datetime import UTC, datetime
from pathlib import Path
from typing import Any, TextIO

import yaml

from ptq161.files.atomic import write_atomically, writing
from ptq161.files.checksums import SUMS, sums_of_files
from ptq161.files.strict_json import encode_json
from ptq161.tracking.environment import describe_environment
from ptq161.tracking.interrupts import Interrupted, Interrupts
from ptq161.tracking.layout import RECORD_FILES, SCHEMA_VERSION
from ptq161.tracking.ownership import owned
from ptq161.tracking.run_log import run_log
from ptq161.tracking.settings import TrackerConfig
from ptq161.tracking.wandb_mirror import Mirror, NullMirror, open_mirror

_RESERVED = frozenset({"time", "name", "value", "nonfinite"})
_NO_RESULTS = {"type": "NoResults", "message": "the run ended without results"}


class RunRecord:
    """The files of one run directory; made by :meth:`open`.

    ``config.yaml`` (the resolved config), ``manifest.json`` (the environment of the run, and how it ended),
    ``metrics.jsonl`` (every metric as it arises), ``samples.jsonl`` (text samples), ``results.json`` (the scores) and
    ``run.log``. Every JSON file has a ``schema_version``; for the two line files it is in the manifest.
    """

    def __init__(self, run_dir: Path, manifest: dict[str, Any], metrics: TextIO, mirror: Mirror) -> None:
        self.run_dir = run_dir
        self.manifest = manifest
        self._metrics = metrics
        self._mirror = mirror
        self._finished = False
        self._started = time.monotonic()

    @classmethod
    @contextlib.contextmanager
    def open(
        cls,
        run_dir: Path | str,
        *,
        config: Mapping[str, Any],
        tracker: TrackerConfig,
        seeds: Mapping[str, int],
        job_name: str,
        group: str | None = None,
        tags: Sequence[str] = (),
        sweep: Mapping[str, str | int] | None = None,
    ) -> Iterator[RunRecord]:
        """Begin a record, and close it with the state in which the context ends.

        The state is ``finished`` after :meth:`finish`; ``interrupted`` after SIGINT, SIGTERM or a
        ``KeyboardInterrupt``; ``failed`` after any other exception, or without results. Inside, both signals raise
        :class:`Interrupted`. A record that the directory already holds is replaced.

        Args:
            run_dir: is made where it does not exist.
            config: the resolved configuration, plain containers and values.
            tracker: where the record is mirrored; its ``group`` replaces ``group``, its ``tags`` join ``tags``.
            seeds: name -> seed.
            job_name: name of the run in the mirror.
            group: the sweep that the run belongs to.
            tags: labels of the run in the mirror.
            sweep: ``dir`` and ``job`` (its number), where the run is a job of a sweep.

        Raises:
            UserError: the directory cannot be written, or belongs to a run that has not ended.
        """
        folder, interrupts = Path(run_dir).absolute(), Interrupts()
        group, labels = tracker.group or group, list(dict.fromkeys([*tracker.tags, *tags]))
        with contextlib.ExitStack() as stack:
            stack.enter_context(owned(folder))
            with writing(folder):
                for stale in (SUMS, "results.json", "samples.jsonl"):
                    (folder / stale).unlink(missing_ok=True)
            stack.enter_context(interrupts.installed())
            log = stack.enter_context(run_log(folder / "run.log"))
            with writing(folder / "metrics.jsonl"):
                metrics = (folder / "metrics.jsonl").open("w", encoding="utf-8")
            stack.callback(_close_quietly, metrics)
            record = cls(folder, _first_manifest(job_name, group, labels, seeds, sweep), metrics, NullMirror())
            write_atomically(folder / "config.yaml", yaml.safe_dump(dict(config), sort_keys=False, allow_unicode=True))
            record._write_manifest()
            try:
                record._mirror = open_mirror(tracker, folder, config, job_name, group, labels)
                yield record
            except BaseException as error:
                log.traceback(error)
                # A full disk may be why the run ends: closing fails as well then, and must not hide the first error.
                with contextlib.suppress(Exception):
                    record._close(interrupts, _state_after(error), error)
                raise
            record._close(interrupts, "finished" if record._finished else "failed", None)

    def describe(self, **facts: Any) -> None:
        """Merge facts into ``manifest.json``, such as ``model_sha256``.

        Raises:
            UserError: the file cannot be written.
        """
        self.manifest.update(facts)
        self._write_manifest()

    def metric(self, name: str, value: float, /, **where: int | str) -> None:
        """Write one metric as a line of ``metrics.jsonl``; a :class:`ptq161.methods.base.OnMetric`.

        Args:
            name: of the metric.
            value: any number; NaN and infinities are kept (see :func:`ptq161.files.strict_json.encode_json`).
            where: what it belongs to, such as block, epoch, linear.

        Raises:
            UserError: the file cannot be written.
            ValueError: a key of ``where`` is a key of the line itself.
        """
        if clash := _RESERVED & where.keys():
            raise ValueError(f"{sorted(clash)[0]!r} cannot say where a metric belongs: it is a key of the line itself")
        self._metric(_now(), name, float(value), where)

    def sample(self, name: str, text: str) -> None:
        """Append a text sample to ``samples.jsonl``.

        Raises:
            UserError: the file cannot be written.
        """
        self._sample(_now(), name, text)

    def copy_lines(self, metrics: Sequence[Mapping[str, Any]], samples: Sequence[Mapping[str, Any]]) -> None:
        """Record the metrics and text samples of an identical run, with their original times.

        Args:
            metrics: lines of its ``metrics.jsonl``, as :func:`ptq161.tracking.read.read_run` returns them.
            samples: lines of its ``samples.jsonl``.

        Raises:
            UserError: a file cannot be written.
        """
        for line in metrics:
            where = {key: value for key, value in line.items() if key not in _RESERVED}
            self._metric(line["time"], line["name"], line["value"], where)
        for line in samples:
            self._sample(line["time"], line["name"], line["text"])

    def finish(self, results: Mapping[str, Any]) -> None:
        """Write ``results.json``; the run's state is ``finished`` unless an exception follows.

        Args:
            results: ``metrics`` and ``full_precision`` (both flat, name -> number), ``protocol`` (metric ->
                settings), and other results.

        Raises:
            UserError: the file cannot be written.
        """
        document = {"schema_version": SCHEMA_VERSION, **results}
        write_atomically(self.run_dir / "results.json", encode_json(document, indent=2) + "\n")
        self._mirror.results(results)
        self._finished = True

    def _metric(self, time_: float, name: str, value: float, where: Mapping[str, int | str]) -> None:
        with writing(self.run_dir / "metrics.jsonl"):
            self._metrics.write(encode_json({"time": time_, "name": name, "value": value, **where}) + "\n")
            self._metrics.flush()
        self._mirror.metric(name, value, where)

    def _sample(self, time_: float, name: str, text: str) -> None:
        path = self.run_dir / "samples.jsonl"
        with writing(path), path.open("a", encoding="utf-8") as file:
            file.write(encode_json({"time": time_, "name": name, "text": text}) + "\n")
        self._mirror.sample(name, text)

    def _close(self, interrupts: Interrupts, state: str, error: BaseException | None) -> None:
        exception = {"type": type(error).__name__, "message": str(error)} if error else None
        if state == "failed" and error is None:
            exception = _NO_RESULTS
        self.manifest.update(
            end=_iso_now(),
            duration_seconds=round(time.monotonic() - self._started, 3),
            exit_state=state,
            exception=exception,
        )
        try:
            with interrupts.deferred():
                self._write_manifest()
                self._metrics.flush()
                written = [name for name in RECORD_FILES if (self.run_dir / name).exists()]
                write_atomically(self.run_dir / SUMS, sums_of_files(self.run_dir, written))
        finally:
            self._mirror.close(state, _exit_code(state, error), exception)

    def _write_manifest(self) -> None:
        write_atomically(self.run_dir / "manifest.json", encode_json(self.manifest, indent=2) + "\n")


def _first_manifest(
    job_name: str,
    group: str | None,
    tags: Sequence[str],
    seeds: Mapping[str, int],
    sweep: Mapping[str, str | int] | None,
) -> dict[str, Any]:
    return {
        "schema_version": SCHEMA_VERSION,
        "exit_state": "running",
        "exception": None,
        "start": _iso_now(),
        "end": None,
        "duration_seconds": None,
        "job_name": job_name,
        "sweep": None if sweep is None else dict(sweep),
        "group": group,
        "tags": tags,
        "seeds": dict(seeds),
        **describe_environment(),
    }


def _state_after(error: BaseException) -> str:
    return "interrupted" if isinstance(error, KeyboardInterrupt) else "failed"


def _exit_code(state: str, error: BaseException | None) -> int:
    if state == "finished":
        return 0
    if isinstance(error, Interrupted):
        return error.exit_code
    return 130 if isinstance(error, KeyboardInterrupt) else 1


def _close_quietly(file: TextIO) -> None:
    # Every line is flushed when it is written, so an error here was reported before.
    with contextlib.suppress(OSError):
        file.close()


def _now() -> float:
    """Seconds since 1970 (UTC), to the millisecond."""
    return round(time.time(), 3)


def _iso_now() -> str:
    return datetime.now(UTC).isoformat(timespec="milliseconds")
