"""Every study of conf/study runs on a tiny model, and becomes a table and a figure."""

from __future__ import annotations

from pathlib import Path

import pytest
import yaml

from ptq161.report.__main__ import main
from ptq161.report.collect import collect
from tests.end_to_end.conftest import Program

pytestmark = pytest.mark.slow

ROOT = Path(__file__).resolve().parents[2]
STUDIES = sorted(path.stem for path in (ROOT / "conf" / "study").glob("*.yaml"))


@pytest.mark.parametrize("study", STUDIES)
def test_a_study_from_its_command_to_its_figure(program: Program, study: str) -> None:
    params = yaml.safe_load((ROOT / "conf" / "study" / f"{study}.yaml").read_text())["hydra"]["sweeper"]["params"]
    ((key, values),) = params.items()
    ended = program("-m", f"+study={study}", *program.tiny, "tracker=none", "hydra.sweep.dir=sweep")
    assert ended.status == 0, ended.stderr
    found = collect([program.folder / "sweep"])
    assert found.problems == []
    assert [run.value(key) for run in found.runs] == [yaml.safe_load(value) for value in values.split(",")]
    assert main([str(program.folder / "sweep"), "--out", str(program.folder / "out")]) == 0
    assert {path.name for path in (program.folder / "out").iterdir()} == {
        *["table.md", "results.csv", "figure.svg", "figure.png"]
    }
    assert (ROOT / "experiments" / study / "README.md").is_file()


def test_a_study_is_a_sweep_without_the_switch_and_its_jobs_are_checked(program: Program) -> None:
    wrong = "hydra.sweeper.params.mask_ratio='0.1,1.5'"
    ended = program("+study=mask_ratio", *program.tiny, "tracker=none", wrong)
    assert ended.status == 1
    (sentence,) = ended.sentences
    assert "mask_ratio=1.5" in sentence and "of this sweep cannot run" in sentence
    assert list(program.folder.iterdir()) == []
