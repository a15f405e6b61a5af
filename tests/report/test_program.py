"""`python -m ptq161.report`."""

from __future__ import annotations

import re
from pathlib import Path

import pytest

from ptq161.report.__main__ import main
from ptq161.report.published import COLUMNS
from tests.report.conftest import WriteRun

FILES = {"index.html", "table.md", "results.csv", "results.tex", "figure.svg", "figure.png"}


def files(folder: Path) -> dict[str, bytes]:
    return {path.relative_to(folder).as_posix(): path.read_bytes() for path in folder.rglob("*.*")}


def test_a_sweep_makes_the_files_of_a_study(
    tmp_path: Path, write_run: WriteRun, capsys: pytest.CaptureFixture[str]
) -> None:
    for number, ratio in enumerate((0.1, 0.2)):
        write_run(f"sweep/{number}", mask_ratio=ratio)
    study = tmp_path / "experiments" / "study"
    assert main([str(tmp_path / "sweep"), "--out", str(study)]) == 0
    first = files(study)
    assert set(first) == FILES | {
        f"figures/{name}.{kind}" for name in ("sweep_mask_ratio", "bits", "cost") for kind in ("svg", "png")
    }
    assert re.search(r"\| full precision +\| tiny +\|", (study / "table.md").read_text())
    assert "mask_ratio" in (study / "figure.svg").read_text()  # as the comment that matplotlib leaves at a text
    assert capsys.readouterr().err == ""
    assert main([str(tmp_path / "sweep"), "--out", str(study)]) == 0
    assert first == files(study)


def test_published_figures(tmp_path: Path, write_run: WriteRun, capsys: pytest.CaptureFixture[str]) -> None:
    run_dir, file = write_run("run"), tmp_path / "published.csv"
    file.write_text(f"{','.join(COLUMNS)}\nA paper,Table 1,tiny,ptq161,1.61,,ppl/boolq@512,80\n")
    out = tmp_path / "out"
    assert main([str(run_dir), "--out", str(out), "--published", str(file)]) == 0
    assert "+20.00 (+25.0 %)" in (out / "table.md").read_text()
    assert (out / "comparison.csv").is_file()
    file.write_text(f"{','.join(COLUMNS)}\nA paper,Table 1,other,ptq161,1.61,,ppl/boolq@512,80\n")
    assert main([str(run_dir), "--out", str(tmp_path / "none"), "--published", str(file)]) == 0
    assert "no run has the model, method and metric" in capsys.readouterr().err
    assert not (tmp_path / "none" / "comparison.csv").exists()


def test_runs_without_bits_and_with_lists_that_differ_are_shown(tmp_path: Path, write_run: WriteRun) -> None:
    for n in (1, 2):
        document = {"metrics": {"ppl/boolq@512": 10.0 * n}, "protocol": {}}
        write_run(f"sweep/{n}", results=document, eval={"name": "quick", "corpora": ["boolq"] * n})
    assert main([str(tmp_path / "sweep"), "--out", str(tmp_path / "out")]) == 0
    assert set(files(tmp_path / "out")) == FILES | {f"figures/sweep_eval.corpora.{kind}" for kind in ("svg", "png")}


def test_damaged_runs_are_reported_and_the_others_shown(
    tmp_path: Path, write_run: WriteRun, capsys: pytest.CaptureFixture[str]
) -> None:
    write_run("sweep/0", "rtn")
    write_run("sweep/1", finish=False)
    assert main([str(tmp_path / "sweep"), "--out", str(tmp_path / "out")]) == 0
    assert "sweep/1 is skipped" in capsys.readouterr().err
    assert set(files(tmp_path / "out")) >= FILES


@pytest.mark.parametrize(
    ("arguments", "sentence"),
    [
        (["MISSING"], "MISSING: there is no such folder"),
        (["EMPTY"], "no finished run is in"),
        (["RUN", "--x", "mask_ration"], "--x mask_ration: no run has this key"),
        (["RUN", "--metric", "ppl/other"], "--metric ppl/other: no run has it; known are ppl/boolq@512"),
        (["RUN", "--published", "MISSING"], "the published figures MISSING cannot be read"),
        (["FULL"], "every run is one of full precision"),
    ],
)
def test_bad_input_is_one_sentence(
    tmp_path: Path,
    write_run: WriteRun,
    capsys: pytest.CaptureFixture[str],
    monkeypatch: pytest.MonkeyPatch,
    arguments: list[str],
    sentence: str,
) -> None:
    monkeypatch.chdir(tmp_path)
    write_run("RUN")
    write_run("FULL", "none")
    (tmp_path / "EMPTY").mkdir()
    assert main([*arguments, "--out", "out"]) == 1
    assert sentence in capsys.readouterr().err.splitlines()[-1]
    assert not (tmp_path / "out").exists()


def test_a_folder_that_cannot_be_written(
    tmp_path: Path, write_run: WriteRun, capsys: pytest.CaptureFixture[str]
) -> None:
    run_dir, file = write_run("run"), tmp_path / "file"
    file.touch()
    assert main([str(run_dir), "--out", str(file)]) == 1
    assert "choose a writable folder" in capsys.readouterr().err
