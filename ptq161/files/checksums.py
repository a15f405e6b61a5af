"""SHA256SUMS: a folder's checksums in a file beside its content, which ``sha256sum -c SHA256SUMS`` reads too."""

from __future__ import annotations

import re
from collections.abc import Collection
from pathlib import Path, PurePosixPath

from ptq161.errors import UserError
from ptq161.files.hashing import sha256_of_file

SUMS = "SHA256SUMS"
"""The file of checksums. It names neither itself nor what a person may edit, such as a model card."""

_LINE = re.compile(r"([0-9a-f]{64})  (\S.*)")


def write_sums(folder: Path, leave_out: Collection[str] = ()) -> None:
    """Write the checksums of a folder's files, those of its subfolders included.

    Args:
        folder: holds files, all of them written.
        leave_out: names of files at its top that are not listed.

    Raises:
        OSError: a file cannot be read or written.
    """
    names = sorted(path.relative_to(folder).as_posix() for path in folder.rglob("*") if path.is_file())
    lines = [f"{sha256_of_file(folder / name)}  {name}\n" for name in names if name not in (SUMS, *leave_out)]
    (folder / SUMS).write_text("".join(lines), encoding="utf-8")


def check_sums(folder: Path, required: Collection[str] = ()) -> None:
    """Check a folder's files against its checksums; a folder without ``SHA256SUMS`` is taken as it is.

    Files that are not listed may be added to a folder, such as a tokenizer.

    Args:
        folder: holds the files.
        required: names that must be listed.

    Raises:
        UserError: a listed file is missing or has other bytes, or the list itself is damaged.
    """
    file = folder / SUMS
    if not file.exists():
        return
    sums = _read(file)
    if missing := sorted(set(required) - sums.keys()):
        raise UserError(f"{file} is damaged: it has no checksum of {missing[0]}; get the folder again.")
    for name, expected in sums.items():
        try:
            found = sha256_of_file(folder / name)
        except OSError as error:
            raise UserError(f"{folder / name} cannot be read ({error.strerror}), but {file} names it.") from error
        if found != expected:
            raise UserError(
                f"{folder / name} is damaged: its SHA-256 is {found} and not the {expected} of {SUMS}; "
                f"get the file again, or delete {SUMS} if the change is meant."
            )


def _read(file: Path) -> dict[str, str]:
    """Return name -> checksum of every line."""
    try:
        lines = file.read_text(encoding="utf-8").splitlines()
    except (OSError, ValueError) as error:
        raise UserError(f"{file} cannot be read ({' '.join(str(error).split())}).") from error
    sums = {}
    for number, line in enumerate(lines, start=1):
        match = _LINE.fullmatch(line)
        # A name that leads out of the folder, to whatever the machine has there, is no file of it.
        if match is None or match[2].startswith("/") or ".." in PurePosixPath(match[2]).parts:
            raise UserError(f"line {number} of {file} is no checksum of a file of this folder; get the folder again.")
        sums[match[2]] = match[1]
    return sums
