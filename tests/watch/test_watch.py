"""The terminal's view of a sweep, on records written by hand."""

from __future__ import annotations

import copy
import io
import os
import platform
import subprocess
import sys
import threading
import time
from datetime import UTC, datetime, timedelta
from pathlib import Path
from typing import Any

import pytest
from hydra import compose, initialize_config_dir
from omegaconf import OmegaConf
from rich.console import Console

from ptq161.files.strict_json import encode_json
from ptq161.sweep.failures import Failure, record_failure
from ptq161.tracking.layout import SCHEMA_VERSION
from ptq161.watch import __main__ as watch
from ptq161.watch import snapshot as snapshots
from ptq161.watch.__main__ import main
from ptq161.watch.snapshot import Row, read_snapshot

CONF = Path(__file__).resolve().parents[2] / "conf"
LOSS = {"time": 1.0, "name": "loss", "value": 0.125, "block": 3, "epoch": 1}


def write_run(folder: Path, state: str = "finished", **manifest: Any) -> Path:
    """A record that began half a minute ago, in this process."""
    folder.mkdir(parents=True)
    document = {
        "schema_version": SCHEMA_VERSION,
        "exit_state": state,
        "exception": None,
        "start": (datetime.now(UTC) - timedelta(seconds=30)).isoformat(),
        "duration_seconds": None if state == "running" else 3725.0,
        "job_name": f"{folder.name}: seed=7",
        "pid": os.getpid(),
        "hardware": {"host": platform.node()},
        **manifest,
    }
    (folder / "manifest.json").write_text(encode_json(document))
    (folder / "config.yaml").write_text("seed: 7\n")
    if state == "finished":
        metrics = {"ppl/boolq@512": 398.61, "ppl/lambada@512": 719.94, "bits_per_weight": 1.7}
        (folder / "results.json").write_text(encode_json({"schema_version": SCHEMA_VERSION, "metrics": metrics}))
    return folder


def write_metrics(folder: Path, *lines: dict[str, Any], rest: str = "") -> None:
    (folder / "metrics.jsonl").write_text("".join(encode_json(line) + "\n" for line in lines) + rest)


def write_sweep(folder: Path, *overrides: str) -> None:
    folder.mkdir(parents=True, exist_ok=True)
    with initialize_config_dir(str(CONF), version_base="1.3"):
        config = compose("config", ["hydra.mode=MULTIRUN"], return_hydra_config=True)
    config.hydra.overrides.task = list(overrides)
    OmegaConf.save(config, folder / "multirun.yaml")


def only_row(folder: Path) -> Row:
    (row,) = read_snapshot(folder).rows
    return row


def dead_process() -> int:
    process = subprocess.Popen([sys.executable, "-c", ""])
    process.wait()
    return process.pid


def test_a_finished_run_shows_its_perplexities(tmp_path: Path) -> None:
    row = only_row(write_run(tmp_path / "run"))
    assert (row.job, row.label, row.state, row.seconds) == ("run", "run: seed=7", "finished", 3725.0)
    assert row.outcome == "ppl/boolq@512 398.6, ppl/lambada@512 719.9"


def test_a_failed_run_says_why(tmp_path: Path) -> None:
    write_run(tmp_path / "0", "failed", exception={"type": "UserError", "message": "the disk is full."})
    row = only_row(tmp_path)
    assert (row.job, row.state, row.outcome) == ("0", "failed", "the disk is full.")


@pytest.mark.parametrize(
    ("line", "progress"),
    [
        (LOSS, "block 3, epoch 1"),
        ({"name": "output_error", "value": 1.0, "linear": "12.self_attn.q_proj"}, "block 12"),
        ({"name": "seconds", "value": 1.0, "block": 4}, "block 4"),
        ({"name": "preprocess_lr", "value": 1.0, "round": 0, "step": 7}, "preprocess: step 7"),
        ({"name": "finetune_held_out_loss", "value": 1.0, "step": 7}, "finetune: step 7"),
        ({"name": "preprocess_quantize_seconds", "value": 1.0, "round": 0, "block": 4}, "preprocess: block 4"),
        ({"name": "ppl/boolq@512", "value": 1.0, "model": "full precision"}, "full precision: ppl/boolq@512"),
        ({"name": "steps", "value": 1.0}, "steps"),
    ],
)
@pytest.mark.parametrize("rest", ["", '{"time": 2.0, "name": "lo', "\n\xff\n[1]\nnull\n"])
def test_a_running_one_shows_where_it_is(tmp_path: Path, line: dict[str, Any], progress: str, rest: str) -> None:
    write_metrics(write_run(tmp_path / "0", "running"), LOSS, line, rest=rest)
    row = only_row(tmp_path)
    assert (row.state, row.progress, row.loss) == ("running", progress, 0.125)
    assert row.seconds == pytest.approx(30, abs=20)


