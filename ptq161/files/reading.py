"""Reading what others wrote: whatever it holds, the answer is right or the error is a ``UserError``."""

from __future__ import annotations

import contextlib
import csv
from collections.abc import Iterator, Sequence
from pathlib import Path

from ptq161.errors import UserError

LFS_POINTER = b"version https://git-lfs.github.com/spec/"
"""First bytes of what git leaves of a large file where git-lfs is not installed."""


@contextlib.contextmanager
def reading(path: Path, advice: str) -> Iterator[None]:
    """Turn every exception inside the context into a ``UserError`` that names ``path``.

    A file from elsewhere can make any of the libraries that parse it raise anything: the kinds of exceptions cannot be
    listed. So the context holds the reading alone, and the original exception stays the cause.

    Args:
        path: the file or folder that is read inside.
        advice: what the user can do; it ends the sentence.

    Raises:
        UserError: anything but a lack of memory is raised inside.
    """
    try:
        yield
    except (UserError, MemoryError):
        raise
    except OSError as error:
        raise UserError(f"{path} cannot be read ({one_line(error)}); {advice}.") from error
    except Exception as error:
        raise UserError(f"{path} is damaged ({one_line(error)}); {advice}.") from error


def read_rows(file: Path | str, columns: Sequence[str], what: str) -> list[tuple[str, dict[str, str]]]:
    """Read the rows of a CSV file, each with its place, such as ``line 2 of FILE``; an empty or missing cell is ``""``.

    Args:
        file: in UTF-8, with a header.
        columns: that it must have.
        what: it holds, in the plural, for the sentences.

    Raises:
        UserError: the file cannot be read, or lacks a column.
    """
    try:
        with Path(file).open(newline="", encoding="utf-8") as stream:
            reader = csv.DictReader(stream, restval="")
            names = reader.fieldnames or ()
            if missing := [name for name in columns if name not in names]:
                raise UserError(f"{file} has no column {missing[0]!r}: {what} need {', '.join(columns)}.")
            return [(f"line {reader.line_num} of {file}", {name: row[name] for name in names}) for row in reader]
    except (OSError, UnicodeDecodeError, csv.Error) as error:
        raise UserError(f"the {what} {file} cannot be read ({error}).") from error


def one_line(error: Exception) -> str:
    """Return what an exception says, on one line, or its type where it says nothing."""
    if isinstance(error, OSError) and error.strerror:
        return error.strerror
    text = " ".join(str(error).split()).rstrip(".")
    return f"{type(error).__name__} {text}".strip() if isinstance(error, KeyError) or not text else text
