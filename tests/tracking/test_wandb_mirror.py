"""The W&B mirror, read back from the offline files that W&B itself wrote."""

from __future__ import annotations

import logging
import os
import signal
import socket
import subprocess
import sys
import threading
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import psutil
import pytest
import wandb

from ptq161.tracking import wandb_mirror as mirror
from ptq161.tracking.read import read_run
from ptq161.tracking.settings import TrackerConfig
from tests.tracking.conftest import OpenRecord
from tests.tracking.wandb_file import read_wandb_file

TRACKER = TrackerConfig("wandb", project="p", tags=["own"])
RESULTS = {
    "metrics": {"ppl/boolq@512": 30.5, "bits_per_weight": 1.61, "odd": float("inf")},
    "full_precision": {"ppl/boolq@512": 20.0},
}


@pytest.mark.parametrize(
    ("name", "where", "expected"),
    [
        ("loss", {"block": 3, "epoch": 0}, ("loss/block_03", "epoch")),
        ("seconds", {"block": 3}, ("seconds", "block")),
        ("output_error", {"block": 3, "linear": "3.self_attn.q_proj"}, ("output_error/self_attn/q_proj", "block")),
        ("peak", {}, ("peak", None)),
        ("x", {"stage": "eval"}, ("x/stage_eval", None)),
    ],
)
def test_charts(name: str, where: dict[str, int | str], expected: tuple[str, str | None]) -> None:
    assert mirror._chart(name, where) == expected


def test_plain_names_are_plain_and_never_collide() -> None:
    names = ["a/b", "a_b", "a.b", "bits", "1x/ä"]
    plain = mirror._plain_names(names)
    assert plain == {"a/b": "a_b_2", "a.b": "a_b_3", "1x/ä": "_1x__"}


def test_two_runs_in_one_process_are_two_whole_wandb_runs(
    tmp_path: Path, open_record: OpenRecord, caplog: pytest.LogCaptureFixture, capfd: pytest.CaptureFixture[str]
) -> None:
    caplog.set_level(logging.INFO)
    hooks = (sys.excepthook, sys.exit, threading.active_count())
    ids = []
    for job in ("first", "second"):
        folder = tmp_path / job
        with open_record(folder, tracker=TRACKER, job_name=job, group="sweep", tags=["t", "own"]) as record:
            for epoch in range(3):
                record.metric("loss", 1 / (epoch + 1), block=2, epoch=epoch)
            record.metric("output_error", float("nan"), block=2, linear="2.mlp.up_proj")
            record.sample("greedy", "Paris")
            record.finish(RESULTS)
        seen = read_wandb_file(folder)
        ids.append(seen.run.run_id)
        assert (seen.run.display_name, seen.run.run_group, seen.run.project) == (job, "sweep", "p")
        assert sorted(seen.run.tags) == ["own", "t"]
        assert seen.config["mask_ratio"] == 0.2 and seen.config["eval"] == {"corpora": ["boolq"]}
        losses = [(row["epoch"], row["loss/block_02"]) for row in seen.history if "loss/block_02" in row]
        assert losses == [(0, 1.0), (1, 0.5), (2, 1 / 3)]
        assert any("output_error/mlp/up_proj" in row and row["block"] == 2 for row in seen.history)
        assert seen.axes == {"loss/block_02": "epoch", "output_error/mlp/up_proj": "block"}
        assert seen.summary["ppl/boolq@512"] == seen.summary["ppl_boolq_512"] == 30.5
        assert seen.summary["full_precision_ppl_boolq_512"] == 20.0
        assert seen.summary["bits_per_weight"] == 1.61
        assert seen.summary["sample/greedy"] == "Paris"
        assert (seen.summary["exit_state"], seen.exit_code) == ("finished", 0)
        assert {"manifest.json", "results.json", "run.log"} <= set(seen.files)
    assert ids[0] != ids[1]
    assert (sys.excepthook, sys.exit, threading.active_count()) == hooks
    messages = [entry.getMessage() for entry in caplog.records if entry.name.startswith("ptq161")]
    assert ["offline" in line for line in messages] == [True, True]
    assert capfd.readouterr() == ("", "")


def test_a_failure_reaches_wandb_with_its_exception(tmp_path: Path, open_record: OpenRecord) -> None:
    with pytest.raises(RuntimeError), open_record(tracker=TRACKER):
        raise RuntimeError("no luck")
    seen = read_wandb_file(tmp_path / "run")
    assert (seen.exit_code, seen.summary["exit_state"]) == (1, "failed")
    assert seen.summary["exception"] == "RuntimeError: no luck"


PROGRAM = """
import sys, time
from ptq161.tracking.settings import TrackerConfig
from ptq161.tracking.interrupts import Interrupted
from ptq161.tracking.record import RunRecord
try:
    with RunRecord.open(sys.argv[1], config={}, tracker=TrackerConfig("wandb"), seeds={}, job_name="j") as record:
        record.metric("loss", 1.0, block=0, epoch=0)
        print("ready", flush=True)
        time.sleep(60)
except Interrupted as interrupt:
    sys.exit(interrupt.exit_code)
"""


