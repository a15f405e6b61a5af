"""Runs of a tiny model, killed with SIGKILL at random moments and typed again, against runs that nothing disturbed.

::

    python benchmarks/kills.py --n 1000 --seed 0
    python benchmarks/kills.py --n 40 --method ptq161 gptq

Each run has a store of its own. It is killed after a uniformly random share of an undisturbed run's life, perhaps more
than once, and typed again until it ends. Its checkpoint's bytes, results, samples and metric lines (but for times) have
to be those of an undisturbed run, so have those of every killed run that left results, and each entry of the store has
to be whole. Runs take turns in where they write: a new directory each time (the default), or the same again.

The last line counts the runs, the kills, the kills per run in each stage, the failures, and the temporary files and
unfinished entries that are left when a run has ended. The exit status is 1 if a run failed.
"""

from __future__ import annotations

import argparse
import collections
import contextlib
import dataclasses
import os
import random
import shutil
import statistics
import sys
import tempfile
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import warm

METHODS = ("ptq161", "rtn", "gptq", "awq")
EPOCHS = "method.epochs=6"
AGAIN = 0.5
"""The chance that a run which was killed is killed once more."""
UNDISTURBED = 2
"""Runs that nothing disturbs, of each method: the mean of their lives is the life that kills are drawn from."""
SECONDS = 300
"""After which a run hangs."""
_CLOCKED = ("seconds", "tokens_per_second")


@dataclasses.dataclass
class Outcome:
    """What a run, typed until it ended, came to.

    Attributes:
        stages: the stage in which each kill found it.
        problems: a line for each difference; empty where all is as in an undisturbed run.
        left: temporary files and unfinished entries that remain.
    """

    stages: list[str]
    problems: list[str]
    left: int


def main() -> int:
    """Run the benchmark; return its exit status."""
    options = _parser().parse_args()
    chance = random.Random(options.seed)
    began = time.monotonic()
    warm.prepare()
    _show_stages()
    with tempfile.TemporaryDirectory(prefix="kills.") as place:
        folder = Path(place) / "runs"
        folder.mkdir()
        arguments = warm.make_inputs(folder)
        undisturbed = {method: Undisturbed(folder, method, arguments) for method in options.method}
        outcomes = []
        for i in range(options.n):
            method = options.method[i % len(options.method)]
            outcome = _killed_run(folder / f"{i:04}", undisturbed[method], chance, same_place=i % 2 == 1)
            outcomes.append(outcome)
            for problem in outcome.problems:
                print(f"run {i} ({method}): {problem}", flush=True)
    print(_figures(outcomes, (time.monotonic() - began) / 60))
    return int(any(outcome.problems for outcome in outcomes))


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(description="Kill runs at random moments, type them again, compare.")
    parser.add_argument("--n", type=int, default=1000, help="number of runs")
    parser.add_argument("--seed", type=int, default=0, help="of the moments")
    parser.add_argument("--method", nargs="+", default=METHODS, help="methods that take turns")
    return parser


def _figures(outcomes: list[Outcome], minutes: float) -> str:
    stages = collections.Counter(stage for outcome in outcomes for stage in outcome.stages)
    per_run = ", ".join(f"{stage} {n / len(outcomes):.2f}" for stage, n in stages.most_common())
    failures = sum(bool(outcome.problems) for outcome in outcomes)
    left = sum(outcome.left for outcome in outcomes)
    return (
        f"{len(outcomes)} runs, {stages.total()} kills (per run: {per_run}), {failures} failures, "
        f"{left} leftovers, {minutes:.1f} minutes"
    )


class Undisturbed:
    """What runs of a method come to when nothing disturbs them.

    Attributes:
        arguments: of the program.
        life: seconds that such a run takes.
        record: what a record holds, but for times.
    """

    def __init__(self, folder: Path, method: str, arguments: list[str]) -> None:
        self.arguments = ["run", *arguments, f"method={method}"]
        if method in ("ptq161", "omniquant"):
            self.arguments.append(EPOCHS)
        lives, records = [], []
        for i in range(UNDISTURBED):
            place = folder / f"{method}.{i}"
            place.mkdir()
            began = time.monotonic()
            process = warm.start(warm.program(*self.arguments), place, PTQ161_STORE=str(place / "store"))
            if process.wait(SECONDS) != 0:
                process.kill()
                raise SystemExit(f"the undisturbed run of {method} ended with {process.errors.read_text()}")
            lives.append(time.monotonic() - began)
            (run_dir,) = place.glob("outputs/*/*")
            records.append(_record(run_dir))
            shutil.rmtree(place)
        if any(record != records[0] for record in records):
            raise SystemExit(f"two undisturbed runs of {method} differ: {_difference(*records[:2])}.")
        self.life = statistics.mean(lives)
        self.record: dict[str, Any] = records[0]


