"""The console with which the commands print their tables; rich, of the extra ``run``, is not for the library."""

from __future__ import annotations

import sys

from rich.console import Console


def stdout_console(*, highlight: bool = True) -> Console:
    """Return a console for stdout, as wide as its terminal.

    A file or a pipe has no width, and rich's 80 columns would wrap most tables: it gets 120.

    Args:
        highlight: color numbers, paths and the like in what is printed.
    """
    # No markup: paths and messages may hold brackets, which rich would take for tags.
    return Console(width=None if sys.stdout.isatty() else 120, highlight=highlight, markup=False)
