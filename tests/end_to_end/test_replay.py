"""`python -m ptq161.replay` on runs of the tiny model."""

from __future__ import annotations

import json
import shutil
import subprocess
import sys
from pathlib import Path

import pytest

from ptq161.errors import UserError
from ptq161.replay.__main__ import _read_finished, _replay
from ptq161.tracking.read import read_run
from tests.end_to_end.conftest import RUN, SECONDS, SEQ_LEN, Program, Recorded, variables

pytestmark = pytest.mark.slow


def replayed(folder: Path, *arguments: str, **environment: str) -> subprocess.CompletedProcess[str]:
    return subprocess.run(
        [sys.executable, "-m", "ptq161.replay", *arguments],
        cwd=folder,
        env=variables(folder, PYTHONPATH=str(RUN.parent), **environment),
        capture_output=True,
        text=True,
        timeout=SECONDS,
    )


def copy_of(run: Recorded, folder: Path) -> Path:
    return shutil.copytree(run[1], folder, ignore=shutil.ignore_patterns("wandb", "replay"))


def test_a_run_is_found_again_to_the_last_bit_whatever_the_threads_of_the_shell(
    tmp_path: Path, tiny_run: Recorded
) -> None:
    recorded = copy_of(tiny_run, tmp_path / "run")
    done = replayed(tmp_path, "run", OMP_NUM_THREADS="2")
    assert done.returncode == 0, done.stderr
    (again,) = (recorded / "replay").iterdir()
    report = json.loads((again / "replay.json").read_text())
    assert report["equal"] and report["n_values"] > 80 and report["n_different"] == 0
    assert "Reproduced: 0 of" in done.stdout and str(again) in done.stdout
    before, after = read_run(recorded), read_run(again)
    for name in ("checkpoint_sha256", "calibration_sha256", "model_sha256", "threads"):
        assert after.manifest[name] == before.manifest[name]
    assert len(after.metrics) == len(before.metrics)
    assert not (again / "wandb").exists()


def test_differences_are_reported_and_the_exit_status_is_one(tmp_path: Path, tiny_run: Recorded) -> None:
    recorded = copy_of(tiny_run, tmp_path / "run")
    results = json.loads((recorded / "results.json").read_text())
    results["metrics"][f"ppl/text_file@{SEQ_LEN}"] *= 1.001
    (recorded / "results.json").write_text(json.dumps(results))
    manifest = json.loads((recorded / "manifest.json").read_text())
    manifest["versions"]["torch"] = "1.0"
    (recorded / "manifest.json").write_text(json.dumps(manifest))
    refused = replayed(tmp_path, "run", "--out", "again")
    assert refused.returncode == 1 and "has another SHA-256 than SHA256SUMS says" in refused.stderr
    (recorded / "SHA256SUMS").unlink()
    done = replayed(tmp_path, "run", "--out", "again")
    assert done.returncode == 1 and "Traceback" not in done.stderr
    assert "Not reproduced: 1 of" in done.stdout
    report = json.loads((tmp_path / "again" / "replay.json").read_text())
    (metric,) = [metric for metric in report["metrics"] if metric["n_different"]]
    assert metric["name"] == f"ppl/text_file@{SEQ_LEN}"
    assert metric["largest_relative_difference"] == pytest.approx(0.001, rel=0.01)
    assert report["environment"]["versions.torch"]["recorded"] == "1.0"


def test_the_evaluation_of_a_packed_checkpoint_is_replayed(
    tmp_path: Path, program: Program, tiny_run: Recorded
) -> None:
    evaluation = [override for override in program.tiny if override.startswith(("eval", "device"))]
    ended = program(f"model.path={tiny_run[1] / 'checkpoint'}", *evaluation, "tracker=none", "hydra.run.dir=scored")
    assert ended.status == 0, ended.stderr
    comparison = _replay(_read_finished(tmp_path / "scored"), tmp_path / "again")
    assert comparison.equal and comparison.n_values > 5
    assert set(comparison.hashes) == {"checkpoint_sha256"}
    assert set(read_run(tmp_path / "again").config) == set(read_run(tmp_path / "scored").config)


def test_a_model_that_has_gone_is_one_sentence(tmp_path: Path, tiny_run: Recorded) -> None:
    recorded = copy_of(tiny_run, tmp_path / "run")
    config = (recorded / "config.yaml").read_text()
    path = read_run(recorded).config["model"]["path"]
    (recorded / "config.yaml").write_text(config.replace(path, "gone"))
    (recorded / "SHA256SUMS").unlink()
    with pytest.raises(UserError, match=r"cannot be replayed: model\.path=.*gone: no config\.json is there"):
        _replay(_read_finished(recorded), tmp_path / "again")
    assert not (tmp_path / "again").exists()
