"""SHA256SUMS: a folder's checksums in a file beside its content, which ``sha256sum -c SHA256SUMS`` reads too."""

from __future__ import annotations

import re
from collections.abc import Collection
from pathlib import Path, PurePosixPath

from ptq161.errors import UserError
from ptq161.files.hashing import sha256_of_file
from ptq161.files.reading import one_line

SUMS = "SHA256SUMS"
"""The file of checksums. It names neither itself nor what a person may edit, such as a model card."""

_LINE = re.compile(r"([0-9a-f]{64})  (\S.*)")


def sums_of(folder: Path, leave_out: Collection[str] = ()) -> str:
    """Return the content of ``SHA256SUMS`` for a folder's files, those of its subfolders included.

    Args:
        folder: holds files, all of them written.
        leave_out: names of files at its top that are not listed.

    Raises:
        OSError: a file cannot be read.
    """
    return sums_of_files(folder, files_of(folder) - {SUMS, *leave_out})


def sums_of_files(folder: Path, names: Collection[str]) -> str:
    """Return the content of ``SHA256SUMS`` for some of a folder's files.

    Args:
        folder: holds the files.
        names: relative to it.

    Raises:
        OSError: a file cannot be read.
    """
    return "".join(f"{sha256_of_file(folder / name)}  {name}\n" for name in sorted(names))


def files_of(folder: Path) -> set[str]:
    """Return the names of all files in a folder, relative to it."""
    return {path.relative_to(folder).as_posix() for path in folder.rglob("*") if path.is_file()}


def check_sums(folder: Path, required: Collection[str] = ()) -> None:
    """Check a folder's files against its checksums; a folder without ``SHA256SUMS`` is taken as it is.

    Files that are not listed may be added to a folder, such as a tokenizer.

    Args:
        folder: holds the files.
        required: names that must be listed.

    Raises:
        UserError: a listed file is missing or has other bytes, or the list itself is damaged.
    """
    wrong = what_is_wrong(folder, required) if (folder / SUMS).exists() else None
    if wrong:
        raise UserError(f"{folder} is damaged: {wrong}; get it again, or delete {SUMS} if the change is meant.")


def what_is_wrong(folder: Path, required: Collection[str] = (), among: Collection[str] | None = None) -> str | None:
    """Say what first differs from a folder's checksums; None where nothing does.

    Args:
        folder: holds the files.
        required: names that must be listed.
        among: names of the files that are checked; None checks all that are listed.
    """
    try:
        # Not splitlines(), to which other bytes than that of a new line end a line.
        text = (folder / SUMS).read_bytes().decode()
        lines = text.removesuffix("\n").split("\n") if text else []
    except (OSError, ValueError) as error:
        return f"{SUMS} cannot be read ({one_line(error)})"
    sums = {}
    for number, line in enumerate(lines, start=1):
        match = _LINE.fullmatch(line)
        # A name that leads out of the folder, to whatever the machine has there, is no file of it.
        if match is None or match[2].startswith("/") or ".." in PurePosixPath(match[2]).parts:
            return f"line {number} of {SUMS} is no checksum of a file of this folder"
        sums[match[2]] = match[1]
    if missing := sorted(set(required) - sums.keys()):
        return f"{SUMS} has no checksum of {missing[0]}"
    for name, expected in sums.items():
        if among is not None and name not in among:
            continue
        try:
            found = sha256_of_file(folder / name)
        except (OSError, ValueError) as error:  # ValueError: no name of a file on this system
            return f"{name} cannot be read ({one_line(error)})"
        if found != expected:
            return f"{name} has another SHA-256 than {SUMS} says"
    return None
