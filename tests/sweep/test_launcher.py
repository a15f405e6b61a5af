"""The local launcher with tasks of a few milliseconds; tests/end_to_end/test_launchers.py runs the program."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
import threading
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
from hydra import compose, initialize_config_dir
from hydra.core.global_hydra import GlobalHydra
from hydra.core.hydra_config import HydraConfig
from hydra.core.utils import JobReturn, JobStatus, setup_globals
from hydra.types import HydraContext, TaskFunction
from omegaconf import DictConfig

from ptq161.errors import UserError
from ptq161.sweep import launcher
from ptq161.sweep.failures import FailedRunError, read_failures
from ptq161.sweep.launcher import Settings, Slot, Sweep, _plan_slots, _visible_gpus
from ptq161.tracking.interrupts import Interrupted, Interrupts

CONF = Path(__file__).resolve().parents[2] / "conf"
Launch = Callable[..., list[JobReturn]]


# What the jobs run: found by name in their processes, so each is a function of this module.


def describe(cfg: DictConfig) -> dict[str, Any]:
    hydra = HydraConfig.get()
    variables = [*launcher._THREAD_COUNTS, "CUDA_VISIBLE_DEVICES"]
    return {
        "seed": cfg.seed,
        "number": hydra.job.num,
        "id": hydra.job.id,
        "mode": hydra.mode.name,
        "overrides": list(hydra.overrides.task),
        "output_dir": hydra.runtime.output_dir,
        "sweep_dir": hydra.sweep.dir,
        "pid": os.getpid(),
        **{name: os.environ.get(name) for name in variables},
    }


def die_until(cfg: DictConfig) -> int:
    """Be killed in as many attempts as ``block_size`` says; return the number of the one that was not."""
    attempts = Path(HydraConfig.get().runtime.output_dir, "attempts")
    print(f"attempt of seed {cfg.seed}", flush=True)
    with attempts.open("a") as file:
        file.write("x")
    if len(attempts.read_text()) <= cfg.block_size:
        os.kill(os.getpid(), signal.SIGKILL)
    return len(attempts.read_text())


def fail_or_wait(cfg: DictConfig) -> None:
    if cfg.seed == 0:
        raise FailedRunError("Some failed.", "the seed is 0.")
    wait_for_signal(cfg)


def fail_at_zero(cfg: DictConfig) -> int:
    if cfg.seed == 0:
        raise FailedRunError("Some failed.", "the seed is 0.")
    return int(cfg.seed)


def leave(cfg: DictConfig) -> None:
    os._exit(3)


def wait_for_signal(cfg: DictConfig) -> None:
    folder = Path(HydraConfig.get().runtime.output_dir)
    with Interrupts().installed():
        try:
            (folder / "waiting").touch()
            time.sleep(60)
        except Interrupted as interrupt:
            (folder / "interrupted").write_text(interrupt.signal.name)
            raise


@pytest.fixture
def launch(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[Launch]:
    """Launch a task for several seeds; keywords are the launcher's settings."""
    monkeypatch.setattr(launcher, "_PRELOADED", (__name__,))
    setup_globals()
    with initialize_config_dir(str(CONF), version_base="1.3"):

        def run(task: TaskFunction, seeds: range, overrides: tuple[str, ...] = (), **settings: int) -> list[JobReturn]:
            typed = [f"hydra.sweep.dir={tmp_path}", "hydra.mode=MULTIRUN", *overrides]
            config = compose("config", typed, return_hydra_config=True)
            context = HydraContext(config_loader=GlobalHydra.instance().config_loader(), callbacks=None)
            sweep = Sweep.open(settings, context, task, config)
            return sweep.launch([[*overrides, f"seed={seed}"] for seed in seeds], 0)

        yield run


