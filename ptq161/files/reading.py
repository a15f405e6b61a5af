"""Reading what others wrote: whatever it holds, the answer is right or the error is a ``UserError``."""

from __future__ import annotations

import contextlib
from collections.abc import Iterator
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


def one_line(error: Exception) -> str:
    """Return what an exception says, on one line, or its type where it says nothing."""
    if isinstance(error, OSError) and error.strerror:
        return error.strerror
    text = " ".join(str(error).split()).rstrip(".")
    return f"{type(error).__name__} {text}".strip() if isinstance(error, KeyError) or not text else text
