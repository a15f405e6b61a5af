"""Fingerprints: everything that a result depends on, by content, as JSON; the SHA-256 of that is the result's key."""

from __future__ import annotations

import dataclasses
import hashlib
import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from ptq161.errors import UserError
from ptq161.files.atomic import write_atomically, writing
from ptq161.files.reading import reading
from ptq161.files.strict_json import decode_json

FINGERPRINT = "fingerprint.json"
"""The file that holds the fingerprint of a folder."""

Fingerprint = Mapping[str, Any]
"""JSON values only."""


def key_of(fingerprint: Fingerprint) -> str:
    """Return the SHA-256 of a fingerprint's canonical JSON, 64 hexadecimal digits."""
    text = json.dumps(fingerprint, sort_keys=True, separators=(",", ":"), allow_nan=False)
    return hashlib.sha256(text.encode()).hexdigest()


@dataclasses.dataclass(frozen=True)
class KeyedFolder:
    """A folder in which one computation keeps its state.

    Attributes:
        path: of the folder, which :func:`claim` makes, or whoever writes the first file.
        key: of the computation (:func:`key_of`).
    """

    path: Path
    key: str

    def part(self, name: str) -> KeyedFolder:
        """Return the subfolder of a part of the same computation."""
        return KeyedFolder(self.path / name, f"{self.key}/{name}")


def claim(folder: Path, fingerprint: Fingerprint, advice: str) -> KeyedFolder:
    """Make a folder for a fingerprint, or check that it has this one.

    Args:
        folder: may exist, empty or with the files of this fingerprint.
        fingerprint: everything that the folder's content depends on.
        advice: ends the error where the folder cannot be written.

    Raises:
        UserError: the folder has another fingerprint (the error lists the differences), holds files but no
            fingerprint, or cannot be written.
    """
    file, claimed = folder / FINGERPRINT, KeyedFolder(folder, key_of(fingerprint))
    with writing(folder, advice):
        folder.mkdir(parents=True, exist_ok=True)
        if not file.exists():
            # A process that was killed while it wrote the fingerprint leaves no more than a temporary file.
            if foreign := sorted(path.name for path in folder.iterdir() if not path.name.startswith(".")):
                raise UserError(f"{folder} holds {foreign[0]} but no {FINGERPRINT}: use an empty folder.")
            write_atomically(file, json.dumps(fingerprint, indent=1, sort_keys=True) + "\n", advice)
            return claimed
    with reading(file, f"delete {folder}"):
        found = decode_json(file.read_text(encoding="utf-8"))
    if different := _differences(fingerprint, found):
        shown = " ".join("; ".join(different).split())  # what was found may hold anything
        raise UserError(f"{folder} belongs to another computation ({shown}): use another folder, or delete it.")
    return claimed


def _differences(expected: Fingerprint, found: Fingerprint) -> list[str]:
    """List the differences of two fingerprints, as in ``method.epochs is 20 here and 4 there``."""
    # Through JSON, since a fingerprint that was read back has lists in the place of tuples.
    here, there = _flat(json.loads(json.dumps(expected))), _flat(json.loads(json.dumps(found)))
    return [
        f"{name} is {_short(here.get(name))} here and {_short(there.get(name))} there"
        for name in sorted({*here, *there})
        if here.get(name) != there.get(name)
    ]


def _flat(value: Any, name: str = "") -> dict[str, Any]:
    if not isinstance(value, dict) or not value:
        return {name: value}
    parts = (_flat(item, f"{name}.{key}" if name else key) for key, item in value.items())
    return {key: item for part in parts for key, item in part.items()}


def _short(value: Any) -> str:
    text = str(value)
    return f"{text[:8]}..." if len(text) == 64 else text
