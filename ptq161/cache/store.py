"""The store of computed results, each found by the fingerprint of what it was computed from.

An entry is a folder that is named by the SHA-256 of its fingerprint, the JSON of everything it depends on::

    <store>/<kind>/<key>/               finished; fingerprint.json and SHA256SUMS are inside
    <store>/<kind>/<key>.unfinished/    in progress, or left by a killed process and continued by the next one
    <store>/<kind>/<key>.lock           held by the process that computes or reads the entry; never deleted

The store is ``$PTQ161_STORE``, else ``store/`` beside the assets (:mod:`ptq161.data.assets`). Any number of processes
can use it: a process that needs an entry which another one is computing waits until that is finished.
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

from ptq161.files.atomic import write_atomically, writing
from ptq161.files.checksums import SUMS, files_of, sums_of, what_is_wrong
from ptq161.files.fingerprints import FINGERPRINT, Fingerprint, claim, key_of
from ptq161.files.paths import cache_dir
from ptq161.files.strict_json import decode_json, encode_json

log = logging.getLogger(__name__)

STORE_VARIABLE = "PTQ161_STORE"
"""The environment variable that names the store's folder."""
ADVICE = f"set the environment variable {STORE_VARIABLE} to a writable folder, or cache=false"
_VALUE = "value.json"
_UNFINISHED = ".unfinished"


def store_dir() -> Path:
    """Return the folder of the store: ``$PTQ161_STORE``, else ``store`` in the cache of assets."""
    return Path(os.environ.get(STORE_VARIABLE) or cache_dir() / "store").expanduser().absolute()


@dataclasses.dataclass(frozen=True)
class Store:
    """A folder of entries.

    Attributes:
        root: made with the first entry.
        force: delete an entry that is found, and compute it again.
    """

    root: Path
    force: bool = False

    @contextlib.contextmanager
    def entry(self, kind: str, fingerprint: Fingerprint) -> Iterator[Entry]:
        """Open an entry, locked against other processes until the context ends.

        An entry that is left unfinished keeps its files for the next process that opens it.

        Args:
            kind: a folder of the store, such as ``scores``.
            fingerprint: everything that the content depends on.

        Raises:
            UserError: the store cannot be written, or the entry's fingerprint does not match its name.
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
        """Return the stored value of a fingerprint, else compute and store it.

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
                    return decode_json((entry.folder / _VALUE).read_text(encoding="utf-8"))
                except (OSError, ValueError) as error:
                    entry.restart_damaged(error)
            text = encode_json(compute(), indent=2)
            entry.write(_VALUE, text)
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
        self._unfinished_folder = folder.with_name(folder.name + _UNFINISHED)
        self._fingerprint = fingerprint

    @property
    def finished(self) -> bool:
        """Whether the entry is complete."""
        return self._finished_folder.is_dir()

    @property
    def folder(self) -> Path:
        """The folder of the entry's files; :meth:`finish` renames it."""
        return self._finished_folder if self.finished else self._unfinished_folder

    def open(self) -> None:
        """Make the folder, or check the fingerprint of the one that exists, and the files of a finished one."""
        with writing(self.folder, ADVICE):
            if not self.finished:
                _clear_remains(self.folder)
            claim(self.folder, self._fingerprint, ADVICE)
            os.utime(self.folder)  # the time of the last use, for pruning
        if self.finished and (wrong := what_is_wrong(self.folder, files_of(self.folder) - {SUMS})):
            self.restart_damaged(wrong)

    def write(self, name: str, content: str | bytes) -> None:
        """Write a file of the entry atomically."""
        write_atomically(self.folder / name, content, ADVICE)

    def finish(self) -> None:
        """Mark the entry as finished, by one rename: a killed process leaves it finished or unfinished.

        The checksums are written before: a number that changes on the disk must not become a result.
        """
        with writing(self._finished_folder, ADVICE):
            self.write(SUMS, sums_of(self._unfinished_folder))
            os.rename(self._unfinished_folder, self._finished_folder)

    def restart(self) -> None:
        """Delete the entry's files."""
        with writing(self.folder, ADVICE):
            if self.finished:
                # Renamed first: a process that is killed here must not leave a finished entry without all its files.
                shutil.rmtree(self._unfinished_folder, ignore_errors=True)
                os.rename(self._finished_folder, self._unfinished_folder)
            if self._unfinished_folder.exists():
                shutil.rmtree(self._unfinished_folder)

    def restart_damaged(self, reason: object) -> None:
        """Delete the entry's files, log why, and open it again."""
        log.warning("%s is damaged (%s); it is computed again", self.folder, reason)
        self.restart()
        self.open()

    def close(self) -> None:
        """Delete an unfinished entry that nothing was written to."""
        with contextlib.suppress(OSError):
            if [path.name for path in self._unfinished_folder.iterdir()] == [FINGERPRINT]:
                shutil.rmtree(self._unfinished_folder)


# --- listing and pruning ----------------------------------------------------------------------------------------------


@dataclasses.dataclass(frozen=True)
class StoredEntry:
    """An entry as it lies on disk.

    Attributes:
        kind: the folder of the store that it is in.
        folder: its own folder.
        finished: whether it is complete.
        nbytes: bytes of its files.
        used: when it was last used, in seconds since 1970.
    """

    kind: str
    folder: Path
    finished: bool
    nbytes: int
    used: float


def stored_entries(root: Path) -> list[StoredEntry]:
    """List the entries of a store by kind; an entry that another process deletes meanwhile is left out.

    Raises:
        UserError: the store cannot be read.
    """
    with writing(root, ADVICE):
        folders = sorted(path for path in root.glob("*/*") if path.is_dir() and not path.name.startswith("."))
    found = []
    for folder in folders:
        with contextlib.suppress(FileNotFoundError):
            nbytes = sum(path.stat().st_size for path in _files(folder))
            finished = not folder.name.endswith(_UNFINISHED)
            found.append(StoredEntry(folder.parent.name, folder, finished, nbytes, folder.stat().st_mtime))
    return found


def delete_entry(entry: StoredEntry) -> int | None:
    """Delete an entry, unless a process holds it.

    Returns:
        the bytes that this frees (none for a file that a run directory shares), or None where the entry is in use.

    Raises:
        UserError: it cannot be deleted.
    """
    folder = entry.folder.with_name(entry.folder.name.removesuffix(_UNFINISHED))
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
    """Hold an entry's lock, which the operating system releases if the process is killed."""
    lock = FileLock(f"{folder}.lock")
    with writing(folder, ADVICE):
        try:
            lock.acquire(timeout=0)
        except Timeout:
            log.info("waiting for another process that computes the same %s", folder.parent.name)
            began = time.monotonic()
            lock.acquire(poll_interval=0.2)
            log.info("waited %.0f s", time.monotonic() - began)
    try:
        yield
    finally:
        lock.release()


def _clear_remains(unfinished: Path) -> None:
    """Delete what a killed process left: temporary files, or a folder that it was deleting (without a fingerprint)."""
    if unfinished.exists() and not (unfinished / FINGERPRINT).exists():
        shutil.rmtree(unfinished)
    for path in unfinished.rglob(".*.tmp"):
        path.unlink()
