"""Folders that are whole or not there: what a save, an export and a record are written into."""

from __future__ import annotations

import contextlib
import fcntl
import os
import shutil
import tempfile
from collections.abc import Callable, Iterator
from pathlib import Path

from ptq161.errors import UserError
from ptq161.files.atomic import umask, writing

_FICLONE = 0x40049409
"""Linux's request for a copy that shares its blocks until one of both is written (Btrfs, XFS, bcachefs)."""


@contextlib.contextmanager
def whole_folder(target: Path, advice: str, may_replace: Callable[[Path], bool] | None = None) -> Iterator[Path]:
    """Write a folder so that it is there with all of its files, or is left as it was.

    Args:
        target: the folder. It has to be absent or empty, unless ``may_replace``: files of two kinds are never mixed.
        advice: what the user can do where it cannot be written.
        may_replace: whether a folder that holds files may be replaced as a whole; None replaces none.

    Yields:
        an empty folder to write into. It becomes ``target`` where the context ends well, and is deleted otherwise.

    Raises:
        UserError: ``target`` is a file, holds files, or cannot be written.
    """
    target = target.expanduser().resolve()
    nearest = next(path for path in (target, *target.parents) if path.exists())
    if not nearest.is_dir():
        raise UserError(f"{nearest} is a file: name a folder.")
    held = _held(target)
    if held and may_replace is None:
        raise UserError(f"{target} holds {held}: choose a new or empty folder, or overwrite=True for one of ptq161.")
    if held and may_replace is not None and not may_replace(target):
        raise UserError(f"{target} holds {held}, which ptq161 did not write: choose a new or empty folder.")
    # An empty folder may be a mounted one, or one whose parent belongs to somebody else: it is filled, not replaced.
    fill = target.is_dir() and not held
    home = target if fill else target.parent
    with writing(target, advice):
        home.mkdir(parents=True, exist_ok=True)
        scratch = Path(tempfile.mkdtemp(prefix=f".{target.name}.", suffix=".tmp", dir=home))
    try:
        yield scratch
        _heed_umask(scratch)
        with writing(target, advice):
            if fill:
                _move_into(scratch, target)
            elif held:
                _swap(scratch, target)
            else:
                scratch.rename(target)
    finally:
        shutil.rmtree(scratch, ignore_errors=True)


def _held(folder: Path) -> str:
    """Name what a folder holds, or return nothing for one that is empty or absent."""
    names = sorted(path.name for path in folder.iterdir()) if folder.is_dir() else []
    return "" if not names else names[0] if len(names) == 1 else f"{names[0]} and {len(names) - 1} more"


def _heed_umask(folder: Path) -> None:
    """Give every file the mode that a plain ``open`` would: some writers leave files that only their owner can read."""
    for path in (folder, *folder.rglob("*")):
        path.chmod((0o777 if path.is_dir() else 0o666) & ~umask())


def _move_into(scratch: Path, target: Path) -> None:
    """Move all files up, what makes a model's folder readable (``config.json``) last."""
    for path in sorted(scratch.iterdir(), key=lambda path: path.name == "config.json"):
        path.rename(target / path.name)


def _swap(scratch: Path, target: Path) -> None:
    old = Path(tempfile.mkdtemp(prefix=f".{target.name}.", suffix=".old", dir=target.parent))
    target.rename(old / target.name)
    try:
        scratch.rename(target)
    except OSError:
        (old / target.name).rename(target)
        raise
    finally:
        shutil.rmtree(old, ignore_errors=True)


def share_file(source: Path, target: Path) -> str:
    """Give a file a second place that takes no room of its own, if the file system can.

    Args:
        source: the file.
        target: must not exist.

    Returns:
        how: ``cloned`` (the two are independent), ``linked`` (they are one file under two names: a change in place of
        one changes the other) or ``copied``.

    Raises:
        OSError: it cannot be read or written.
    """
    with source.open("rb") as original, target.open("xb") as copy:
        try:
            fcntl.ioctl(copy.fileno(), _FICLONE, original.fileno())
            return "cloned"
        except OSError:
            pass
    target.unlink()
    try:
        os.link(source, target)
        return "linked"
    except OSError:
        shutil.copyfile(source, target)
        return "copied"
