"""Two jobs in one process, and a sweep with a job that fails."""

from __future__ import annotations

from pathlib import Path

import pytest

from ptq161.tracking.read import read_run
from tests.end_to_end.conftest import Program
from tests.tracking.wandb_file import read_wandb_file

pytestmark = pytest.mark.slow


def test_an_ablation_is_two_records_and_two_wandb_runs(program: Program) -> None:
    ended = program("-m", *program.tiny, "mask_ratio=0.1,0.2", WANDB_RUN_ID="fixed")
    assert ended.status == 0, ended.stderr
    assert "WANDB_RUN_ID=fixed is set for several jobs: job 1 is mirrored as fixed-1." in ended.stdout
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
    assert [mirror.run.run_id for mirror in mirrors] == ["fixed-0", "fixed-1"]
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
    assert "One or more jobs of this sweep failed; the table of failures gives the reason of each." in ended.sentences
    assert "overrides: [" not in ended.stderr and "HYDRA_FULL_ERROR" not in ended.stderr
    failed, finished = (read_run(program.folder / "sweep" / name) for name in ("0", "1"))
    assert (failed.manifest["exit_state"], failed.results) == ("failed", None)
    assert "calib.seq_len=600" in failed.manifest["exception"]["message"]
    assert "Traceback" in (failed.run_dir / "run.log").read_text()
    assert finished.manifest["exit_state"] == "finished"


def test_a_setting_that_the_default_method_has_not(program: Program) -> None:
    ended = program("-m", *program.tiny, "method=rtn,gptq", "method.bits=3", "tracker=none", "hydra.sweep.dir=sweep")
    assert ended.status == 0, ended.stderr
    runs = [read_run(program.folder / "sweep" / name) for name in ("0", "1")]
    assert [(run.config["method"]["name"], run.config["method"]["bits"]) for run in runs] == [("rtn", 3), ("gptq", 3)]


def test_a_range_of_floats_is_what_was_meant_everywhere(program: Program) -> None:
    sweep = program.folder / "sweep"
    common = [*program.tiny, "tracker=none", "method.epochs=1"]
    one = program(*common, "mask_ratio=0.3", "hydra.run.dir=one")
    many = program("-m", *common, "mask_ratio=range(0.1,0.4,0.1)", "hydra.sweep.dir=sweep")
    assert (one.status, many.status) == (0, 0), one.stderr + many.stderr
    runs = [read_run(sweep / str(job)) for job in range(3)]
    assert [run.config["mask_ratio"] for run in runs] == [0.1, 0.2, 0.3]
    assert "- mask_ratio=0.3\n" in (sweep / "2" / ".hydra" / "overrides.yaml").read_text()
    assert runs[2].manifest["reused_from"] and not runs[1].manifest.get("reused_from")
    assert "0.30000000000000004" not in many.stdout
    assert not [f for f in sweep.rglob("*.yaml") if "0.30000000000000004" in f.read_text()]


def test_paths_at_home_and_in_another_working_directory(
    program: Program, tiny_model_dir: Path, text_file: Path
) -> None:
    home, common = program.folder, [*program.tiny, "tracker=none", "method=rtn"]
    (home / "model").symlink_to(tiny_model_dir)
    (home / "text.txt").symlink_to(text_file)
    plain = program(*common, "hydra.run.dir=plain")
    paths = ["model.path='~/model'", "calib.text_file=text.txt", "eval.text_file='~/text.txt'", "hydra.run.dir='~/é'"]
    moved = program(*common, *paths, "hydra.job.chdir=true", HOME=str(home))
    assert (plain.status, moved.status) == (0, 0), plain.stderr + moved.stderr
    run = read_run(home / "é")
    assert run.manifest["reused_from"]
    assert run.config["model"]["path"] == str(home / "model") and run.config["model"]["name"] == "model"
    assert run.config["calib"]["text_file"] == run.config["eval"]["text_file"] == str(home / "text.txt")
