"""Fingerprints: everything that a result depends on, by content, as JSON; its SHA-256 is the result's name."""

from __future__ import annotations

import dataclasses
import hashlib
import inspect
import json
from collections.abc import Mapping
from importlib import metadata
from pathlib import Path
from typing import Any

import torch

from ptq161.errors import UserError
from ptq161.files.atomic import write_atomically, writing
from ptq161.files.hashing import sha256_of_file, sha256_of_sources
from ptq161.files.strict_json import decode_json

FINGERPRINT = "fingerprint.json"
"""The file that says to what a folder belongs."""

SOURCES = sha256_of_sources()
"""Of the package as this process runs it: taken when it begins, since a source may be edited while it goes on."""

Fingerprint = Mapping[str, Any]
"""JSON values only."""


def key_of(fingerprint: Fingerprint) -> str:
    """Return the SHA-256 of a fingerprint's canonical JSON, 64 hexadecimal digits."""
    text = json.dumps(fingerprint, sort_keys=True, separators=(",", ":"), allow_nan=False)
    return hashlib.sha256(text.encode()).hexdigest()


def claim(folder: Path, fingerprint: Fingerprint, advice: str) -> None:
    """Make a folder that belongs to a fingerprint, or check that it does.

    Args:
        folder: may exist, empty or with the files of this fingerprint.
        fingerprint: everything that the folder's content depends on.
        advice: what the user can do where the folder cannot be written.

    Raises:
        UserError: the folder belongs to another fingerprint (the sentence says what differs), holds files but no
            fingerprint, or cannot be written.
    """
    file = folder / FINGERPRINT
    with writing(folder, advice):
        folder.mkdir(parents=True, exist_ok=True)
        if not file.exists():
            # A process that was killed while it wrote the fingerprint leaves no more than a temporary file.
            if foreign := sorted(path.name for path in folder.iterdir() if not path.name.startswith(".")):
                raise UserError(f"{folder} holds {foreign[0]} but no {FINGERPRINT}: use an empty folder.")
            write_atomically(file, json.dumps(fingerprint, indent=1, sort_keys=True) + "\n", advice)
            return
        text = file.read_text(encoding="utf-8")
    try:
        found = decode_json(text)
    except ValueError as error:
        raise UserError(f"{file} is damaged ({error}): delete {folder}.") from error
    if different := differences(fingerprint, found):
        raise UserError(
            f"{folder} belongs to another computation ({'; '.join(different)}): use another folder, or delete it."
        )


def differences(asked: Fingerprint, found: Fingerprint) -> list[str]:
    """Say what differs between two fingerprints, as in ``method.epochs is 20 here and 4 there``."""
    here, there = _flat(json.loads(json.dumps(asked))), _flat(json.loads(json.dumps(found)))
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


# --- parts ------------------------------------------------------------------------------------------------------------


def describe(settings: Any) -> dict[str, Any]:
    """Return class and fields of a dataclass of settings, such as a method's hyperparameters.

    A class from outside of this package brings the SHA-256 of its source file, which ``SOURCES`` does not cover.
    """
    cls = type(settings)
    fields = {field.name: getattr(settings, field.name) for field in dataclasses.fields(settings)}
    name = {"class": f"{cls.__module__}.{cls.__qualname__}"}
    if cls.__module__.partition(".")[0] != __name__.partition(".")[0]:
        name["source"] = sha256_of_file(inspect.getfile(cls))
    return {**name, **fields}


def versions(*packages: str) -> dict[str, str]:
    """Return the versions of installed packages."""
    return {package: metadata.version(package) for package in packages}


def device_name(device: torch.device) -> str:
    """Name the processor whose arithmetic a result comes from, by its instruction set or as a GPU."""
    if device.type == "cuda":
        return f"cuda: {torch.cuda.get_device_name(device)}"
    return f"{device.type}: {torch.backends.cpu.get_cpu_capability()}"
