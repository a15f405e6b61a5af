"""The files of a run directory and the states in which a run ends."""

from __future__ import annotations

import errno
import io
import json
import logging
import math
import os
import signal
import subprocess
import sys
import threading
from datetime import datetime
from pathlib import Path

import pytest

from ptq161.errors import UserError
from ptq161.tracking.environment import _PACKAGES, _git_state
from ptq161.tracking.interrupts import Interrupted
from ptq161.tracking.read import read_run
from tests.tracking.conftest import OpenRecord

RESULTS = {
    "metrics": {"ppl/boolq@512": 30.5, "bits_per_weight": 1.61, "nominal_bits_per_weight": 1.6, "checkpoint_bytes": 9},
    "full_precision": {"ppl/boolq@512": 20.0},
    "protocol": {"ppl/boolq@512": {"seq_len": 512}},
}


def test_a_finished_run_holds_everything(tmp_path: Path, open_record: OpenRecord) -> None:
    with open_record(group="sweep", tags=["t"]) as record:
        assert read_run(tmp_path / "run").manifest["exit_state"] == "running"
        record.describe(model_sha256="m", calibration_sha256="c")
        record.metric("loss", 0.5, block=3, epoch=0)
        record.metric("output_error", math.nan, block=3, linear="3.mlp.up_proj")
        assert len(read_run(tmp_path / "run").metrics) == 2  # every line is there as it arises
        record.sample("greedy", 'Paris é ,\n"quoted"')
        record.finish(RESULTS)
    run = read_run(tmp_path / "run")
    assert run.problems == []
    assert run.config == {"mask_ratio": 0.2, "eval": {"corpora": ["boolq"]}}
    assert run.results == {"schema_version": 1, **RESULTS}
    assert run.samples[0]["text"] == 'Paris é ,\n"quoted"'
    assert {k: v for k, v in run.metrics[0].items() if k != "time"} == {
        "name": "loss",
        "value": 0.5,
        "block": 3,
        "epoch": 0,
    }
    assert math.isnan(run.metrics[1]["value"])
    assert not (tmp_path / "run" / "wandb").exists()


def test_the_manifest_says_what_ran_where(tmp_path: Path, open_record: OpenRecord) -> None:
    with open_record(group="sweep", tags=["t"]) as record:
        record.describe(model_sha256="m")
        record.describe(calibration_sha256="c")
        record.finish(RESULTS)
    manifest = json.loads((tmp_path / "run" / "manifest.json").read_text())
    assert manifest["schema_version"] == 1
    assert (manifest["exit_state"], manifest["exception"]) == ("finished", None)
    assert (manifest["model_sha256"], manifest["calibration_sha256"]) == ("m", "c")
    assert (manifest["seeds"], manifest["group"], manifest["tags"]) == ({"run": 7}, "sweep", ["t"])
    start, end = (datetime.fromisoformat(manifest[key]) for key in ("start", "end"))
    assert start.utcoffset() is not None and start <= end
    assert manifest["duration_seconds"] == pytest.approx((end - start).total_seconds(), abs=0.5)
    assert set(manifest["versions"]) == {"python", "c++", *_PACKAGES} and None not in manifest["versions"].values()
    assert manifest["threads"]["torch"] >= 1 and manifest["hardware"]["ram_bytes"] > 2**28
    assert manifest["command"][0] == sys.executable


def test_git_state_belongs_to_the_checkout_that_tracks_the_file(tmp_path: Path) -> None:
    def git(*arguments: str) -> str:
        identity = ["-c", "user.name=t", "-c", "user.email=t@example.org"]
        return subprocess.run(
            ["git", "-C", str(tmp_path), *identity, *arguments], check=True, capture_output=True, text=True
        ).stdout.strip()

    source = tmp_path / "a.py"
    source.write_text("")
    assert _git_state(source) is None
    git("init", "-q")
    assert _git_state(source) is None
    git("add", "a.py")
    git("commit", "-qm", "x")
    assert _git_state(source) == {"commit": git("rev-parse", "HEAD"), "dirty": False}
    source.write_text("x")
    assert _git_state(source) == {"commit": git("rev-parse", "HEAD"), "dirty": True}
    (tmp_path / "installed.py").write_text("")
    assert _git_state(tmp_path / "installed.py") is None


def test_a_failure_is_recorded_and_its_traceback_logged_in_the_file_only(
    tmp_path: Path, open_record: OpenRecord, capsys: pytest.CaptureFixture[str]
) -> None:
    with pytest.raises(UserError), open_record():
        logging.getLogger("ptq161.run.pipeline").info("working")
        raise UserError("mask_ratio=2: use less.")
    manifest = read_run(tmp_path / "run").manifest
    assert manifest["exit_state"] == "failed"
    assert manifest["exception"] == {"type": "UserError", "message": "mask_ratio=2: use less."}
    log = (tmp_path / "run" / "run.log").read_text()
    assert "working" in log and "Traceback" in log and "mask_ratio=2: use less." in log
    assert capsys.readouterr() == ("", "")


