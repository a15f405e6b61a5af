"""Sweeps beyond one process: the local launcher, Ray, submitit on this machine and on a Slurm that is not there."""

from __future__ import annotations

import os
import signal
import subprocess
import time
from collections.abc import Callable
from pathlib import Path

import pytest

from ptq161.tracking.read import RunData, read_run
from ptq161.watch.__main__ import main as watch
from tests.end_to_end.conftest import Ended, Program

pytestmark = pytest.mark.slow

SWEEP = ["-m", "tracker=none", "hydra.sweep.dir=group/sweep", "method.epochs=1", "calib.n_samples=2"]
LOCAL = ["hydra/launcher=local", "hydra.launcher.slots=2", "hydra.launcher.threads=1"]
ONE_FAILS = "calib.seq_len=600,64"

# Stand-ins for Slurm's commands: sbatch runs an array of two jobs at once, srun a command with its output in a file.
SLURM = {
    "sbatch": """#!/bin/bash
for task in 0 1; do
    SLURM_JOB_ID=8$task SLURM_ARRAY_JOB_ID=7 SLURM_ARRAY_TASK_ID=$task bash "$1" > /dev/null 2>&1 &
done
echo "Submitted batch job 7"
""",
    "srun": """#!/bin/bash
shift 5  # --unbuffered --output FILE --error FILE
exec "$@" > "task$SLURM_ARRAY_TASK_ID.log" 2>&1
""",
    "sacct": """#!/bin/bash
printf 'JobID|State|NodeList\\n7_0|RUNNING|node\\n7_1|RUNNING|node\\n'
""",
}


def sweep_runs(program: Program) -> tuple[RunData, RunData]:
    return read_run(program.folder / "group/sweep/0"), read_run(program.folder / "group/sweep/1")


def files(folder: Path) -> set[str]:
    return {str(path.relative_to(folder)) for path in folder.rglob("*")}


def test_the_local_launcher_leaves_what_hydras_own_does(
    program: Program, tmp_path_factory: pytest.TempPathFactory
) -> None:
    other = Program(tmp_path_factory.mktemp("basic"), program.tiny)
    for ended in (
        program(*SWEEP, *program.tiny, "mask_ratio=0.1,0.2", *LOCAL),
        other(*SWEEP, *other.tiny, "mask_ratio=0.1,0.2", OMP_NUM_THREADS="1"),
    ):
        assert ended.status == 0, ended.stderr
    local, basic = sweep_runs(program), sweep_runs(other)
    assert local[0].manifest["pid"] != local[1].manifest["pid"]
    for ours, hydras in zip(local, basic, strict=True):
        assert files(ours.run_dir) == files(hydras.run_dir) | {"console.log"}
        assert ours.config == hydras.config
        for key in ("exit_state", "job_name", "group", "tags", "checkpoint_sha256", "calibration_sha256"):
            assert ours.manifest[key] == hydras.manifest[key], key
        assert ours.manifest["threads"]["torch"] == 1
        assert "Full precision against quantized" in (ours.run_dir / "console.log").read_text()


@pytest.mark.parametrize(
    ("launcher", "settings"),
    [
        ("ray", ["+hydra.launcher.ray.init.include_dashboard=false", "+hydra.launcher.ray.remote.num_cpus=1"]),
        ("submitit_local", []),
        ("submitit_slurm", ["hydra.launcher.cpus_per_task=1", "hydra.launcher.max_num_timeout=2"]),
    ],
)
def test_a_launcher_beyond_this_process_runs_all_jobs_and_tells_what_failed(
    program: Program, capsys: pytest.CaptureFixture[str], launcher: str, settings: list[str]
) -> None:
    arguments = [*SWEEP, *program.tiny, ONE_FAILS, f"hydra/launcher={launcher}", *settings]
    ended = program(*arguments, PATH=path_with_slurm(program.folder))
    assert ended.status == 1, ended.stdout
    failed, finished = sweep_runs(program)
    assert (failed.manifest["exit_state"], finished.manifest["exit_state"]) == ("failed", "finished")
    assert [run.manifest["group"] for run in (failed, finished)] == ["group/sweep"] * 2
    assert finished.manifest["job_name"].startswith("1: ") and finished.manifest["threads"]["torch"] >= 1
    assert_table(ended, "0")
    assert watch([str(program.folder), "--once"]) == 0
    assert "2 runs: 1 failed, 1 finished" in capsys.readouterr().out


def path_with_slurm(folder: Path) -> str:
    commands = folder / "slurm"
    commands.mkdir()
    for name, script in SLURM.items():
        (commands / name).write_text(script)
        (commands / name).chmod(0o755)
    return f"{commands}{os.pathsep}{os.environ['PATH']}"


def assert_table(ended: Ended, job: str) -> None:
    """The table of failures is the last thing on stderr, and holds one job with its sentence."""
    table = ended.stderr[ended.stderr.index("1 failed: ") :]
    rows = [line for line in table.splitlines() if line.startswith("│") and line.split("│")[1].strip()]
    assert len(rows) == 1 and rows[0].split("│")[1].strip() == job
    assert "calib.seq_len=600" in rows[0] and "eval=ppl" not in rows[0]
    assert "Traceback" not in ended.stderr


@pytest.mark.parametrize("launcher", ["basic", "local"])
def test_stop_ends_a_sweep_at_its_first_failure(program: Program, launcher: str) -> None:
    ended = program(*SWEEP, *program.tiny, ONE_FAILS, f"hydra/launcher={launcher}", "on_error=stop")
    assert ended.status == 1
    assert "on_error=stop" in ended.stderr
    assert_table(ended, "0")
    assert {path.name for path in (program.folder / "group/sweep").iterdir()} == {
        "0",
        "failures.jsonl",
        "multirun.yaml",
        ".sweep.lock",
    }


@pytest.mark.parametrize(("number", "status"), [(signal.SIGTERM, 143), (signal.SIGKILL, -9)])
def test_the_jobs_of_a_killed_sweep_close_their_records(program: Program, number: signal.Signals, status: int) -> None:
    running = program.start(*SWEEP, *program.tiny, "mask_ratio=0.1,0.2,0.3", *LOCAL, "method.epochs=100000")
    sweep = program.folder / "group/sweep"
    numbers = [sweep / job / "metrics.jsonl" for job in ("0", "1")]
    wait_until(running, lambda: all(path.is_file() and path.stat().st_size for path in numbers))
    running.send_signal(number)
    running.communicate(timeout=120)
    assert running.returncode == status
    wait_until(None, lambda: all(run.manifest["exit_state"] != "running" for run in sweep_runs(program)))
    for run in sweep_runs(program):
        assert run.manifest["exit_state"] == "interrupted"
        assert run.manifest["exception"]["message"] == "SIGTERM"
    assert not (sweep / "2").exists()


def wait_until(process: subprocess.Popen[str] | None, condition: Callable[[], bool], seconds: float = 120) -> None:
    deadline = time.monotonic() + seconds
    while not condition():
        assert time.monotonic() < deadline, "timed out"
        assert process is None or process.poll() is None, process.communicate()
        time.sleep(0.1)
