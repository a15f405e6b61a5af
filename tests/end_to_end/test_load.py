"""Eight runs over four workers that are killed at random: eight records, none lost, none double."""

from __future__ import annotations

import os
import random
import signal
import subprocess
import time

import psutil
import pytest

from ptq161.tracking.read import read_run
from tests.end_to_end.conftest import Program

pytestmark = pytest.mark.slow

JOBS = 8
KILLS = 4
SECONDS = 300  # after which it hangs


def test_eight_runs_over_four_workers_that_are_killed_at_random(program: Program) -> None:
    ratios = [i / 100 for i in range(JOBS)]
    running = program.start(
        "-m",
        *program.tiny,
        "tracker=none",
        "hydra.sweep.dir=sweep",
        "method.epochs=1",
        "calib.n_samples=2",
        "eval.max_windows=2",
        "eval.full_precision=false",
        f"mask_ratio={','.join(map(str, ratios))}",
        "hydra/launcher=local",
        "hydra.launcher.slots=4",
        f"hydra.launcher.retries={KILLS}",
    )
    killed = kill_workers(running, KILLS)
    stdout, stderr = running.communicate(timeout=SECONDS)
    assert (running.returncode, len(killed)) == (0, KILLS), stdout + stderr
    # A worker that is killed when its job is done already needs no second attempt.
    late = KILLS - stdout.count("killed by SIGKILL; it is started again")
    assert 0 <= late < KILLS // 2

    sweep = program.folder / "sweep"
    assert {path.name for path in sweep.iterdir()} == {*map(str, range(JOBS)), "multirun.yaml", ".sweep.lock"}
    runs = [read_run(sweep / str(number)) for number in range(JOBS)]
    assert [run.config["mask_ratio"] for run in runs] == ratios
    for run in runs:
        assert (run.manifest["exit_state"], run.problems) == ("finished", [])
        assert run.results is not None and (run.run_dir / "checkpoint" / "packed.safetensors").is_file()
        # A run that was begun again has left nothing of its first attempt: each number once.
        seconds = [metric["block"] for metric in run.metrics if metric["name"] == "seconds"]
        assert seconds == [0, 1]
    pids = [run.manifest["pid"] for run in runs]
    assert len(killed & set(pids)) <= late


def kill_workers(sweep: subprocess.Popen[str], kills: int) -> set[int]:
    """Kill a running job's process ``kills`` times, at random moments; return the processes."""
    chance, killed = random.Random(0), set[int]()
    process = psutil.Process(sweep.pid)
    while len(killed) < kills and sweep.poll() is None:
        time.sleep(chance.uniform(0.1, 0.9))
        # Jobs are the leaders of sessions of their own.
        workers = [child.pid for child in process.children(recursive=True) if is_worker(child.pid)]
        if workers:
            victim = chance.choice(sorted(workers))
            try:
                psutil.Process(victim).send_signal(signal.SIGKILL)
            except psutil.NoSuchProcess:
                continue
            killed.add(victim)
    return killed


def is_worker(pid: int) -> bool:
    try:
        return os.getsid(pid) == pid
    except ProcessLookupError:
        return False
