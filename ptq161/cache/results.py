"""Whole results: a finished run's record in the store, and its reuse by a later, identical run."""

from __future__ import annotations

import logging
import shutil
from pathlib import Path
from typing import Any

from ptq161.cache.store import ADVICE, Entry
from ptq161.errors import UserError
from ptq161.files.atomic import writing
from ptq161.files.folders import share_file
from ptq161.files.strict_json import decode_json, encode_json
from ptq161.tracking.read import RunData, read_run
from ptq161.tracking.record import RunRecord

log = logging.getLogger(__name__)

_FILES = ("config.yaml", "metrics.jsonl", "samples.jsonl", "results.json")
CHECKPOINT = "checkpoint"
"""The folder of a run's packed model."""
MERGED = "merged"
"""The folder of its restored model."""
FOLDERS = (CHECKPOINT, MERGED)
_SHARED = ".safetensors"
"""Suffix of the files of these folders that take no room of their own, where the file system can share them."""

_OWN_FACTS = (
    "schema_version",
    "exit_state",
    "exception",
    "start",
    "end",
    "duration_seconds",
    "job_name",
    "sweep",
    "group",
    "tags",
    "seeds",
    "command",
    "working_directory",
    "pid",
)
"""Keys of a manifest that describe one run, and not how its numbers were computed."""


def store_result(entry: Entry, run_dir: Path) -> None:
    """Copy the record and the models of a finished run into the store.

    Raises:
        UserError: the store cannot be written.
    """
    entry.restart()
    entry.open()
    manifest = decode_json((run_dir / "manifest.json").read_text(encoding="utf-8"))
    entry.write("manifest.json", encode_json({**manifest, "run_dir": run_dir}, indent=2) + "\n")
    with writing(entry.folder, ADVICE):
        for name in _FILES:
            if (run_dir / name).exists():
                shutil.copyfile(run_dir / name, entry.folder / name)
        for name in FOLDERS:
            _share_folder(run_dir / name, entry.folder / name)
    entry.finish()


def reuse_result(entry: Entry, record: RunRecord) -> dict[str, Any] | None:
    """Fill a record from a stored result.

    The manifest then has the facts of the original computation (hardware, threads, commit), and in ``reused_from`` the
    run that made it; job, command and times stay those of the new run.

    Args:
        entry: a finished result.
        record: of the new run.

    Returns:
        the results; None where the entry is damaged, which empties it.

    Raises:
        UserError: the run directory cannot be written.
    """
    original = _intact(entry)
    if original is None or original.results is None:
        return None
    with writing(record.run_dir):
        for name in FOLDERS:
            _share_folder(entry.folder / name, record.run_dir / name)
    record.copy_lines(original.metrics, original.samples)
    manifest = original.manifest
    origin = {key: manifest[key] for key in ("start", "end", "duration_seconds", "command")}
    facts = {key: value for key, value in manifest.items() if key not in _OWN_FACTS}
    record.describe(**facts, reused_from={"run_dir": manifest["run_dir"], **origin})
    log.info("an identical run finished in %s: its results are reused", manifest["run_dir"])
    return {key: value for key, value in original.results.items() if key != "schema_version"}


def _intact(entry: Entry) -> RunData | None:
    try:
        run = read_run(entry.folder)
        problem = run.problems[0] if run.problems else None
    except (OSError, UserError) as error:
        problem = str(error)
    if problem is None:
        return run
    entry.restart_damaged(problem)
    return None


def _share_folder(source: Path, target: Path) -> None:
    """Replace ``target`` by a copy of ``source``, if that exists, and say where the two have files in common."""
    shutil.rmtree(target, ignore_errors=True)
    if not source.is_dir():
        return
    target.mkdir()
    for path in source.iterdir():
        if path.suffix != _SHARED:
            shutil.copyfile(path, target / path.name)
        elif share_file(path, target / path.name) == "linked":
            log.info("%s and %s are one file: copy it before you change it in place", path, target / path.name)
