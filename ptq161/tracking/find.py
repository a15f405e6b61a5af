"""Finding the records in a folder: of one run, of a sweep, or of any number of them.

Every command that looks at records finds them here.
"""

from __future__ import annotations

import dataclasses
import os
import re
from pathlib import Path

from ptq161.files.fingerprints import FINGERPRINT

MANIFEST = "manifest.json"
"""The file that makes a directory a run directory."""
SWEEP = "multirun.yaml"
"""The file that Hydra writes into the directory of a sweep."""
RUN_FOLDERS = ("checkpoint", "merged", "replay", "wandb", ".hydra")
"""Folders of a run directory in which no other run is looked for: the mirror copies the manifest to
``<run>/wandb/.../files/``, and a replay's record belongs to the run that it repeats."""


@dataclasses.dataclass(frozen=True)
class Found:
    """What a folder holds, each in natural order of the paths.

    Attributes:
        runs: directories with a record.
        begun: directories that Hydra made for a job which has no record, or none yet.
        sweeps: directories of sweeps.
        problems: one sentence for each folder that cannot be read.
    """

    runs: list[Path] = dataclasses.field(default_factory=list)
    begun: list[Path] = dataclasses.field(default_factory=list)
    sweeps: list[Path] = dataclasses.field(default_factory=list)
    problems: list[str] = dataclasses.field(default_factory=list)


def find(folder: Path) -> Found:
    """Find the runs and sweeps in a folder, at any depth.

    Args:
        folder: may itself be a run directory, or below one. Links to folders are not followed, so that a run is found
            once.
    """
    found = Found()

    def report(error: OSError) -> None:
        found.problems.append(f"{error.filename or folder} cannot be read ({error.strerror}).")

    for name, folders, files in os.walk(folder, onerror=report):
        path = Path(name)
        if SWEEP in files:
            found.sweeps.append(path)
        if MANIFEST in files and FINGERPRINT in files:  # the store's own copy of a record
            folders.clear()
        elif MANIFEST in files or ".hydra" in folders:
            (found.runs if MANIFEST in files else found.begun).append(path)
            folders[:] = [inner for inner in folders if inner not in RUN_FOLDERS]
        folders.sort(key=natural_order)  # in which os.walk visits them
    return found


def find_runs(folder: Path) -> list[Path]:
    """Return the run directories in a folder; see :func:`find`."""
    return find(folder).runs


def is_run(folder: Path) -> bool:
    """Return whether a folder is a run directory."""
    return (folder / MANIFEST).is_file()


def hidden_in(run_dir: Path) -> Path | None:
    """Return the record in one of whose own folders a directory lies, where no run is found; None where it does not."""
    for inner in (run_dir, *run_dir.parents):
        if inner.name in RUN_FOLDERS and is_run(inner.parent):
            return inner.parent
    return None


def natural_order(name: str) -> list[str | int]:
    """Return a sort key by which 2 comes before 10: every other part of a split by digits is a number."""
    return [int(part) if i % 2 else part for i, part in enumerate(re.split(r"([0-9]+)", name))]
