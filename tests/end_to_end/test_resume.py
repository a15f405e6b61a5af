"""A killed run goes on when the same command is typed again; a sweep skips what is finished, and says so."""

from __future__ import annotations

import signal
import time
from pathlib import Path

import pytest

from ptq161.files.hashing import sha256_of_file
from ptq161.tracking.read import RunData, read_run
from tests.end_to_end.conftest import SECONDS, Program, store_of

pytestmark = pytest.mark.slow

LONG = ["method.epochs=60", "tracker=none"]  # a block takes seconds


def plain(run: RunData) -> list[dict[str, object]]:
    return [{k: v for k, v in m.items() if k != "time"} for m in run.metrics if m["name"] != "seconds"]


def checkpoint(run_dir: Path) -> dict[str, str]:
    return {path.name: sha256_of_file(path) for path in (run_dir / "checkpoint").iterdir()}


def test_killed_in_the_second_block_and_typed_again(program: Program) -> None:
    assert program(*program.tiny, *LONG, "cache=false", "hydra.run.dir=whole").status == 0
    process = program.start(*program.tiny, *LONG, "hydra.run.dir=killed")
    blocks, deadline = store_of(program.folder) / "blocks", time.monotonic() + SECONDS
    while not list(blocks.rglob("block_00000.safetensors")):
        assert process.poll() is None and time.monotonic() < deadline
        time.sleep(0.02)
    process.send_signal(signal.SIGKILL)
    process.communicate(timeout=SECONDS)
    assert not list(blocks.rglob("block_00001.safetensors"))
    assert read_run(program.folder / "killed").manifest["exit_state"] == "running"
    again = program(*program.tiny, *LONG, "hydra.run.dir=again")
    assert again.status == 0, again.stderr
    assert "1 of 2 windows of blocks are finished already" in again.stdout
    assert "full precision: all scores were found in the cache" in again.stdout
    assert checkpoint(program.folder / "again") == checkpoint(program.folder / "whole")
    runs = [read_run(program.folder / name) for name in ("again", "whole")]
    assert plain(runs[0]) == plain(runs[1])
    assert runs[0].results is not None and runs[1].results is not None
    for key in ("metrics", "full_precision", "protocol"):
        assert runs[0].results[key] == runs[1].results[key]


def test_a_sweep_skips_what_is_finished_and_redoes_what_failed(program: Program) -> None:
    command = ["-m", *program.tiny, "tracker=none", "method=rtn", "mask_ratio=0.1,0.2", "calib.seq_len=64,600"]
    first = program(*command, "hydra.sweep.dir=first")
    assert first.status == 1
    summary = "Sweep of 4 runs: 1 computed, 1 reused, 2 failed. Records:"
    assert summary in first.stdout
    assert "its results are reused" in first.stdout
    second = program(*command, "hydra.sweep.dir=second")
    assert "Sweep of 4 runs: 0 computed, 2 reused, 2 failed. Records:" in second.stdout
    runs = [read_run(path.parent) for path in sorted(program.folder.glob("*/*/manifest.json"))]
    finished = [run for run in runs if run.results is not None]
    assert len(runs) == 8 and len(finished) == 4
    assert {run.manifest["exit_state"] for run in runs if run.results is None} == {"failed"}
    original = finished[0]
    for run in finished[1:]:
        assert run.results == original.results and run.metrics == original.metrics
        assert checkpoint(run.run_dir) == checkpoint(original.run_dir)
        assert run.manifest["reused_from"]["run_dir"] == str(original.run_dir)
    assert [run.config["mask_ratio"] for run in finished] == [0.1, 0.2, 0.1, 0.2]


def test_a_store_that_cannot_be_used_is_one_sentence(program: Program) -> None:
    (program.folder / "file").write_text("")
    ended = program(*program.tiny, "tracker=none", "hydra.run.dir=run", PTQ161_STORE=str(program.folder / "file"))
    assert ended.status == 1 and "Traceback" not in ended.stderr
    (sentence,) = ended.sentences
    assert "cannot be written (File exists)" in sentence and "cache=false" in sentence
    assert not (program.folder / "run" / "checkpoint").exists()
