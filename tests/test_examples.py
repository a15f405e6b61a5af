"""The scripts of examples/ run as their docstrings say."""

from __future__ import annotations

import os
import re
import shutil
import subprocess
import sys
from pathlib import Path

import pytest

from ptq161.tracking.record import RunRecord
from ptq161.tracking.settings import TrackerConfig

ROOT = Path(__file__).resolve().parents[1]
EXAMPLES = sorted((ROOT / "examples").glob("*.py"))
SMALL = ("--samples=2", "--seq-len=32", "--windows=2", "--epochs=1")


def run(name: str, *arguments: str | Path, status: int = 0) -> str:
    """Run an example in a process of its own and return what it prints."""
    done = subprocess.run(
        [sys.executable, str(ROOT / "examples" / name), *map(str, arguments)],
        env=os.environ | {"PYTHONPATH": str(ROOT)},
        capture_output=True,
        text=True,
    )
    assert done.returncode == status, done.stderr
    return done.stdout + (done.stderr if status else "")


@pytest.fixture
def text(tmp_path: Path) -> Path:
    file = tmp_path / "text.txt"
    file.write_text("".join(f"Line {i}: {i**2} squares. " for i in range(200)), encoding="utf-8")
    return file


@pytest.mark.parametrize("file", EXAMPLES, ids=lambda file: file.stem)
def test_every_example_shows_its_usage(file: Path) -> None:
    assert f"python examples/{file.name}" in file.read_text(encoding="utf-8").split('"""')[1]


def test_a_tiny_model_of_your_own_in_use(text: Path, tmp_path: Path) -> None:
    printed = run("quantize_your_own_model.py", "--tiny", "--text", text, "--out", tmp_path / "checkpoint", *SMALL)
    assert float(re.findall(r"([\d.]+) measured, 1.60 nominal", printed)[0]) > 1.6
    assert (tmp_path / "checkpoint" / "packed.safetensors").is_file()
    printed = run("use_a_packed_model.py", tmp_path / "checkpoint", "--prompt", "Line 7", "--tokens", "5")
    assert len(re.findall(r"[\d.]+ tokens per second", printed)) == 3 and "Line 7" in printed


def test_a_folder_of_your_own(text: Path, tiny_model_dir: Path, tmp_path: Path) -> None:
    model = shutil.copytree(tiny_model_dir, tmp_path / "model")
    printed = run("quantize_your_own_model.py", "--model", model, "--text", text, "--out", tmp_path / "out", *SMALL)
    before, after = re.findall(r"([\d.]+) in full precision, ([\d.]+) packed", printed)[0]
    assert before != after


def test_a_text_that_is_too_short(text: Path) -> None:
    printed = run("quantize_your_own_model.py", "--tiny", "--text", text, "--seq-len=4000", status=1)
    assert "give a text of at least 8000" in printed


def test_a_method_of_your_own() -> None:
    rows = {
        line[:28].strip(): [float(x) for x in line[28:].split()] for line in run("write_a_method.py").splitlines()[1:]
    }
    (bits, weights_error), (_, outputs_error) = rows["sign, scale of the weights"], rows["sign, scale of the outputs"]
    assert 1 < bits < 2
    assert 0 < outputs_error < weights_error < 1  # the scale that minimizes the output error does


def record(folder: Path, epochs: int, perplexity: float) -> Path:
    config = {"model": {"name": "tiny"}, "method": {"name": "ptq161", "epochs": epochs}}
    tracker = TrackerConfig("none")
    with RunRecord.open(folder, config=config, tracker=tracker, seeds={"seed": 0}, job_name="test") as run_record:
        run_record.finish({"metrics": {"ppl/text_file@64": perplexity, "bits_per_weight": 1.72}})
    return folder


def test_two_runs(tmp_path: Path) -> None:
    first, second = record(tmp_path / "first", 4, 31.5), record(tmp_path / "second", 8, 30.0)
    rows = [line.split() for line in run("compare_two_runs.py", first, second).splitlines()[1:]]
    assert rows == [["method.epochs", "4", "8", "+4"], ["ppl/text_file@64", "31.5", "30", "-1.5"]]
    assert "same settings and the same results" in run("compare_two_runs.py", first, first)


def test_a_folder_that_is_no_run(tmp_path: Path) -> None:
    assert "is not a run directory" in run("compare_two_runs.py", tmp_path, tmp_path, status=1)
