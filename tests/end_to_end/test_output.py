"""A run is finished and kept, whatever becomes of what it prints."""

from __future__ import annotations

import shlex
import subprocess

import pytest

from ptq161.tracking.read import read_run
from tests.end_to_end.conftest import SECONDS, Program, command, variables

pytestmark = pytest.mark.slow


@pytest.mark.parametrize(
    ("redirection", "multirun"), [("2>&1 | head -1", True), (">/dev/full 2>&1", False), (">&- 2>&-", True)]
)
def test_a_run_ends_well_without_an_output(program: Program, redirection: str, multirun: bool) -> None:
    where = ["-m", "hydra.sweep.dir=sweep"] if multirun else ["hydra.run.dir=run"]
    arguments = shlex.join(command(*where, *program.tiny, "method=rtn", "tracker=none"))
    ended = subprocess.run(
        ["bash", "-c", f"{arguments} {redirection}; echo ${{PIPESTATUS[0]}} > status"],
        cwd=program.folder,
        env=variables(program.folder, LC_ALL="C", PYTHONIOENCODING="ascii"),
        capture_output=True,
        text=True,
        timeout=SECONDS,
    )
    assert (program.folder / "status").read_text() == "0\n", ended.stderr
    run = read_run(program.folder / ("sweep/0" if multirun else "run"))
    assert (run.manifest["exit_state"], run.problems) == ("finished", [])
    assert (run.run_dir / "checkpoint" / "packed.safetensors").is_file()
