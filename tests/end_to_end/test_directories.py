"""Runs and sweeps that start together, or in one directory: every record is that of one run."""

from __future__ import annotations

import time
from pathlib import Path

import pytest

from ptq161.tracking.find import find_runs
from ptq161.tracking.read import read_run
from tests.end_to_end.conftest import SECONDS, Ended, Program

pytestmark = pytest.mark.slow
QUICK = ["method=rtn", "tracker=none", "eval.full_precision=false"]


def together(program: Program, *commands: list[str]) -> list[Ended]:
    processes = [program.start(*arguments, *program.tiny, *QUICK) for arguments in commands]
    outputs = [process.communicate(timeout=SECONDS) for process in processes]
    return [Ended(p.returncode, *output, 0.0) for p, output in zip(processes, outputs, strict=True)]


def seeds(folder: Path) -> list[tuple[int, str]]:
    """The seed of each record, twice: as configured, and as the manifest has it. Everything else is checked."""
    found = []
    for run_dir in find_runs(folder):
        run = read_run(run_dir)
        assert (run.manifest["exit_state"], run.problems) == ("finished", [])
        assert run.results is not None and run.config["seed"] == run.manifest["seeds"]["seed"]
        found.append(run.config["seed"])
    return sorted(found)


def test_runs_that_start_in_the_same_second(program: Program) -> None:
    ended = together(program, *([f"seed={seed}"] for seed in range(2)))
    assert [one.status for one in ended] == [0, 0], ended
    assert seeds(program.folder) == [0, 1]
    assert len({one.stdout.partition("Record: ")[2].splitlines()[0] for one in ended}) == 2


def test_sweeps_that_start_in_the_same_second(program: Program) -> None:
    ended = together(program, ["-m", "seed=0,1"], ["-m", "seed=2,3"])
    assert [one.status for one in ended] == [0, 0], ended
    assert seeds(program.folder) == [0, 1, 2, 3]
    for one in ended:
        assert "Sweep of 2 runs: 2 computed, 0 reused, 0 failed." in one.stdout
    assert len(list(program.folder.glob("multirun/*/*/multirun.yaml"))) == 2


def test_a_second_run_in_a_live_ones_directory(program: Program) -> None:
    first = program.start(*program.tiny, "method.epochs=1000000", "tracker=none", "hydra.run.dir=run")
    run_dir = program.folder / "run"
    deadline = time.monotonic() + SECONDS
    while not ((run_dir / "metrics.jsonl").exists() and '"loss"' in (run_dir / "metrics.jsonl").read_text()):
        assert first.poll() is None and time.monotonic() < deadline
        time.sleep(0.05)
    stable = [run_dir / name for name in ("config.yaml", "manifest.json", ".hydra/config.yaml", ".hydra/hydra.yaml")]
    before = [(path.read_bytes(), path.stat().st_mtime_ns) for path in stable]
    for arguments in (["hydra.run.dir=run"], ["-m", "hydra.sweep.dir=.", "hydra.sweep.subdir=run"]):
        second = program(*arguments, *program.tiny, *QUICK, "seed=1")
        assert second.status == 1
        assert second.sentences == [
            f"{run_dir} belongs to a run that has not ended: wait for it, or choose another directory."
        ]
    assert [(path.read_bytes(), path.stat().st_mtime_ns) for path in stable] == before
    first.kill()
    first.communicate()
    assert program(*program.tiny, *QUICK, "hydra.run.dir=run", "seed=1").status == 0
    assert seeds(program.folder) == [1]


@pytest.mark.parametrize(("launcher", "chdir"), [("basic", False), ("local", True)])
def test_a_relative_directory_is_the_one_that_was_typed(program: Program, launcher: str, chdir: bool) -> None:
    ended = program(
        "-m",
        *program.tiny,
        *QUICK,
        f"hydra/launcher={launcher}",
        f"hydra.job.chdir={chdir}",
        "hydra.sweep.dir=sweep",
        "hydra.sweep.subdir=${hydra.job.override_dirname}",
        "hydra.job.config.override_dirname.exclude_keys=[" + ",".join(_keys(program)) + "]",
        "calib.seq_len=600,64",
        PTQ161_STORE="store",
    )
    assert ended.status == 1
    assert "Traceback" not in ended.stderr
    assert "set calib.seq_len to at most 512." in ended.stderr
    assert "Sweep of 2 runs: 1 computed, 0 reused, 1 failed." in ended.stdout
    states = {path.name: read_run(path).manifest["exit_state"] for path in find_runs(program.folder / "sweep")}
    assert states == {"calib.seq_len=600": "failed", "calib.seq_len=64": "finished"}
    assert {path.name for path in program.folder.iterdir()} == {"sweep", "store"}


def _keys(program: Program) -> list[str]:
    return [override.partition("=")[0] for override in [*program.tiny, *QUICK] if "seq_len" not in override] + [
        "eval.seq_len"
    ]