def test_a_job_sees_what_hydras_own_launcher_would_show_it(launch: Launch, tmp_path: Path) -> None:
    results = launch(describe, range(5, 8), slots=2, threads=3)
    assert [result.return_value["seed"] for result in results] == [5, 6, 7]
    for number, result in enumerate(results):
        seen = result.return_value
        assert (seen["number"], seen["id"], seen["mode"]) == (number, str(number), "MULTIRUN")
        assert seen["overrides"] == result.overrides == [f"seed={5 + number}"]
        assert (seen["output_dir"], seen["sweep_dir"]) == (str(tmp_path / str(number)), str(tmp_path))
        assert {seen[name] for name in launcher._THREAD_COUNTS} == {"3"}
        assert result.cfg is not None and result.cfg.seed == 5 + number
    pids = {result.return_value["pid"] for result in results}
    assert len(pids) == 3 and os.getpid() not in pids


def test_the_threads_of_this_process_stay_as_they_are(launch: Launch) -> None:
    before = dict(os.environ)
    launch(describe, range(1), threads=7)
    assert dict(os.environ) == before


def test_a_killed_job_is_begun_again_and_no_other_is_disturbed(launch: Launch, tmp_path: Path) -> None:
    results = launch(die_until, range(2), ("block_size=1",), slots=2)
    assert [result.return_value for result in results] == [2, 2]
    assert (tmp_path / "0" / "console.log").read_text() == "attempt of seed 0\n" * 2
    assert read_failures(tmp_path) == []


def test_a_job_that_is_killed_again_has_failed(
    launch: Launch, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    (result,) = launch(die_until, range(1), ("block_size=9",), retries=2)
    assert result.status == JobStatus.FAILED
    with pytest.raises(FailedRunError):
        _ = result.return_value
    assert (tmp_path / "0" / "attempts").read_text() == "xxx"
    (failure,) = read_failures(tmp_path)
    assert failure.sentence.startswith("killed by SIGKILL in attempt 3; ") and "console.log" in failure.sentence
    assert failure.sentence in capsys.readouterr().err


def test_a_process_that_ends_by_itself_is_not_begun_again(launch: Launch, tmp_path: Path) -> None:
    (result,) = launch(leave, range(1), retries=5)
    assert result.status == JobStatus.FAILED
    (failure,) = read_failures(tmp_path)
    assert "status 3" in failure.sentence and "attempt" not in failure.sentence


def test_a_failure_is_printed_and_the_others_run(launch: Launch, capsys: pytest.CaptureFixture[str]) -> None:
    failed, *finished = launch(fail_at_zero, range(3))
    assert failed.status == JobStatus.FAILED
    assert [result.return_value for result in finished] == [1, 2]
    assert "Job 0 (seed=0) failed: the seed is 0." in capsys.readouterr().err


def test_stop_ends_what_runs_and_begins_nothing_more(launch: Launch, tmp_path: Path) -> None:
    with pytest.raises(SystemExit, match="on_error=stop"):
        launch(fail_or_wait, range(9), ("on_error=stop",), slots=2)
    assert not (tmp_path / "2").exists()
    if (tmp_path / "1" / "waiting").exists():
        assert (tmp_path / "1" / "interrupted").read_text() == "SIGTERM"


@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGTERM])
def test_a_signal_ends_the_jobs_before_the_sweep(launch: Launch, tmp_path: Path, number: signal.Signals) -> None:
    def send() -> None:
        deadline = time.monotonic() + 60
        while len(list(tmp_path.glob("*/waiting"))) < 2 and time.monotonic() < deadline:
            time.sleep(0.05)
        os.kill(os.getpid(), number)

    threading.Thread(target=send).start()
    with pytest.raises(Interrupted) as caught:
        launch(wait_for_signal, range(4), slots=2)
    assert caught.value.signal == number
    assert [path.read_text() for path in tmp_path.glob("*/interrupted")] == ["SIGTERM"] * 2
    assert not (tmp_path / "2").exists()