def _killed_run(place: Path, undisturbed: Undisturbed, chance: random.Random, same_place: bool) -> Outcome:
    """Type a run until it ends, killing it on the way, and compare what it left."""
    place.mkdir()
    arguments = [*undisturbed.arguments, *(["hydra.run.dir=run"] if same_place else [])]
    stages: list[str] = []
    killing = True
    while True:
        process = warm.start(warm.program(*arguments), place, PTQ161_STORE=str(place / "store"))
        status = process.wait(chance.uniform(0, undisturbed.life) if killing else SECONDS)
        if status is not None or not killing:
            break
        process.kill()
        stages.append(_stage(place))
        killing = chance.random() < AGAIN
    if status is None:
        process.kill()
    if status != 0:
        last = process.errors.read_text().strip().splitlines()[-1:]
        return Outcome(stages, [f"ended with {status} ({' '.join(last)})"], 0)
    outcome = Outcome(stages, list(_problems(place, undisturbed.record)), _left(place))
    if not outcome.problems:
        shutil.rmtree(place)
    return outcome


# --- the stage that a kill finds --------------------------------------------------------------------------------------

_STAGE = "stage"


def _show_stages() -> None:
    """Let each run write the stage that it is in, by its own clock, into a file in its working directory."""
    from ptq161.run.session import Session

    clock = Session.clock

    @contextlib.contextmanager
    def shown(self: Session, stage: str) -> Iterator[None]:
        with clock(self, stage):
            Path(_STAGE).write_text(stage)
            yield
            Path(_STAGE).write_text(f"after {stage}")

    Session.clock = shown  # type: ignore[method-assign]  # in the forked process alone


def _stage(place: Path) -> str:
    """Return the stage in which a run was killed, and forget it."""
    file = place / _STAGE
    stage = file.read_text() if file.exists() else "start"
    file.unlink(missing_ok=True)
    return stage or "start"


# --- what is compared -------------------------------------------------------------------------------------------------


def _record(run_dir: Path) -> dict[str, Any]:
    """Return a record, but for times."""
    from ptq161.files.hashing import sha256_of_file
    from ptq161.tracking.read import read_run

    run = read_run(run_dir)
    results = {k: v for k, v in (run.results or {}).items() if k not in ("seconds", "peak_memory_bytes")}
    metrics = [{k: v for k, v in line.items() if k != "time"} for line in run.metrics]
    for line in metrics:
        if str(line["name"]).endswith(_CLOCKED):
            line["value"] = None
    return {
        "problems": run.problems,
        "results": results,
        "metrics": metrics,
        "samples": [(line["name"], line["text"]) for line in run.samples],
        "checkpoint": {path.name: sha256_of_file(path) for path in sorted((run_dir / "checkpoint").iterdir())},
    }


def _problems(place: Path, expected: dict[str, Any]) -> Iterator[str]:
    """Yield a line for each thing that is not as in an undisturbed run."""
    from ptq161.tracking.find import find_runs
    from ptq161.tracking.read import read_run

    runs = [run_dir for run_dir in find_runs(place) if "store" not in run_dir.relative_to(place).parts]
    finished = [run_dir for run_dir in runs if read_run(run_dir).results is not None]
    if not any(read_run(run_dir).manifest["exit_state"] == "finished" for run_dir in finished):
        yield "no record is finished"
    for run_dir in finished:
        if (found := _record(run_dir)) != expected:
            yield f"{run_dir.relative_to(place)} differs from an undisturbed run: {_difference(found, expected)}"
    yield from _store_problems(place / "store")


def _difference(found: dict[str, Any], expected: dict[str, Any]) -> str:
    part = next(key for key in expected if found[key] != expected[key])
    a, b = found[part], expected[part]
    if isinstance(b, dict):
        key = next(key for key in {**a, **b} if a.get(key) != b.get(key))
        return f"{part}.{key} is {a.get(key)} and not {b.get(key)}"
    at = next((i for i, (x, y) in enumerate(zip(a, b, strict=False)) if x != y), min(len(a), len(b)))
    return f"{part} [{at}] of {len(a)} is {a[at : at + 1]} and not {b[at : at + 1]} of {len(b)}"


def _store_problems(root: Path) -> Iterator[str]:
    """Yield a line for each finished entry that is not whole, or that no run could read."""
    from ptq161.cache.store import stored_entries
    from ptq161.files.checksums import SUMS, files_of, what_is_wrong
    from ptq161.files.fingerprints import FINGERPRINT, key_of
    from ptq161.files.strict_json import decode_json

    for entry in stored_entries(root):
        name = entry.folder.relative_to(root)
        if not entry.finished:
            continue
        if wrong := what_is_wrong(entry.folder, files_of(entry.folder) - {SUMS}):
            yield f"the entry {name} of the store is not whole: {wrong}"
        elif key_of(decode_json((entry.folder / FINGERPRINT).read_text())) != entry.folder.name:
            yield f"the entry {name} of the store is not what its name says"


def _left(place: Path) -> int:
    """Count temporary files and folders, and unfinished entries of the store."""
    return sum(
        name.endswith((".tmp", ".old", ".unfinished"))
        for _, folders, files in os.walk(place)
        for name in (*folders, *files)
    )


if __name__ == "__main__":
    sys.exit(main())
