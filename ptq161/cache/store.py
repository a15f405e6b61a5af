"""What took long to compute, found again by what it was computed from.

An entry is a folder that is named by the SHA-256 of its fingerprint, the JSON of everything it depends on::

    <store>/<kind>/<key>/               finished; fingerprint.json is inside
    <store>/<kind>/<key>.unfinished/    being made, or left by a process that was killed and taken up by the next one
    <store>/<kind>/<key>.lock           held by the process that makes or reads the entry; never deleted

The store is ``$PTQ161_STORE``, else ``store/`` beside the assets (:mod:`ptq161.data.assets`). Any number of processes
can use it: one that needs what another is making waits, and then finds it finished.
"""

from __future__ import annotations

import contextlib
import dataclasses
import logging
import os
import shutil
import time
from collections.abc import Callable, Iterator, Mapping
from pathlib import Path
from typing import Any

from filelock import FileLock, Timeout

from ptq161.data.assets import cache_dir
from ptq161.files.atomic import write_atomically, writing
from ptq161.files.fingerprints import FINGERPRINT, Fingerprint, claim, key_of
from ptq161.files.strict_json import decode_json, encode_json

log = logging.getLogger(__name__)

ADVICE = "set the environment variable PTQ161_STORE to a writable folder, or cache=false"
VALUE = "value.json"
UNFINISHED = ".unfinished"


def store_dir() -> Path:
    """Return the folder of the store: ``$PTQ161_STORE``, else ``store`` in the cache of assets."""
    return Path(os.environ.get("PTQ161_STORE") or cache_dir() / "store").expanduser().absolute()


@dataclasses.dataclass(frozen=True)
class Store:
    """A folder of entries.

    Attributes:
        root: made with the first entry.
        force: throw away what is found, and make it anew.
    """

    root: Path
    force: bool = False

    @contextlib.contextmanager
    def entry(self, kind: str, fingerprint: Fingerprint) -> Iterator[Entry]:
        """Open an entry, alone among all processes until the context ends.

        An entry that is left unfinished keeps its files for the next process that asks for it.

        Args:
            kind: a folder of the store, such as ``scores``.
            fingerprint: everything that the content depends on.

        Raises:
            UserError: the store cannot be written, or the entry holds another fingerprint than its name says.
        """
        folder = self.root / kind / key_of(fingerprint)
        with writing(folder, ADVICE):
            folder.parent.mkdir(parents=True, exist_ok=True)
        with _locked(folder):
            entry = Entry(folder, fingerprint)
            if self.force:
                entry.restart()
            entry.open()
            try:
                yield entry
            finally:
                entry.close()

    def remember(self, kind: str, fingerprint: Fingerprint, compute: Callable[[], Mapping[str, Any]]) -> dict[str, Any]:
        """Return what ``compute`` returns, or what it returned before for the same fingerprint.

        Args:
            kind: a folder of the store.
            fingerprint: everything that the value depends on.
            compute: returns JSON values; infinities and NaN are kept.

        Raises:
            UserError: the store cannot be used.
        """
        with self.entry(kind, fingerprint) as entry:
            if entry.finished:
                try:
                    return decode_json((entry.folder / VALUE).read_text(encoding="utf-8"))
                except (OSError, ValueError) as error:
                    entry.restart_damaged(error)
            text = encode_json(compute(), indent=2)
            entry.write(VALUE, text)
            entry.finish()
        return decode_json(text)


