"""`python -m ptq161.search` on the tiny model, killed and taken up again; and the W&B sweep's command line."""

from __future__ import annotations

import csv
import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest

from ptq161.tracking.read import read_run
from tests.end_to_end.conftest import RUN, SECONDS, SEQ_LEN, variables

pytestmark = pytest.mark.slow

SPACE = "mask_ratio: {low: 0.1, high: 0.4}\nmethod.scale_lr: {low: 1e-4, high: 1e-2, log: true}\n"


def start(folder: Path, *arguments: str) -> subprocess.Popen[str]:
    return subprocess.Popen(
        [sys.executable, "-m", "ptq161.search", "--out", "search = 1", "--space", "space.yaml", *arguments],
        cwd=folder,
        env=variables(folder, PYTHONPATH=str(RUN.parent)),
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
    )


def test_a_killed_search_goes_on_and_ends_in_its_front(tmp_path: Path, tiny: list[str]) -> None:
    (tmp_path / "space.yaml").write_text(SPACE)
    settings = ["--trials", "2", *tiny, "tracker=none"]
    search = start(tmp_path, *settings)
    deadline = time.monotonic() + SECONDS
    while not (tmp_path / "search = 1" / "0" / "output.log").exists():
        assert search.poll() is None and time.monotonic() < deadline
        time.sleep(0.05)
    os.kill(search.pid, signal.SIGTERM)
    _, printed = search.communicate(timeout=SECONDS)
    assert search.returncode == 143
    assert "Run the same command again to continue the search." in printed and "Traceback" not in printed

    search = start(tmp_path, *settings)
    out, printed = search.communicate(timeout=SECONDS)
    assert search.returncode == 0, printed
    assert "2 of 2 trials finished, 0 failed." in out and "Pareto front" in out
    folder = tmp_path / "search = 1"
    rows = list(csv.DictReader((folder / "trials.csv").read_text().splitlines()))
    assert [row["trial"] for row in rows] == ["0", "1"]
    assert float(rows[0]["mask_ratio"]) == 0.2  # the configured point goes first
    for row in rows:
        run = read_run(folder / row["trial"])
        assert run.results is not None and run.manifest["exit_state"] == "finished"
        assert run.manifest["group"] == "search/search = 1"
        assert run.config["mask_ratio"] == float(row["mask_ratio"])
        assert run.config["method"]["scale_lr"] == float(row["method.scale_lr"])
        for name in ("bits_per_weight", f"ppl/text_file@{SEQ_LEN}"):
            assert run.results["metrics"][name] == float(row[name])
    assert (folder / "pareto.svg").exists() and (folder / "pareto.png").exists()