@pytest.mark.slow
def test_a_killed_process_closes_its_record(tmp_path: Path) -> None:
    processes = {
        number: subprocess.Popen(
            [sys.executable, "-c", PROGRAM, str(tmp_path / number.name)],
            stdout=subprocess.PIPE,
            stderr=subprocess.PIPE,
            text=True,
            start_new_session=True,
        )
        for number in (signal.SIGINT, signal.SIGTERM)
    }
    for number, process in processes.items():
        assert process.stdout is not None and process.stdout.readline() == "ready\n"
        os.killpg(process.pid, number)  # the whole group, W&B's service included, as Ctrl-C in a terminal does
    for number, process in processes.items():
        _, errors = process.communicate(timeout=30)
        assert process.returncode == 128 + number, errors
        assert "Traceback" not in errors
        run = read_run(tmp_path / number.name)
        assert run.manifest["exit_state"] == "interrupted"
        assert run.manifest["exception"] == {"type": "Interrupted", "message": number.name}
        assert len(run.metrics) == 1
        seen = read_wandb_file(tmp_path / number.name)
        assert (seen.exit_code, seen.summary["exit_state"]) == (128 + number, "interrupted")


def warnings_in(caplog: pytest.LogCaptureFixture) -> list[str]:
    ours = (entry for entry in caplog.records if entry.name.startswith("ptq161"))
    return [entry.getMessage() for entry in ours if entry.levelno >= logging.WARNING]


def broken(*_: object, **__: object) -> Any:
    raise RuntimeError("W&B is\nbroken")


def break_init(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(wandb, "init", broken)


def break_log(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(wandb.Run, "log", broken)


def break_finish(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(wandb.Run, "finish", broken)


def break_service(monkeypatch: pytest.MonkeyPatch) -> None:
    wandb.teardown()
    monkeypatch.setattr("wandb.sdk.lib.service.service_process.get_core_path", lambda: "/nonexistent/wandb-core")


def break_import(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "wandb", None)


@pytest.mark.parametrize("damage", [break_init, break_log, break_finish, break_service, break_import])
def test_a_broken_wandb_costs_one_line(
    tmp_path: Path,
    open_record: OpenRecord,
    monkeypatch: pytest.MonkeyPatch,
    caplog: pytest.LogCaptureFixture,
    capfd: pytest.CaptureFixture[str],
    damage: Callable[[pytest.MonkeyPatch], None],
) -> None:
    damage(monkeypatch)
    with open_record(tracker=TrackerConfig("wandb", mode="offline")) as record:
        for epoch in range(3):
            record.metric("loss", 1.0, block=0, epoch=epoch)
        record.finish(RESULTS)
    warnings = warnings_in(caplog)
    assert len(warnings) == 1 and "\n" not in warnings[0] and "W&B failed to" in warnings[0]
    run = read_run(tmp_path / "run")
    assert run.manifest["exit_state"] == "finished" and len(run.metrics) == 3
    assert (tmp_path / "run" / "run.log").read_text().count("\n") == 1
    assert capfd.readouterr() == ("", "")


def services() -> list[psutil.Process]:
    return [child for child in psutil.Process().children(recursive=True) if child.name() == "wandb-core"]


def test_a_frozen_service_costs_one_line_and_some_seconds(
    tmp_path: Path, open_record: OpenRecord, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    for name in ("_FINISH_TIMEOUT_SECONDS", "_GRACE_SECONDS"):
        monkeypatch.setattr(mirror, name, 0.5)
    with open_record(tracker=TRACKER) as record:
        (service,) = services()
        service.suspend()
        record.metric("loss", 1.0)
        record.finish(RESULTS)
    service.kill()
    assert len(warnings_in(caplog)) == 1
    assert read_run(tmp_path / "run").manifest["exit_state"] == "finished"


def test_a_dead_service_costs_one_line(
    tmp_path: Path, open_record: OpenRecord, caplog: pytest.LogCaptureFixture
) -> None:
    with open_record(tracker=TRACKER) as record:
        for child in services():
            child.kill()
            child.wait(5)
        for epoch in range(50):
            record.metric("loss", 1.0, block=0, epoch=epoch)
            time.sleep(0.001)
        record.finish(RESULTS)
    assert len(warnings_in(caplog)) == 1
    assert len(read_run(tmp_path / "run").metrics) == 50


def test_a_server_that_never_answers_costs_one_line(
    tmp_path: Path, open_record: OpenRecord, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    with socket.create_server(("127.0.0.1", 0)) as server:
        monkeypatch.setenv("WANDB_BASE_URL", f"http://127.0.0.1:{server.getsockname()[1]}")
        monkeypatch.setenv("WANDB_API_KEY", "a" * 40)
        monkeypatch.setattr(mirror, "_INIT_TIMEOUT_SECONDS", 1)
        with open_record(tracker=TRACKER) as record:
            record.finish(RESULTS)
    assert len(warnings_in(caplog)) == 1
    assert read_run(tmp_path / "run").manifest["exit_state"] == "finished"


def test_a_file_in_the_place_of_wandbs_folder_costs_one_line(
    tmp_path: Path, open_record: OpenRecord, caplog: pytest.LogCaptureFixture
) -> None:
    (tmp_path / "run").mkdir()
    (tmp_path / "run" / "wandb").write_text("")
    with open_record(tracker=TRACKER) as record:
        record.metric("loss", 1.0)
        record.finish(RESULTS)
    assert len(warnings_in(caplog)) == 1
    assert read_run(tmp_path / "run").manifest["exit_state"] == "finished"
