"""What differs between two recorded runs: their settings and their results, as a table.

Usage::

    python examples/compare_two_runs.py outputs/2026-01-01/12-00-00 outputs/2026-01-01/13-00-00

Only the records are read: no model, no GPU. ``python -m ptq161.report`` makes tables and figures of many runs.
"""

from __future__ import annotations

import sys
from collections.abc import Mapping
from typing import Any, TypeGuard

import ptq161
from ptq161.tracking.read import RunData, read_run

MISSING = "-"


def main() -> int:
    """Print the table; return the exit status."""
    if len(sys.argv) != 3:
        print(__doc__, file=sys.stderr)
        return 2
    try:
        first, second = (read_run(folder, with_lines=False) for folder in sys.argv[1:])
    except ptq161.UserError as error:
        print(error, file=sys.stderr)
        return 1
    rows = differing(flat(first.config), flat(second.config)) + differing(scores(first), scores(second))
    print_table(["", str(first.run_dir), str(second.run_dir), "difference"], rows)
    return 0


def flat(config: Mapping[str, Any], prefix: str = "") -> dict[str, Any]:
    """Turn nested settings into one level: ``{"method.epochs": 4}``."""
    found: dict[str, Any] = {}
    for key, value in config.items():
        found |= flat(value, f"{prefix}{key}.") if isinstance(value, dict) else {f"{prefix}{key}": value}
    return found


def scores(run: RunData) -> dict[str, Any]:
    """Return a run's results by name; nothing where it has not finished."""
    return dict(run.results["metrics"]) if run.results else {}


def differing(first: Mapping[str, Any], second: Mapping[str, Any]) -> list[list[str]]:
    """Return a row for each name whose values are not equal."""
    rows = []
    for name in sorted({*first, *second}):
        a, b = first.get(name), second.get(name)
        if a == b:
            continue
        difference = f"{b - a:+.4g}" if is_number(a) and is_number(b) else ""
        rows.append([name, shown(a), shown(b), difference])
    return rows


def is_number(value: Any) -> TypeGuard[int | float]:
    """Say whether a value is a number: a switch is none."""
    return isinstance(value, int | float) and not isinstance(value, bool)


def shown(value: Any) -> str:
    """Write a value as a table shows it."""
    if value is None:
        return MISSING
    return f"{value:.6g}" if isinstance(value, float) else str(value)


def print_table(header: list[str], rows: list[list[str]]) -> None:
    """Print rows in aligned columns."""
    if not rows:
        print("The two runs have the same settings and the same results.")
        return
    widths = [max(len(row[i]) for row in [header, *rows]) for i in range(len(header))]
    for row in [header, *rows]:
        print("  ".join(cell.ljust(width) for cell, width in zip(row, widths, strict=True)).rstrip())


if __name__ == "__main__":
    sys.exit(main())
