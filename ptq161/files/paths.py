"""Paths as users write them: ``~`` and ``~user`` are home folders, and a relative path begins where it was typed."""

from __future__ import annotations

import os
from pathlib import Path

import platformdirs

from ptq161.errors import UserError


def absolute_path(setting: str, path: str | Path, base: str | Path = ".") -> Path:
    """Return a path as an absolute one; links and ``..`` are left as they are.

    Args:
        setting: begins the sentence of the error.
        path: of a file or folder, which need not exist.
        base: folder in which a relative path begins.

    Raises:
        UserError: there is no home folder for ``~`` or ``~user``.
    """
    # Path.expanduser would take ./~x, a folder of that name, for a home.
    expanded = os.path.expanduser(path)
    if str(expanded).startswith("~"):
        home = str(path).partition("/")[0]
        raise UserError(f"{setting}={path}: no home folder is known for {home}; give an absolute path.")
    return Path(base, expanded).absolute()


def cache_dir() -> Path:
    """Return the folder of what is fetched and made once for a user: ``$PTQ161_CACHE``, else the platform's cache."""
    return Path(os.environ.get("PTQ161_CACHE") or platformdirs.user_cache_path("ptq161")).expanduser().absolute()