def test_a_run_without_results_has_failed(tmp_path: Path, open_record: OpenRecord) -> None:
    with open_record():
        pass
    manifest = read_run(tmp_path / "run").manifest
    assert (manifest["exit_state"], manifest["exception"]["type"]) == ("failed", "NoResults")


def test_an_exception_after_the_results_is_a_failure(tmp_path: Path, open_record: OpenRecord) -> None:
    with pytest.raises(RuntimeError), open_record() as record:
        record.finish(RESULTS)
        raise RuntimeError("late")
    assert read_run(tmp_path / "run").manifest["exit_state"] == "failed"


@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGTERM])
def test_a_signal_interrupts_and_the_handlers_come_back(
    tmp_path: Path, open_record: OpenRecord, number: signal.Signals
) -> None:
    before = signal.getsignal(number)
    with pytest.raises(Interrupted) as caught, open_record():
        signal.raise_signal(number)
    assert caught.value.exit_code == 128 + number
    assert signal.getsignal(number) is before
    manifest = read_run(tmp_path / "run").manifest
    assert (manifest["exit_state"], manifest["exception"]["message"]) == ("interrupted", number.name)


def test_a_signal_while_the_manifest_is_written_waits(
    tmp_path: Path, open_record: OpenRecord, monkeypatch: pytest.MonkeyPatch
) -> None:
    original = os.replace

    def replace(source: str, target: Path) -> None:
        if "duration" in str(source) or '"end": null' not in Path(source).read_text():
            signal.raise_signal(signal.SIGINT)
        original(source, target)

    with pytest.raises(Interrupted), open_record() as record:
        record.finish(RESULTS)
        monkeypatch.setattr(os, "replace", replace)
    assert read_run(tmp_path / "run").manifest["exit_state"] == "finished"


def test_records_open_outside_the_main_thread(tmp_path: Path, open_record: OpenRecord) -> None:
    def work() -> None:
        with open_record() as record:
            record.finish(RESULTS)

    thread = threading.Thread(target=work)
    thread.start()
    thread.join()
    assert read_run(tmp_path / "run").manifest["exit_state"] == "finished"


def test_nothing_stays_behind_between_runs(tmp_path: Path, open_record: OpenRecord) -> None:
    root, package = logging.getLogger(), logging.getLogger("ptq161")
    before = (list(root.handlers), package.level, threading.active_count())
    for name in ("a", "b"):
        with open_record(tmp_path / name) as record:
            package.info("only %s", name)
            record.finish(RESULTS)
    assert (list(root.handlers), package.level, threading.active_count()) == before
    assert "only b" not in (tmp_path / "a" / "run.log").read_text()
    assert "only b" in (tmp_path / "b" / "run.log").read_text()


def test_a_second_run_in_the_same_directory_does_not_show_old_results(tmp_path: Path, open_record: OpenRecord) -> None:
    with open_record() as record:
        record.metric("loss", 1.0)
        record.sample("greedy", "x")
        record.finish(RESULTS)
    with open_record():
        pass
    run = read_run(tmp_path / "run")
    assert (run.results, run.metrics, run.samples) == (None, [], [])


def test_unwritable_run_directory_is_a_user_error(tmp_path: Path, open_record: OpenRecord) -> None:
    (tmp_path / "file").write_text("")
    with pytest.raises(UserError, match=r"hydra\.run\.dir"), open_record(tmp_path / "file" / "run"):
        pass


def test_a_full_disk_ends_the_run_with_one_sentence(
    tmp_path: Path, open_record: OpenRecord, monkeypatch: pytest.MonkeyPatch
) -> None:
    def full(*_: object) -> None:
        raise OSError(errno.ENOSPC, "No space left on device")

    with pytest.raises(UserError, match=r"results\.json .*disk is full"), open_record() as record:
        record.metric("loss", 1.0)
        monkeypatch.setattr(os, "fsync", full)
        record.finish(RESULTS)
    run = read_run(tmp_path / "run")
    assert len(run.metrics) == 1 and run.results is None


def test_metrics_on_a_full_disk(tmp_path: Path, open_record: OpenRecord, monkeypatch: pytest.MonkeyPatch) -> None:
    class FullDisk(io.StringIO):
        def flush(self) -> None:
            raise OSError(errno.ENOSPC, "No space left on device")

    with pytest.raises(UserError, match=r"metrics\.jsonl .*disk is full"), open_record() as record:
        monkeypatch.setattr(record, "_metrics", FullDisk())
        record.metric("loss", 1.0)
    assert read_run(tmp_path / "run").manifest["exit_state"] == "failed"


def test_a_metric_cannot_overwrite_its_own_line(open_record: OpenRecord) -> None:
    with pytest.raises(ValueError, match="time"), open_record() as record:
        record.metric("loss", 1.0, time=3)
