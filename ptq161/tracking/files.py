"""Files of a record: whole or not at all, and valid JSON whatever the numbers are."""

from __future__ import annotations

import contextlib
import errno
import json
import math
import os
import tempfile
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

from ptq161.errors import UserError

SCHEMA_VERSION = 1
"""Of the record's layout; every JSON file of a record carries it."""


RUN_DIR_ADVICE = "choose a writable run directory with hydra.run.dir=DIR"


def write_atomically(path: Path, content: str | bytes, advice: str = RUN_DIR_ADVICE) -> None:
    """Write a file so that a reader, or a crash at any moment, finds the old content or the new one.

    Args:
        path: of the file; its folder exists.
        content: text becomes UTF-8.
        advice: see :func:`writing`.

    Raises:
        UserError: the folder cannot be written, or the disk is full.
    """
    data = content.encode() if isinstance(content, str) else content
    with writing(path, advice):
        handle, name = tempfile.mkstemp(prefix=f".{path.name}.", suffix=".tmp", dir=path.parent)
        try:
            with os.fdopen(handle, "wb") as file:
                # mkstemp makes files that only their owner can read; a record is as readable as any other file.
                os.fchmod(file.fileno(), 0o666 & ~_umask())
                file.write(data)
                file.flush()
                os.fsync(file.fileno())
            os.replace(name, path)
        except BaseException:
            with contextlib.suppress(OSError):
                os.unlink(name)
            raise
        _sync_folder(path.parent)


@contextlib.contextmanager
def writing(path: Path, advice: str = RUN_DIR_ADVICE) -> Iterator[None]:
    """Turn an operating system's refusal to write ``path`` into one sentence.

    Args:
        path: what is written inside.
        advice: what the user can do where the disk is not full.

    Raises:
        UserError: an ``OSError`` arises inside.
    """
    try:
        yield
    except OSError as error:
        if error.errno in (errno.ENOSPC, errno.EDQUOT):
            raise UserError(f"{path} cannot be written because the disk is full; free space and run again.") from error
        reason = error.strerror or str(error)
        raise UserError(f"{path} cannot be written ({reason}); {advice}.") from error


def encode_json(value: Mapping[str, Any], indent: int | None = None) -> str:
    """Return strict JSON of an object.

    JSON knows no NaN and no infinity: such a value becomes null, and a key ``nonfinite`` of the object mirrors its
    place: ``{"value": NaN}`` is ``{"value": null, "nonfinite": {"value": "nan"}}``.
    Numbers of numpy and torch become plain ones, paths become strings.

    Raises:
        TypeError: a value is nothing that JSON can say.
    """
    clean, nonfinite = _split(value)
    if nonfinite:
        clean["nonfinite"] = nonfinite
    return json.dumps(clean, indent=indent, allow_nan=False, ensure_ascii=False)


def decode_json(text: str) -> dict[str, Any]:
    """Undo :func:`encode_json`.

    Raises:
        ValueError: the text is not one JSON object.
    """
    value = json.loads(text)
    if not isinstance(value, dict):
        raise ValueError("not a JSON object")
    if "nonfinite" not in value:
        return value
    nonfinite = value.pop("nonfinite")
    restored = _merge(value, nonfinite)
    assert isinstance(restored, dict)
    return restored


def _split(value: Any) -> tuple[Any, Any]:
    """Return ``value`` without its non-finite numbers, and these numbers as text in a mapping of the same shape."""
    if value is None or isinstance(value, bool | int | str):
        return value, None
    if isinstance(value, float):
        return (value, None) if math.isfinite(value) else (None, str(float(value)))
    if isinstance(value, os.PathLike):
        return os.fspath(value), None
    if isinstance(value, Mapping):
        parts = {str(key): _split(item) for key, item in value.items()}
        return {k: clean for k, (clean, _) in parts.items()}, {k: text for k, (_, text) in parts.items() if text}
    if isinstance(value, list | tuple):
        items = [_split(item) for item in value]
        return [clean for clean, _ in items], {str(i): text for i, (_, text) in enumerate(items) if text}
    if callable(getattr(value, "item", None)):
        return _split(value.item())
    raise TypeError(f"{type(value).__name__} has no place in a JSON file")


def _merge(value: Any, nonfinite: Any) -> Any:
    if isinstance(nonfinite, str):
        return float(nonfinite)
    if isinstance(value, dict):
        return {k: _merge(item, nonfinite[k]) if k in nonfinite else item for k, item in value.items()}
    if isinstance(value, list):
        return [_merge(item, nonfinite[str(i)]) if str(i) in nonfinite else item for i, item in enumerate(value)]
    return value


def _umask() -> int:
    mask = os.umask(0)
    os.umask(mask)
    return mask


def _sync_folder(folder: Path) -> None:
    """Make the new name durable, where the file system allows a folder to be synced."""
    with contextlib.suppress(OSError):
        handle = os.open(folder, os.O_RDONLY)
        try:
            os.fsync(handle)
        finally:
            os.close(handle)
