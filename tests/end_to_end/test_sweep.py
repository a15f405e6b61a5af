"""Two jobs in one process, and a sweep with a job that fails."""

from __future__ import annotations

import pytest

from ptq161.tracking.read import read_run
from tests.end_to_end.conftest import Program
from tests.tracking.wandb_file import read_wandb_file

pytestmark = pytest.mark.slow


def test_an_ablation_is_two_records_and_two_wandb_runs(program: Program) -> None:
    ended = program("-m", *program.tiny, "mask_ratio=0.1,0.2")
    assert ended.status == 0, ended.stderr
    (sweep,) = program.folder.glob("multirun/*/*")
    assert {path.name for path in sweep.iterdir()} == {"0", "1", "multirun.yaml", ".sweep.lock"}
    assert not set("=,") & set(str(sweep.relative_to(program.folder)))
    runs = [read_run(sweep / name) for name in ("0", "1")]
    mirrors = [read_wandb_file(run.run_dir) for run in runs]
    group = f"{sweep.parent.name}/{sweep.name}"
    for ratio, run, mirror in zip((0.1, 0.2), runs, mirrors, strict=True):
        assert run.results is not None and run.manifest["exit_state"] == "finished"
        assert run.config["method"]["mask_ratio"] == mirror.config["mask_ratio"] == ratio
        assert run.results["metrics"]["nominal_bits_per_weight"] == pytest.approx(1 + 3 * ratio)
        assert run.manifest["group"] == mirror.run.run_group == group
        assert mirror.exit_code == 0
    assert mirrors[0].run.run_id != mirrors[1].run.run_id
    # What depends on the seed alone is shared; what depends on the ratio is not.
    assert runs[0].manifest["calibration_sha256"] == runs[1].manifest["calibration_sha256"]
    assert runs[0].manifest["checkpoint_sha256"] != runs[1].manifest["checkpoint_sha256"]
    assert runs[1].manifest["pid"] == runs[0].manifest["pid"]


def test_every_job_is_checked_before_the_first_one_runs(program: Program) -> None:
    ended = program("-m", *program.tiny, "mask_ratio=0.1,1.5")
    assert ended.status == 1
    (sentence,) = ended.sentences
    assert "mask_ratio=1.5" in sentence and "[0, 1)" in sentence
    assert list(program.folder.iterdir()) == []


def test_a_job_that_fails_does_not_stop_the_next(program: Program) -> None:
    ended = program("-m", *program.tiny, "tracker=none", "calib.seq_len=600,64", "hydra.sweep.dir=sweep")
    assert ended.status == 1
    assert "Traceback" not in ended.stderr
    assert len([line for line in ended.sentences if line.endswith("set calib.seq_len to at most 512.")]) == 1
    failed, finished = (read_run(program.folder / "sweep" / name) for name in ("0", "1"))
    assert (failed.manifest["exit_state"], failed.results) == ("failed", None)
    assert "calib.seq_len=600" in failed.manifest["exception"]["message"]
    assert "Traceback" in (failed.run_dir / "run.log").read_text()
    assert finished.manifest["exit_state"] == "finished"
