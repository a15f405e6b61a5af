"""The directories of a run or a sweep, settled before it begins: absolute, its own, and one for each job."""

from __future__ import annotations

import contextlib
import itertools
import os
from collections.abc import Iterator, Sequence
from pathlib import Path

from hydra.core.config_loader import ConfigLoader
from hydra.core.hydra_config import HydraConfig
from omegaconf import DictConfig, OmegaConf, open_dict, read_write
from omegaconf.errors import OmegaConfBaseException

from ptq161.errors import UserError
from ptq161.files.paths import absolute_path
from ptq161.run.command_line import as_value
from ptq161.run.preflight import check_writable
from ptq161.tracking.find import hidden_in
from ptq161.tracking.ownership import check_free, own_until_exit

_RUN, _SWEEP, _SUBDIR = "hydra.run.dir", "hydra.sweep.dir", "hydra.sweep.subdir"


def settle_run_dir(config: DictConfig) -> None:
    """Make the directory of a run, own it until the process ends, and write its absolute path into the configuration.

    Args:
        config: of the run, with Hydra's node.

    Raises:
        UserError: the directory cannot be made or written, lies in another record, or a live run owns it.
    """
    folder = _made(_RUN, config, [Path()])
    own_until_exit(folder)
    with read_write(config):
        config.hydra.run.dir = str(folder)


def settle_sweep_dir(config: DictConfig, subdirs: Sequence[Path]) -> None:
    """Make the directory of a sweep, own it until the process ends, and write its absolute path into the configuration.

    The path becomes an override as well, from which Hydra composes the configuration of each job: a job that changes
    its working directory, or runs on another machine, finds the sweep's all the same.

    Args:
        config: of the sweep, with Hydra's node.
        subdirs: of each job (:func:`job_subdir`).

    Raises:
        UserError: two jobs would share a directory; one lies in another record, or a live run owns it; the sweep's
            directory cannot be made or written, or a live sweep owns it.
    """
    _check_apart(config, subdirs)
    folder = _made(_SWEEP, config, subdirs)
    own_until_exit(folder, "sweep")
    with read_write(config), open_dict(config):
        config.hydra.sweep.dir = str(folder)
        # Not resolved: what a job's directory is made from differs between the jobs.
        typed = OmegaConf.to_container(config.hydra.overrides.hydra, resolve=False)
        assert isinstance(typed, list)
        others = [text for text in map(str, typed) if not text.lstrip("+").startswith(f"{_SWEEP}=")]
        config.hydra.overrides.hydra = [*others, f"{_SWEEP}={as_value(str(folder))}"]


def compose_job(config: DictConfig, overrides: Sequence[str], number: int, loader: ConfigLoader) -> DictConfig:
    """Compose the configuration of a job as Hydra's launchers do.

    Raises:
        HydraException: it cannot be composed.
        UserError: the sweep's directory cannot be resolved.
    """
    _value(_SWEEP, config)  # so that the time in it is taken once, and is that of every job
    job = loader.load_sweep_config(config, list(overrides))
    with open_dict(job):
        job.hydra.job.id = job.hydra.job.num = number
    return job


def job_subdir(config: DictConfig, job: DictConfig) -> Path:
    """Return the directory of a job, relative to that of its sweep.

    Args:
        config: of the sweep, with Hydra's node.
        job: of :func:`compose_job`.

    Raises:
        UserError: the job would be recorded outside of the sweep's directory.
    """
    number = job.hydra.job.num
    with _as_hydra_config(job):  # which ${hydra:...} reads
        if _value(_SWEEP, job) != _value(_SWEEP, config):
            raise UserError(
                f"{_SWEEP}={_raw(_SWEEP, config)} differs between the jobs: put what differs into {_SUBDIR}."
            )
        folder = _folder(_SWEEP, config)
        run_dir = Path(os.path.normpath(folder / _value(_SUBDIR, job)))
    if not run_dir.is_relative_to(folder):
        raise UserError(
            f"{_SUBDIR}={_raw(_SUBDIR, config)}: job {number} would be recorded in {run_dir}, outside of the sweep's "
            "directory; use a folder below it."
        )
    return run_dir.relative_to(folder)


def _check_apart(config: DictConfig, subdirs: Sequence[Path]) -> None:
    """Check that each job has a directory of its own, and none has one inside another's."""
    jobs: dict[Path, int] = {}
    for number, subdir in sorted(enumerate(subdirs), key=lambda job: len(job[1].parts)):  # outer ones first
        for path in (subdir, *subdir.parents):
            if path in jobs:
                raise UserError(
                    f"{_SUBDIR}={_raw(_SUBDIR, config)}: job {number} would be recorded in {subdir}, where job "
                    f"{jobs[path]} has its record; add ${{hydra.job.num}}."
                )
        jobs[subdir] = number


def _made(setting: str, config: DictConfig, subdirs: Sequence[Path]) -> Path:
    """Make a directory, in which no other run or record has anything to do with these subdirectories."""
    folder = _folder(setting, config)
    for run_dir in (folder / subdir for subdir in subdirs):
        if record := hidden_in(run_dir):
            raise UserError(f"{setting}: {run_dir} is part of the record in {record}; choose another directory.")
    # A directory that is named after the time is meant to be new, and another one may have begun in the same second.
    if "${now:" in _raw(setting, config):
        with contextlib.suppress(OSError):  # which check_writable will tell
            folder = _next_free(folder)
    for subdir in subdirs:
        check_free(folder / subdir)
    check_writable(setting, str(folder))
    return folder


def _next_free(folder: Path) -> Path:
    """Make a folder that did not exist: this one, or with ``-2``, ``-3``, ... after its name."""
    folder.parent.mkdir(parents=True, exist_ok=True)
    names = itertools.chain([folder.name], (f"{folder.name}-{number}" for number in itertools.count(2)))
    for name in names:
        with contextlib.suppress(FileExistsError):
            folder.with_name(name).mkdir()
            return folder.with_name(name)
    raise AssertionError("there is always another number")


def _folder(setting: str, config: DictConfig) -> Path:
    return Path(os.path.normpath(absolute_path(setting, _value(setting, config))))


def _value(setting: str, config: DictConfig) -> str:
    try:
        value = OmegaConf.select(config, setting)
    except OmegaConfBaseException as error:
        reason = str(error).splitlines()[0].rstrip(".")
        raise UserError(f"{setting}={_raw(setting, config)} cannot be resolved ({reason}): name a folder.") from error
    if value in (None, ""):
        raise UserError(f"{setting} is empty: name a folder.")
    return str(value)


def _raw(setting: str, config: DictConfig) -> str:
    """Return a setting as it is written, with its interpolations."""
    node, _, key = setting.rpartition(".")
    values = OmegaConf.to_container(OmegaConf.select(config, node), resolve=False)
    assert isinstance(values, dict)
    return str(values[key])


@contextlib.contextmanager
def _as_hydra_config(job: DictConfig) -> Iterator[None]:
    before = HydraConfig.instance().cfg
    HydraConfig.instance().set_config(job)
    try:
        yield
    finally:
        HydraConfig.instance().cfg = before
