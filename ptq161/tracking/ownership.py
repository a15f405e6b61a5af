"""A live run owns its directory, and a live sweep its own: two never write into one.

The owner holds a lock file, which the operating system releases when the process ends, however it ends.
"""

from __future__ import annotations

import contextlib
from collections.abc import Iterator
from pathlib import Path
from typing import Literal

from filelock import FileLock, Timeout

from ptq161.errors import UserError
from ptq161.files.atomic import writing

Owner = Literal["run", "sweep"]
_LOCKS: dict[Owner, str] = {"run": ".lock", "sweep": ".sweep.lock"}
"""Two names, since a sweep of one job may have its record in its own directory."""

_until_exit: list[FileLock] = []


@contextlib.contextmanager
def owned(folder: Path, owner: Owner = "run") -> Iterator[None]:
    """Own a directory inside the context; a process may own one several times.

    Args:
        folder: is made where it does not exist.
        owner: what writes into it.

    Raises:
        UserError: another process or thread owns it, and nothing in it has been touched; or it cannot be written.
    """
    lock = _acquired(folder, owner)
    try:
        yield
    finally:
        lock.release()


def own_until_exit(folder: Path, owner: Owner = "run") -> None:
    """Own a directory for the rest of the process's life; see :func:`owned`."""
    _until_exit.append(_acquired(folder, owner))


def check_free(folder: Path, owner: Owner = "run") -> None:
    """Check that nobody else owns a directory, which need not exist.

    Raises:
        UserError: somebody does.
    """
    if (folder / _LOCKS[owner]).exists():
        with owned(folder, owner):
            pass


def _acquired(folder: Path, owner: Owner) -> FileLock:
    # A singleton: this process has one lock for a file, and counts how often it is taken.
    lock = FileLock(folder.resolve() / _LOCKS[owner], timeout=0, is_singleton=True)
    with writing(folder):
        folder.mkdir(parents=True, exist_ok=True)
        try:
            lock.acquire()
        except Timeout:
            raise UserError(
                f"{folder} belongs to a {owner} that has not ended: wait for it, or choose another directory."
            ) from None
    return lock
