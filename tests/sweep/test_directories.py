"""Whatever is written into Hydra's directories: each run and job has one of its own, or nothing begins."""

from __future__ import annotations

import re
from collections.abc import Iterator
from pathlib import Path

import pytest
from hydra import compose, initialize_config_dir
from hydra.core.global_hydra import GlobalHydra
from hydra.core.hydra_config import HydraConfig
from omegaconf import DictConfig

from ptq161.cache.store import store_dir
from ptq161.sweep.callbacks import CheckJobs
from ptq161.sweep.directories import compose_job, job_subdir
from ptq161.sweep.overrides import sweep_jobs
from ptq161.tracking import ownership
from ptq161.tracking.find import find_runs
from tests.tracking.owner import in_another_process

CONF = Path(__file__).resolve().parents[2] / "conf"
SWEPT = ["seed=0,1", "method=rtn,gptq"]


@pytest.fixture(autouse=True)
def hydra(tmp_path: Path, tmp_path_factory: pytest.TempPathFactory, monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    """Hydra in a folder of its own, and no lock that outlives a test."""
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("PTQ161_STORE", str(tmp_path_factory.mktemp("store")))
    monkeypatch.setattr(HydraConfig.instance(), "cfg", None)
    with initialize_config_dir(str(CONF), version_base="1.3"):
        yield
    while ownership._until_exit:
        ownership._until_exit.pop().release(force=True)


def composed(*overrides: str, mode: str = "MULTIRUN") -> DictConfig:
    hydra_own = [text for text in overrides if text.lstrip("+").startswith("hydra")]
    composed = overrides if mode == "RUN" else hydra_own
    config = compose("config", [f"hydra.mode={mode}", *composed], return_hydra_config=True)
    config.hydra.overrides.hydra = hydra_own
    config.hydra.overrides.task = [text for text in overrides if text not in hydra_own]
    return config


def run_dirs(*overrides: str) -> list[Path]:
    """Where Hydra's launchers record the jobs of a sweep, once the callback has settled it."""
    config = composed(*overrides)
    CheckJobs().on_multirun_start(config)
    loader = GlobalHydra.instance().config_loader()
    found = []
    for number, job in enumerate(sweep_jobs(config, loader)):
        done = compose_job(config, job, number, loader)
        assert done.hydra.sweep.dir == config.hydra.sweep.dir
        found.append(Path(done.hydra.sweep.dir) / job_subdir(config, done))
    return found


def refused(*overrides: str) -> str:
    with pytest.raises(SystemExit) as caught:
        CheckJobs().on_multirun_start(composed(*overrides))
    sentence = str(caught.value)
    assert "\n" not in sentence and sentence.endswith(".")
    return sentence


def test_the_directory_of_a_live_run_of_the_same_second_is_not_waited_for(tmp_path: Path) -> None:
    config = composed("hydra.run.dir=out/${now:%Y}", mode="RUN")
    with in_another_process(tmp_path / str(config.hydra.run.dir)):
        CheckJobs().on_run_start(config)
    assert re.fullmatch(r"out/[0-9]{4}-2", str(Path(config.hydra.run.dir).relative_to(tmp_path)))


def test_default_directories_never_collide(tmp_path: Path) -> None:
    sweeps = [run_dirs(*SWEPT) for _ in range(3)]
    assert len({path for run_dirs in sweeps for path in run_dirs}) == 12
    for dirs in sweeps:
        assert [path.name for path in dirs] == ["0", "1", "2", "3"] and len({path.parent for path in dirs}) == 1
        assert re.fullmatch(
            r"multirun/[0-9-]{10}/[0-9]{2}-[0-9]{2}-[0-9]{2}(-[23])?/[0-3]", str(dirs[0].relative_to(tmp_path))
        )
    singles = []
    for _ in range(3):
        config = composed("seed=1", mode="RUN")
        CheckJobs().on_run_start(config)
        singles.append(Path(config.hydra.run.dir))
    assert len(set(singles)) == 3
    for path in singles:
        assert re.fullmatch(r"outputs/[0-9-]{10}/[0-9]{2}-[0-9]{2}-[0-9]{2}(-[23])?", str(path.relative_to(tmp_path)))


@pytest.mark.parametrize(
    "overrides",
    [
        ["hydra.sweep.dir=sweep"],
        ["hydra.sweep.dir=."],
        ["hydra.sweep.dir='a b/=,é'"],
        ["hydra.sweep.dir=sweep/../other"],
        ["hydra.sweep.dir=sweep", "hydra.sweep.subdir=${hydra.job.override_dirname}"],
        ["hydra.sweep.dir=sweep", "hydra.sweep.subdir=${hydra:job.override_dirname}"],
        ["hydra.sweep.dir=sweep", "hydra.sweep.subdir=${method.name}/${seed}"],
        ["hydra.sweep.dir=sweep", "hydra.sweep.subdir=seed_${seed}/${method.name}/run"],
        ["hydra.sweep.dir=sweep", "hydra.sweep.subdir=a/../${hydra.job.num}"],
        ["hydra.sweep.dir=${now:%Y}/${tracker.name}"],
        ["hydra.sweep.dir=sweep", "hydra/launcher=local"],
    ],
)
def test_every_job_has_a_directory_of_its_own(tmp_path: Path, overrides: list[str]) -> None:
    found = run_dirs(*SWEPT, *overrides)
    assert len(set(found)) == 4
    assert all(path.is_absolute() and path.is_relative_to(tmp_path) for path in found)
    for path in found:
        path.mkdir(parents=True)
        (path / "manifest.json").write_text("{}")
    assert sorted(find_runs(tmp_path)) == sorted(found)


@pytest.mark.parametrize(
    ("overrides", "part"),
    [
        (["hydra.sweep.subdir=fixed"], "job 1 would be recorded in fixed, where job 0 has its record"),
        (["hydra.sweep.subdir=."], "hydra.sweep.subdir=.: job 1"),
        (["hydra.sweep.subdir=''"], "hydra.sweep.subdir is empty"),
        (["hydra.sweep.subdir=${seed}"], "hydra.sweep.subdir=${seed}: job 1 would be recorded in 0, where job 0"),
        (["hydra.sweep.subdir=${now:%H}"], "add ${hydra.job.num}"),
        (["hydra.sweep.subdir=../${hydra.job.num}"], "outside of the sweep's directory"),
        (["hydra.sweep.subdir=/elsewhere/${hydra.job.num}"], "outside of the sweep's directory"),
        (["hydra.sweep.subdir=${nothing}"], "hydra.sweep.subdir=${nothing} cannot be resolved"),
        (["hydra.sweep.dir=out/${method.name}"], "hydra.sweep.dir=out/${method.name} differs between the jobs"),
        (["hydra.sweep.dir=out/${hydra.job.num}"], "hydra.sweep.dir=out/${hydra.job.num} cannot be resolved"),
        (["hydra.sweep.dir=file/sweep"], "hydra.sweep.dir="),
        (["hydra.sweep.dir=record/wandb"], "is part of the record in"),
        (["hydra.sweep.dir=record", "hydra.sweep.subdir=checkpoint/${hydra.job.num}"], "is part of the record in"),
        (["hydra.sweep.dir=running", "hydra.sweep.subdir=${hydra.job.num}"], "belongs to a run that has not ended"),
        (["hydra.sweep.dir=sweeping"], "belongs to a sweep that has not ended"),
    ],
)
def test_or_the_sweep_is_refused(tmp_path: Path, overrides: list[str], part: str) -> None:
    (tmp_path / "file").write_text("")
    (tmp_path / "record").mkdir()
    (tmp_path / "record" / "manifest.json").write_text("{}")
    with in_another_process(tmp_path / "running" / "3", "run"), in_another_process(tmp_path / "sweeping", "sweep"):
        before = sorted(tmp_path.rglob("*"))
        assert part in refused(*SWEPT, *overrides)
        assert sorted(tmp_path.rglob("*")) == before


def test_one_job_inside_another_is_refused() -> None:
    swept = "model.name='a','a/b'"
    assert "where job 0 has its record" in refused(swept, "hydra.sweep.subdir=${model.name}")
    assert "where job 0 has its record" in refused(swept, "hydra.sweep.subdir=x/${model.name}")
    assert len(run_dirs(swept, "hydra.sweep.dir=sweep", "hydra.sweep.subdir=${hydra.job.num}/${model.name}")) == 2


def test_a_sweep_of_one_job_may_have_its_record_in_its_directory(tmp_path: Path) -> None:
    assert run_dirs("seed=1", "hydra.sweep.dir=sweep", "hydra.sweep.subdir=.") == [tmp_path / "sweep"]


def test_jobs_of_an_unknown_sweeper_are_told_apart_by_their_number(tmp_path: Path) -> None:
    config = composed("hydra.sweep.dir=sweep")
    config.hydra.sweeper._target_ = "another.Sweeper"
    CheckJobs().on_multirun_start(config)
    assert config.hydra.sweep.dir == str(tmp_path / "sweep")
    config = composed("hydra.sweep.dir=sweep", "hydra.sweep.subdir=${seed}")
    config.hydra.sweeper._target_ = "another.Sweeper"
    with pytest.raises(SystemExit, match="job 1 would be recorded in 0"):
        CheckJobs().on_multirun_start(config)


@pytest.mark.parametrize(
    ("override", "part"),
    [
        ("hydra.run.dir=out/${hydra.job.num}", "cannot be resolved"),
        ("hydra.run.dir=out/${nothing}", "cannot be resolved"),
        ("hydra.run.dir=file/run", "cannot be written"),
        ("hydra.run.dir=record/checkpoint", "is part of the record in"),
        ("hydra.run.dir=record/wandb/deep/er", "is part of the record in"),
        ("hydra.run.dir=running", "belongs to a run that has not ended"),
        ("hydra.run.dir=record/../running", "belongs to a run that has not ended"),
        ("hydra.run.dir=link", "belongs to a run that has not ended"),
    ],
)
def test_a_run_that_cannot_have_its_directory_is_refused(tmp_path: Path, override: str, part: str) -> None:
    (tmp_path / "file").write_text("")
    (tmp_path / "record").mkdir()
    (tmp_path / "record" / "manifest.json").write_text("{}")
    (tmp_path / "link").symlink_to(tmp_path / "running")
    with in_another_process(tmp_path / "running", "run"):
        before = sorted(tmp_path.rglob("*"))
        with pytest.raises(SystemExit) as caught:
            CheckJobs().on_run_start(composed(override, mode="RUN"))
        assert part in str(caught.value) and str(caught.value).endswith(".")
        assert sorted(tmp_path.rglob("*")) == before


def test_a_home_folder_is_meant(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("HOME", str(tmp_path / "home"))
    config = composed("hydra.run.dir='~/run'", mode="RUN")
    CheckJobs().on_run_start(config)
    assert config.hydra.run.dir == str(tmp_path / "home" / "run")


@pytest.mark.parametrize("swept", ["seed=0,1", "cache=true,false"])
def test_a_store_that_cannot_be_written_is_told_before_anything_is_made(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, swept: str
) -> None:
    (tmp_path / "file").write_text("")
    monkeypatch.setenv("PTQ161_STORE", "file/store")
    sentence = f"PTQ161_STORE={tmp_path}/file/store cannot be written (Not a directory): choose a writable folder, "
    assert refused(swept).startswith(sentence)
    with pytest.raises(SystemExit) as caught:
        CheckJobs().on_run_start(composed("hydra.run.dir=run", mode="RUN"))
    assert str(caught.value).startswith(sentence)
    assert [path.name for path in tmp_path.iterdir()] == ["file"]
    run_dirs(swept, "hydra/launcher=submitit_slurm", "hydra.sweep.dir=elsewhere")  # whose nodes may have another
    CheckJobs().on_run_start(composed("cache=false", "hydra.run.dir=run", mode="RUN"))


def test_a_relative_store_is_where_the_command_was_typed(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("PTQ161_STORE", "store")
    CheckJobs().on_run_start(composed("hydra.run.dir=run", mode="RUN"))
    monkeypatch.chdir("/")
    assert store_dir() == tmp_path / "store"
