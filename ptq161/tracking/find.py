"""Finding the records in a folder: of one run, of a sweep, or of any number of them."""

from __future__ import annotations

import os
from collections.abc import Iterator
from pathlib import Path

MANIFEST = "manifest.json"
"""The file that makes a directory a run directory."""


def find_runs(folder: Path) -> Iterator[Path]:
    """Yield the run directories in a folder, at any depth, in the order of their paths.

    Nothing below a run directory is another run of the folder: the W&B mirror copies the manifest to
    ``<run>/wandb/.../files/``, and a replay's record belongs to the run that it repeats.

    Args:
        folder: may itself be a run directory.
    """
    for path, folders, files in os.walk(folder):
        if MANIFEST in files:
            folders.clear()  # which os.walk would visit next
            yield Path(path)
        folders.sort()
