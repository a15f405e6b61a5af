"""A sweep's failures: their file, their table, and on_error."""

from __future__ import annotations

import atexit
import dataclasses
import os
import pickle
from pathlib import Path
from typing import Any

import pytest
from hydra import compose, initialize_config_dir
from hydra.core.utils import JobReturn, JobStatus
from omegaconf import DictConfig, read_write

from ptq161.run.command_line import check_arguments
from ptq161.sweep.callbacks import SweepFailures
from ptq161.sweep.failures import FAILURES, FailedRunError, Failure, print_failures, read_failures, record_failure
from ptq161.sweep.overrides import own_overrides

CONF = Path(__file__).resolve().parents[2] / "conf"


def sweep_config(*overrides: str) -> DictConfig:
    with initialize_config_dir(str(CONF), version_base="1.3"):
        return compose("config", ["hydra.mode=MULTIRUN", *overrides], return_hydra_config=True)


def failure(job: int, **changes: Any) -> Failure:
    return dataclasses.replace(Failure(job, [f"seed={job}"], f"no {job}.", run_dir=str(job)), **changes)


def test_a_fixed_key_of_a_swept_group_does_not_tell_jobs_apart() -> None:
    typed = check_arguments(["-m", "method=rtn,gptq", "method.bits=3", "seed=1"])
    sweep = sweep_config()
    with read_write(sweep.hydra):
        sweep.hydra.overrides.task = typed[1:]
    assert own_overrides(["method=gptq", "method.bits=3", "seed=1"], sweep) == ["method=gptq"]


def test_failures_are_read_in_the_order_of_jobs_and_once_each(tmp_path: Path) -> None:
    for entry in (failure(3), failure(1), failure(3, sentence="the last one counts.")):
        record_failure(str(tmp_path), entry)
    assert read_failures(tmp_path) == [failure(1), failure(3, sentence="the last one counts.")]


def test_damaged_lines_are_left_out(tmp_path: Path) -> None:
    record_failure(str(tmp_path), failure(0))
    with (tmp_path / FAILURES).open("ab") as file:
        file.write(b'[]\n{"job": 1}\n\xff\n{"job": 2, "over')
    assert read_failures(tmp_path) == [failure(0)]
    assert read_failures(tmp_path / "none") == []


def test_the_table_names_what_the_jobs_do_not_share(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    config = sweep_config()
    config.hydra.overrides.task = ["tracker=none", "seed=0,1"]
    print_failures(str(tmp_path), config)
    assert capsys.readouterr().err == ""
    record_failure(str(tmp_path), failure(1, overrides=["tracker=none", "seed=1"], sentence="[bold]no."))
    print_failures(str(tmp_path), config)
    table = capsys.readouterr().err
    assert "1 failed" in table and "seed=1" in table and "[bold]no." in table and "tracker=none" not in table


def test_an_error_keeps_its_sentence_on_the_way_from_another_process() -> None:
    error = pickle.loads(pickle.dumps(failure(1).error()))
    assert isinstance(error, FailedRunError) and error.sentence == "no 1."


def test_a_sweep_begins_without_earlier_failures(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    registered: list[Any] = []
    monkeypatch.setattr(atexit, "register", lambda function, *arguments: registered.append((function, arguments[0])))
    record_failure(str(tmp_path), failure(1))
    SweepFailures().on_multirun_start(sweep_config(f"hydra.sweep.dir={tmp_path}"))
    assert list(tmp_path.iterdir()) == []
    assert registered == [(print_failures, str(tmp_path))]


@pytest.mark.parametrize(
    ("overrides", "sentence"),
    [
        (
            ["hydra/launcher=ray", "on_error=stop"],
            "on_error=stop: RayLauncher queues all jobs at once; use hydra/launch",
        ),
        (["hydra/launcher=submitit_local", "on_error=stop"], "on_error=stop: LocalLauncher queues all jobs at once"),
        (["hydra/launcher=local", "hydra.launcher._target_=hydra_plugins.x.Y"], "hydra_plugins.x.Y is not installed"),
    ],
)
def test_a_launcher_that_cannot_do_it_ends_the_sweep_before_it_begins(
    tmp_path: Path, overrides: list[str], sentence: str
) -> None:
    with pytest.raises(SystemExit) as caught:
        SweepFailures().on_multirun_start(sweep_config(f"hydra.sweep.dir={tmp_path}", *overrides))
    assert sentence in str(caught.value)


@pytest.mark.parametrize(
    ("on_error", "status", "ends"),
    [
        ("stop", JobStatus.FAILED, True),
        ("stop", JobStatus.COMPLETED, False),
        ("continue", JobStatus.FAILED, False),
    ],
)
def test_stop_ends_a_sweep_in_its_own_process(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, on_error: str, status: JobStatus, ends: bool
) -> None:
    monkeypatch.setattr(atexit, "register", lambda *arguments: None)
    config = sweep_config(f"hydra.sweep.dir={tmp_path}", f"on_error={on_error}")
    callback, result = SweepFailures(), JobReturn(status=status)
    callback.on_job_end(config, result)  # in the process of a job: the sweep's own sees to it
    callback.on_multirun_start(config)
    if ends:
        with pytest.raises(SystemExit, match="first failure"):
            callback.on_job_end(config, result)
    else:
        callback.on_job_end(config, result)
    monkeypatch.setattr(os, "getpid", lambda: 0)
    callback.on_job_end(config, result)