def test_of_many_numbers_only_the_last_are_read(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(snapshots, "_TAIL_BYTES", 150)
    write_metrics(write_run(tmp_path / "0", "running"), *({**LOSS, "block": i} for i in range(9)))
    assert only_row(tmp_path).progress == "block 8, epoch 1"


def test_blocks_are_shown_with_their_number(tmp_path: Path) -> None:
    write_metrics(write_run(tmp_path / "0", "running", n_blocks=30), LOSS)
    assert only_row(tmp_path).progress == "block 3 of 30, epoch 1"


@pytest.mark.parametrize("group", ["preprocess", "finetune"])
def test_the_loss_of_a_training_is_shown(tmp_path: Path, group: str) -> None:
    line = {"time": 1.0, "name": f"{group}_loss", "value": 5.5, "round": 0, "step": 3}
    write_metrics(write_run(tmp_path / "0", "running"), LOSS, line)
    assert (only_row(tmp_path).progress, only_row(tmp_path).loss) == (f"{group}: step 3", 5.5)


def test_a_run_without_numbers_is_loading(tmp_path: Path) -> None:
    write_run(tmp_path / "0", "running")
    assert (only_row(tmp_path).progress, only_row(tmp_path).loss) == ("loading", None)


def test_a_loss_that_is_not_finite_is_shown(tmp_path: Path) -> None:
    write_metrics(write_run(tmp_path / "0", "running"), {**LOSS, "value": float("nan")})
    assert str(only_row(tmp_path).loss) == "nan"


def test_a_run_whose_process_has_gone_is_lost(tmp_path: Path) -> None:
    write_run(tmp_path / "0", "running", pid=dead_process())
    assert only_row(tmp_path).state == "lost"


def test_a_later_process_of_the_same_number_is_not_the_run(tmp_path: Path) -> None:
    write_run(tmp_path / "0", "running", start="2020-01-01T00:00:00+00:00")
    assert only_row(tmp_path).state == "lost"


def test_nothing_is_known_of_another_machines_processes(tmp_path: Path) -> None:
    write_run(tmp_path / "0", "running", pid=dead_process(), hardware={"host": "another"})
    assert only_row(tmp_path).state == "running"


def test_a_manifest_that_says_little_is_shown_all_the_same(tmp_path: Path) -> None:
    write_run(tmp_path / "0", "running", pid=None, hardware=None, start=None, job_name=None)
    assert only_row(tmp_path) == Row("0", "", "running", "loading")


def test_a_sweep_shows_the_jobs_that_have_not_begun(tmp_path: Path) -> None:
    write_sweep(tmp_path, "tracker=none", "eval.corpora=[boolq, lambada]", "cache=false", "mask_ratio=0.1,0.2,0.3,0.4")
    write_run(tmp_path / "0")
    (tmp_path / "1" / ".hydra").mkdir(parents=True)
    record_failure(str(tmp_path), Failure(2, ["mask_ratio=0.3"], "it is too large.", str(tmp_path / "2")))
    (tmp_path / "2" / ".hydra").mkdir(parents=True)
    found = [(row.job, row.label, row.state) for row in read_snapshot(tmp_path).rows]
    states = ("finished", "starting", "failed", "waiting")
    assert found == [(str(i), f"mask_ratio=0.{i + 1}", state) for i, state in enumerate(states)]
    assert read_snapshot(tmp_path).rows[2].outcome == "it is too large."
    assert not read_snapshot(tmp_path).ended


def test_several_sweeps_below_a_folder(tmp_path: Path) -> None:
    for name in ("a", "b"):
        write_sweep(tmp_path / name, "seed=range(11)")
    write_run(tmp_path / "b" / "10")
    rows = read_snapshot(tmp_path).rows
    assert [row.job for row in rows] == [f"{name}/{i}" for name in ("a", "b") for i in range(11)]
    assert (rows[-1].state, rows[-1].label) == ("finished", "seed=10")


def test_jobs_in_directories_of_other_names(tmp_path: Path) -> None:
    write_sweep(tmp_path, "seed=range(4)")
    for number in (0, 1):
        write_run(tmp_path / f"seed={number}" / "run", sweep={"dir": "moved", "job": number})
    (tmp_path / "seed=2" / ".hydra").mkdir(parents=True)
    (tmp_path / "seed=2" / ".hydra" / "hydra.yaml").write_text("hydra: {job: {num: 2}, run: {dir: '${now:%Y}'}}\n")
    found = {row.label: (row.job, row.state) for row in read_snapshot(tmp_path).rows}
    assert found == {
        "seed=0": ("seed=0/run", "finished"),
        "seed=1": ("seed=1/run", "finished"),
        "seed=2": ("seed=2", "starting"),
        "seed=3": ("3", "waiting"),
    }


@pytest.mark.parametrize("content", ["", "a: [", "- 1", "hydra: {sweeper: 3}", "x: 1\n", "\0"])
def test_a_damaged_sweep_file_hides_no_run(tmp_path: Path, content: str) -> None:
    write_run(tmp_path / "0")
    (tmp_path / "multirun.yaml").write_text(content)
    assert only_row(tmp_path).state == "finished"


@pytest.mark.parametrize("content", ["", '{"exit_', "[]", '{"schema_version": 99}', '{"schema_version": 1}', "\xff"])
def test_a_foreign_folder_is_skipped_with_a_sentence(
    tmp_path: Path, capsys: pytest.CaptureFixture[str], content: str
) -> None:
    write_run(tmp_path / "0")
    (tmp_path / "1").mkdir()
    (tmp_path / "1" / "manifest.json").write_text(content, encoding="latin-1")
    (tmp_path / "2" / "data").mkdir(parents=True)
    shot = read_snapshot(tmp_path)
    assert [row.job for row in shot.rows] == ["0"]
    (problem,) = shot.problems
    assert problem.startswith(f"{tmp_path / '1'} is skipped: ")
    assert main([str(tmp_path), "--once"]) == 0
    assert "is skipped" in " ".join(capsys.readouterr().out.split())  # lines break where the path's length says


def test_once_prints_every_run(
    tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("COLUMNS", "160")
    write_sweep(tmp_path, "eval.corpora=[boolq],[lambada]")
    write_run(tmp_path / "0")
    assert main([str(tmp_path), "--once"]) == 0
    printed = capsys.readouterr().out
    assert "2 runs: 1 waiting, 1 finished" in printed
    assert "1:02:05" in printed and "[lambada]" in printed


def test_an_empty_folder_and_none(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert main([str(tmp_path)]) == 0
    assert "0 runs: none yet" in capsys.readouterr().out
    assert main([str(tmp_path / "none")]) == 1
    sentence = f"{tmp_path / 'none'} is not a folder: give the directory of a sweep or of a run.\n"
    assert capsys.readouterr().err == sentence


@pytest.mark.parametrize("every", ["0", "-1", "nan", "inf", "1e300"])
def test_an_impossible_interval(tmp_path: Path, capsys: pytest.CaptureFixture[str], every: str) -> None:
    with pytest.raises(SystemExit):
        main([str(tmp_path), f"--every={every}"])
    assert "use a positive number of seconds" in capsys.readouterr().err


def test_following_ends_with_the_last_run(tmp_path: Path) -> None:
    write_run(tmp_path / "0")
    write_run(tmp_path / "1", "running")
    ended = (tmp_path / "0" / "manifest.json").read_text()

    def finish() -> None:
        time.sleep(0.3)
        (tmp_path / "1" / "manifest.json").write_text(ended)

    thread = threading.Thread(target=finish)
    thread.start()
    console = Console(file=io.StringIO(), force_terminal=True, width=120, height=40)
    watch._follow(tmp_path, console, every=0.05)
    thread.join()
    assert isinstance(console.file, io.StringIO)
    first, last = console.file.getvalue().partition("runs: ")[2], console.file.getvalue().rpartition("runs: ")[2]
    assert first.startswith("1 running, 1 finished") and last.startswith("2 finished")


def test_a_small_terminal_shows_what_runs_before_what_has_ended(tmp_path: Path) -> None:
    for number in range(9):
        write_run(tmp_path / str(number), "running" if number in (4, 7) else "finished")
    shot = read_snapshot(tmp_path)
    console = Console(file=io.StringIO(), width=120)
    console.print(watch._render(copy.copy(shot), height=3))
    assert isinstance(console.file, io.StringIO)
    lines = console.file.getvalue().splitlines()
    assert [line.split("│")[1].strip() for line in lines if line.startswith("│")] == ["0", "4", "7"]
    assert "6 not shown" in lines[0]


def test_copies_of_the_mirror_are_no_runs(tmp_path: Path) -> None:
    run = write_run(tmp_path / "0")
    write_run(run / "wandb" / "offline-run-1" / "files")
    assert [row.job for row in read_snapshot(tmp_path).rows] == ["0"]
