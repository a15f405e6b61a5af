"""SHA-256 of tensors, files and the package's own sources."""

from __future__ import annotations

import hashlib
from collections.abc import Mapping
from pathlib import Path
from typing import TYPE_CHECKING

if TYPE_CHECKING:  # a report hashes files alone: torch takes a second to import
    from torch import Tensor

PACKAGE = Path(__file__).resolve().parents[1]
_SOURCES = (".py", ".cpp", ".h", ".yaml", ".json")
_NOT_HASHED = ("__main__.py", "conf", "estimate", "generate.py", "replay", "report", "search", "sweep", "watch")
"""Rooms that start runs, foretell and show them: no module that computes a number imports them (a test reads the graph
of imports).

An installed package has ``conf/`` inside; the values of a configuration are part of each run's identity."""


def sha256_of_tensors(tensors: Mapping[str, Tensor]) -> str:
    """Hash names, dtypes, shapes and bytes, in the order of the names.

    One tensor at a time is brought to the host, so a model costs no second copy of itself.

    Args:
        tensors: any shapes and dtypes, on any device, contiguous or not.

    Returns:
        64 hexadecimal digits.
    """
    import torch

    digest = hashlib.sha256()
    for name in sorted(tensors):
        tensor = tensors[name].detach()
        digest.update(f"{name}\0{tensor.dtype}\0{tuple(tensor.shape)}\0".encode())
        # numpy has no bfloat16, hence the bytes; view() needs a last dimension, hence the reshape.
        digest.update(tensor.cpu().contiguous().reshape(-1).view(torch.uint8).numpy().data)
    return digest.hexdigest()


def sha256_of_file(path: Path | str) -> str:
    """Hash a file's bytes without reading it into memory.

    Raises:
        OSError: it cannot be read.
    """
    with open(path, "rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()


def sha256_of_sources(package: Path = PACKAGE) -> str:
    """Hash the sources and data files below a package's folder (``_SOURCES``): their relative paths and bytes.

    ``_NOT_HASHED`` is left out: a change of a report's colors changes no result.
    """
    digest = hashlib.sha256()
    for path in sorted(path for path in package.rglob("*") if path.suffix in _SOURCES):
        name = path.relative_to(package)
        if name.parts[0] in _NOT_HASHED:
            continue
        content = path.read_bytes()
        digest.update(f"{name.as_posix()}\0{len(content)}\0".encode())
        digest.update(content)
    return digest.hexdigest()
