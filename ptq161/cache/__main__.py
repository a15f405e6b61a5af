"""Show the store of computed results, and delete from it.

::

    python -m ptq161.cache                                      # list the entries by kind
    python -m ptq161.cache --prune --older-than 30              # delete entries that were not used for 30 days
    python -m ptq161.cache --prune --kind blocks --unfinished   # delete entries that killed runs left unfinished
    python -m ptq161.cache --prune                              # delete everything

Entries that a process is using are kept. Records in run directories stay complete: deleting an entry does not free the
disk space of a checkpoint that a run directory shares with it.
"""

from __future__ import annotations

import argparse
import math
import sys
import time
from collections.abc import Sequence
from datetime import datetime
from itertools import groupby
from pathlib import Path

from rich.table import Table

from ptq161.cache.store import StoredEntry, delete_entry, store_dir, stored_entries
from ptq161.console import stdout_console
from ptq161.errors import UserError

_SECONDS_PER_DAY = 86400


def main(arguments: Sequence[str] | None = None) -> int:
    """Run the command; return its exit status."""
    options = _parser().parse_args(arguments)
    root = store_dir()
    try:
        if not options.prune and (options.older_than is not None or options.unfinished):
            raise UserError("--older-than and --unfinished select entries to delete: use them with --prune.")
        if options.older_than is not None and not 0 <= options.older_than < math.inf:
            raise UserError(f"--older-than {options.older_than:g}: use a number of days, 0 or more.")
        entries = _select(stored_entries(root), options.kind, options.older_than, options.unfinished)
        if options.prune:
            _prune(entries, root)
        else:
            _show(entries, root)
    except UserError as error:
        print(error, file=sys.stderr)
        return 1
    return 0


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(
        prog="python -m ptq161.cache", description="Show the store of computed results, or delete from it."
    )
    parser.add_argument(
        "--prune", action="store_true", help="delete all entries, or those that match the options below"
    )
    parser.add_argument("--kind", help="only entries of this kind, such as results, blocks or scores")
    parser.add_argument("--older-than", type=float, metavar="DAYS", help="only entries not used for DAYS days")
    parser.add_argument("--unfinished", action="store_true", help="only entries that interrupted runs left unfinished")
    return parser


def _select(entries: list[StoredEntry], kind: str | None, days: float | None, unfinished: bool) -> list[StoredEntry]:
    kinds = {entry.kind for entry in entries}
    if kind is not None and kinds and kind not in kinds:
        raise UserError(f"--kind={kind}: the store has no such entries; use one of {', '.join(sorted(kinds))}.")
    before = time.time() - (days or 0) * _SECONDS_PER_DAY
    return [
        entry
        for entry in entries
        if (kind is None or entry.kind == kind)
        and (days is None or entry.used < before)
        and not (unfinished and entry.finished)
    ]


def _show(entries: list[StoredEntry], root: Path) -> None:
    table = Table(title=f"Computed results in {root}", title_justify="left")
    table.add_column("kind")
    for column in ("entries", "unfinished", "size", "oldest use", "newest use"):
        table.add_column(column, justify="right")
    for kind, group in groupby(entries, key=lambda entry: entry.kind):
        table.add_row(kind, *_summary(list(group)))
    if entries:
        table.add_section()
        table.add_row("all", *_summary(entries))
    stdout_console(highlight=False).print(table)


def _summary(entries: list[StoredEntry]) -> list[str]:
    used = [datetime.fromtimestamp(entry.used).strftime("%Y-%m-%d %H:%M") for entry in entries]
    unfinished = sum(not entry.finished for entry in entries)
    return [str(len(entries)), str(unfinished), _size(sum(e.nbytes for e in entries)), min(used), max(used)]


def _prune(entries: list[StoredEntry], root: Path) -> None:
    freed = [delete_entry(entry) for entry in entries]
    deleted = [nbytes for nbytes in freed if nbytes is not None]
    in_use = len(freed) - len(deleted)
    kept = f"; {in_use} in use were kept" if in_use else ""
    print(f"{len(deleted)} entries of {root} deleted, {_size(sum(deleted))} freed{kept}.")


def _size(nbytes: int) -> str:
    return f"{nbytes / 1e6:.2f} MB" if nbytes < 1e9 else f"{nbytes / 1e9:.2f} GB"


if __name__ == "__main__":
    sys.exit(main())