class Entry:
    """An entry that this process holds; made by :meth:`Store.entry`.

    Args:
        folder: of the finished entry; an unfinished one has the suffix ``.unfinished``.
        fingerprint: everything that the content depends on.
    """

    def __init__(self, folder: Path, fingerprint: Fingerprint) -> None:
        self._finished_folder = folder
        self._unfinished_folder = folder.with_name(folder.name + UNFINISHED)
        self._fingerprint = fingerprint

    @property
    def finished(self) -> bool:
        """Whether everything is there."""
        return self._finished_folder.is_dir()

    @property
    def folder(self) -> Path:
        """Where the entry's files are; :meth:`finish` renames it."""
        return self._finished_folder if self.finished else self._unfinished_folder

    def open(self) -> None:
        """Make the folder, or check the one that is there."""
        with writing(self.folder, ADVICE):
            if not self.finished:
                _clear_remains(self.folder)
            claim(self.folder, self._fingerprint, ADVICE)
            os.utime(self.folder)  # the time of the last use, for pruning

    def write(self, name: str, content: str | bytes) -> None:
        """Write a file of the entry, whole or not at all."""
        write_atomically(self.folder / name, content, ADVICE)

    def finish(self) -> None:
        """Say that everything is there: one rename, so a killed process finishes an entry or does not."""
        with writing(self._finished_folder, ADVICE):
            os.rename(self._unfinished_folder, self._finished_folder)

    def restart(self) -> None:
        """Throw everything away and begin again."""
        with writing(self.folder, ADVICE):
            if self.finished:
                # Killed while it is deleted, a finished entry must not be left with a part of its files.
                shutil.rmtree(self._unfinished_folder, ignore_errors=True)
                os.rename(self._finished_folder, self._unfinished_folder)
            if self._unfinished_folder.exists():
                shutil.rmtree(self._unfinished_folder)

    def restart_damaged(self, reason: object) -> None:
        """Begin again, and say why."""
        log.warning("%s is damaged (%s); it is computed again", self.folder, reason)
        self.restart()
        self.open()

    def close(self) -> None:
        """Leave nothing behind of an entry that nothing was written to."""
        with contextlib.suppress(OSError):
            if [path.name for path in self._unfinished_folder.iterdir()] == [FINGERPRINT]:
                shutil.rmtree(self._unfinished_folder)


# --- what is there ----------------------------------------------------------------------------------------------------


@dataclasses.dataclass(frozen=True)
class StoredEntry:
    """An entry as it lies on disk.

    Attributes:
        kind: the folder of the store that it is in.
        folder: its own folder.
        finished: whether everything is there.
        nbytes: bytes of its files.
        used: when it was last used, in seconds since 1970.
    """

    kind: str
    folder: Path
    finished: bool
    nbytes: int
    used: float


def stored_entries(root: Path) -> list[StoredEntry]:
    """List the entries of a store, the kinds in alphabetical order; what another process deletes meanwhile is left out.

    Raises:
        UserError: the store cannot be read.
    """
    with writing(root, ADVICE):
        folders = sorted(path for path in root.glob("*/*") if path.is_dir() and not path.name.startswith("."))
    found = []
    for folder in folders:
        with contextlib.suppress(FileNotFoundError):
            nbytes = sum(path.stat().st_size for path in _files(folder))
            finished = not folder.name.endswith(UNFINISHED)
            found.append(StoredEntry(folder.parent.name, folder, finished, nbytes, folder.stat().st_mtime))
    return found


def delete_entry(entry: StoredEntry) -> int | None:
    """Delete an entry, unless a process holds it.

    Returns:
        the bytes that this frees (a file that a run directory shares goes on taking its place), or None where the entry
        is in use.

    Raises:
        UserError: it cannot be deleted.
    """
    folder = entry.folder.with_name(entry.folder.name.removesuffix(UNFINISHED))
    with writing(entry.folder, ADVICE):
        try:
            with FileLock(f"{folder}.lock", timeout=0):
                freed = sum(path.stat().st_size for path in _files(entry.folder) if path.stat().st_nlink == 1)
                Entry(folder, {}).restart()
        except Timeout:
            return None
    return freed


def _files(folder: Path) -> list[Path]:
    return [path for path in folder.rglob("*") if path.is_file()]


# --- locks ------------------------------------------------------------------------------------------------------------


@contextlib.contextmanager
def _locked(folder: Path) -> Iterator[None]:
    """Hold an entry's lock. It ends with the process, however that ends."""
    lock = FileLock(f"{folder}.lock")
    with writing(folder, ADVICE):
        try:
            lock.acquire(timeout=0)
        except Timeout:
            log.info("waiting for another process that makes the same %s", folder.parent.name)
            began = time.monotonic()
            lock.acquire(poll_interval=0.2)
            log.info("waited %.0f s", time.monotonic() - began)
    try:
        yield
    finally:
        lock.release()


def _clear_remains(unfinished: Path) -> None:
    """Delete what a killed process leaves: half-written files, or a folder that it was deleting itself."""
    if unfinished.exists() and not (unfinished / FINGERPRINT).exists():
        shutil.rmtree(unfinished)
    for path in unfinished.rglob(".*.tmp"):
        path.unlink()
