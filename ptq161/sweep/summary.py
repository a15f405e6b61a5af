"""The summary of a sweep at its end: how many runs were computed, reused, failed or interrupted."""

from __future__ import annotations

from collections import Counter
from pathlib import Path
from typing import Any

from ptq161.files.strict_json import decode_json
from ptq161.sweep.failures import read_failures
from ptq161.tracking.find import MANIFEST, find_runs

_OUTCOMES = ("computed", "reused", "failed", "interrupted")


def _count_outcomes(sweep_dir: Path, since: str = "") -> Counter[str]:
    """Count the jobs of a sweep by their outcome, one of ``_OUTCOMES``.

    Args:
        sweep_dir: holds the run directories, at any depth, and may hold those of others.
        since: jobs that began before this time (UTC, ISO 8601) are those of an earlier sweep in the same directory.
    """
    outcomes: Counter[str] = Counter()
    recorded = set()
    for run_dir in find_runs(sweep_dir):
        try:
            manifest = decode_json((run_dir / MANIFEST).read_text(encoding="utf-8"))
        except (OSError, ValueError):  # no run leaves it like this: somebody else's
            continue
        sweep = manifest.get("sweep") or {}
        if sweep.get("dir") == str(sweep_dir) and str(manifest.get("start")) >= since:
            outcomes[_outcome(manifest)] += 1
            recorded.add(sweep.get("job"))
    outcomes["failed"] += sum(failure.job not in recorded for failure in read_failures(sweep_dir))
    return outcomes


def _outcome(manifest: dict[str, Any]) -> str:
    if manifest.get("exit_state") == "finished":
        return "reused" if manifest.get("reused_from") else "computed"
    return "failed" if manifest.get("exit_state") == "failed" else "interrupted"


def print_summary(sweep_dir: Path, since: str) -> None:
    """Print the summary; ``since`` as in :func:`_count_outcomes`."""
    outcomes = _count_outcomes(sweep_dir, since)
    counts = [f"{outcomes[name]} {name}" for name in _OUTCOMES if outcomes[name] or name in _OUTCOMES[:3]]
    print(f"Sweep of {outcomes.total()} runs: {', '.join(counts)}. Records: {sweep_dir}")
    print(f"Report: python -m ptq161.report {sweep_dir} --out FOLDER", flush=True)
