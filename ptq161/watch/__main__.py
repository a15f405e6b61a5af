"""Follow a sweep, or a run, in the terminal.

Usage::

    python -m ptq161.watch multirun/2026-01-01/12-00-00     # until the last run has ended; Ctrl-C leaves earlier
    python -m ptq161.watch outputs --once                   # everything below a folder as it is now
"""

from __future__ import annotations

import argparse
import collections
import math
import os
import sys
import threading
import time
from collections.abc import Sequence
from pathlib import Path

from rich.console import Console, Group
from rich.live import Live
from rich.table import Table

from ptq161.files.streams import never_fail_to_print
from ptq161.watch.snapshot import STATES, Snapshot, read_snapshot

_STYLES = {
    "running": "cyan",
    "starting": "cyan",
    "failed": "red",
    "lost": "red",
    "interrupted": "yellow",
    "waiting": "dim",
    "finished": "green",
}


def main(arguments: Sequence[str] | None = None) -> int:
    """Run the command.

    Args:
        arguments: of the command line; None takes the process's own.

    Returns:
        the exit status: 0, or 1 with one sentence on stderr where there is nothing to watch.
    """
    options = _parser().parse_args(arguments)
    folder, console = Path(options.folder), Console(markup=False, highlight=False)
    if not folder.is_dir():
        print(f"{folder} is not a folder: give the directory of a sweep or of a run.", file=sys.stderr)
        return 1
    if options.once or not console.is_terminal:
        shot = read_snapshot(folder)
        console.print(_render(shot))
        return 0
    try:
        _follow(folder, console, options.every)
    except KeyboardInterrupt:
        return 130
    return 0


def _follow(folder: Path, console: Console, every: float) -> None:
    with Live(console=console, auto_refresh=False) as live:
        while True:
            shot = read_snapshot(folder)
            # Six lines are the title, the header and rules; a row may take two lines.
            live.update(_render(shot, height=(console.height - 6) // 2), refresh=True)
            if shot.ended:
                live.update(_render(shot), refresh=True)
                return
            time.sleep(every)


def _render(shot: Snapshot, height: int | None = None) -> Group:
    """Draw a snapshot.

    Args:
        shot: what is drawn.
        height: most rows; if there are more runs, those that have ended are left out first.
    """
    counts = collections.Counter(row.state for row in shot.rows)
    total = ", ".join(f"{counts[state]} {state}" for state in STATES if counts[state])
    shown = shot.rows
    if height is not None and len(shown) > height:
        first = sorted(shown, key=lambda row: STATES.index(row.state))[: max(1, height)]
        shown = [row for row in shown if row in first]
    left_out = f"; {len(shot.rows) - len(shown)} not shown" if len(shown) < len(shot.rows) else ""
    table = Table(title=f"{len(shot.rows)} runs: {total or 'none yet'}{left_out}", title_justify="left")
    for column in ("run", "overrides", "state", "progress", "loss", "time", "result"):
        table.add_column(column, justify="right" if column in ("run", "loss", "time") else "left", overflow="fold")
    for row in shown:
        loss = "" if row.loss is None else f"{row.loss:.4g}"
        spent = "" if row.seconds is None or not math.isfinite(row.seconds) else _duration(row.seconds)
        table.add_row(row.job, row.label, row.state, row.progress, loss, spent, row.outcome, style=_STYLES[row.state])
    return Group(table, *shot.problems)


def _duration(seconds: float) -> str:
    minutes, rest = divmod(round(seconds), 60)
    hours, minutes = divmod(minutes, 60)
    return f"{hours}:{minutes:02}:{rest:02}" if hours else f"{minutes}:{rest:02}"


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(prog="python -m ptq161.watch", description="Follow a sweep, or a run.")
    parser.add_argument(
        "folder", type=os.path.expanduser, metavar="DIR", help="directory of a sweep or a run, or any folder above them"
    )
    parser.add_argument("--once", action="store_true", help="print one table and exit (as without a terminal)")
    parser.add_argument("--every", type=_positive, default=2.0, metavar="SECONDS", help="time between two updates (2)")
    return parser


def _positive(text: str) -> float:
    seconds = float(text)
    if not 0 < seconds < threading.TIMEOUT_MAX:
        raise argparse.ArgumentTypeError(f"{text}: use a positive number of seconds")
    return seconds


if __name__ == "__main__":
    never_fail_to_print()
    sys.exit(main())