@pytest.mark.parametrize(
    ("settings", "gpus", "expected"),
    [
        ({}, [], [None]),
        ({"slots": 3}, [], [None] * 3),
        ({}, ["0", "1"], ["0", "1"]),
        ({"gpus_per_job": 2}, ["0", "1", "2", "3", "4"], ["0,1", "2,3"]),
        ({"slots": 3}, ["4", "GPU-ab"], ["4", "GPU-ab", "4"]),
        ({"slots": 1}, ["0", "1"], ["0"]),
        ({"slots": 2, "gpus_per_job": 0}, ["0"], ["", ""]),
    ],
)
def test_slots(settings: dict[str, int], gpus: list[str], expected: list[str | None]) -> None:
    assert _plan_slots(Settings(**settings), gpus) == [Slot(gpus) for gpus in expected]


def test_a_job_sees_the_gpus_of_its_slot(launch: Launch, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(launcher, "_visible_gpus", lambda: ["4", "7"])
    results = launch(describe, range(4))
    assert {result.return_value["CUDA_VISIBLE_DEVICES"] for result in results} == {"4", "7"}


@pytest.mark.parametrize(
    ("variable", "count", "expected"),
    [(None, 2, ["0", "1"]), ("3,5", 2, ["3", "5"]), ("", 0, []), (None, 0, []), ("GPU-ab", 1, ["GPU-ab"])],
)
def test_the_gpus_of_this_process_are_divided(
    monkeypatch: pytest.MonkeyPatch, variable: str | None, count: int, expected: list[str]
) -> None:
    monkeypatch.setattr("torch.cuda.device_count", lambda: count)
    monkeypatch.delenv("CUDA_VISIBLE_DEVICES", raising=False)
    if variable is not None:
        monkeypatch.setenv("CUDA_VISIBLE_DEVICES", variable)
    assert _visible_gpus() == expected


@pytest.mark.parametrize(
    ("settings", "gpus", "sentence"),
    [
        ({"slots": 0}, [], "hydra.launcher.slots=0: use at least 1."),
        ({"threads": 0}, [], "hydra.launcher.threads=0: use at least 1."),
        ({"retries": -1}, [], "hydra.launcher.retries=-1: use at least 0."),
        ({"gpus_per_job": -1}, [], "hydra.launcher.gpus_per_job=-1: use at least 0."),
        ({"gpus_per_job": 3}, ["0", "1"], "hydra.launcher.gpus_per_job=3: this machine has 2 GPUs"),
    ],
)
def test_one_sentence_names_the_setting(settings: dict[str, int], gpus: list[str], sentence: str) -> None:
    with pytest.raises(UserError) as caught:
        _plan_slots(Settings(**settings), gpus)
    assert str(caught.value).startswith(sentence)


def test_hydra_sees_a_wrong_setting_as_one_sentence(launch: Launch) -> None:
    with pytest.raises(FailedRunError, match=r"^hydra.launcher.slots='two': use a value of type int or null.$"):
        launch(describe, range(1), slots="two")


def test_what_the_fork_server_imports_can_be_forked() -> None:
    """It asks for no GPU, as CUDA is lost in a fork, and has no thread but those whose libraries expect a fork.

    OpenBLAS (of numpy and scipy; one thread here, so none beside the main one) and jemalloc (of pyarrow) do.
    """
    program = f"""
import threading
from pathlib import Path
import torch

def refuse(*args):
    raise SystemExit("CUDA was initialized")

for name in ("is_available", "device_count", "init", "_lazy_init"):
    setattr(torch.cuda, name, refuse)
for name in {launcher._PRELOADED}:
    __import__(name)
threads = [path.read_text().strip() for path in Path("/proc/self/task").glob("*/comm")]
print(threading.active_count(), len([name for name in threads if name != "jemalloc_bg_thd"]))
"""
    environment = os.environ | dict.fromkeys(launcher._THREAD_COUNTS, "1")
    done = subprocess.run([sys.executable, "-c", program], capture_output=True, text=True, env=environment)
    assert (done.returncode, done.stdout) == (0, "1 1\n"), done.stderr
