"""Results of an earlier report beside runs: ``--earlier``."""

from __future__ import annotations

import csv
from pathlib import Path

import pytest

from ptq161.report.__main__ import main
from tests.report.conftest import WriteRun


def rows(folder: Path) -> list[dict[str, str]]:
    with (folder / "results.csv").open(newline="") as stream:
        return list(csv.DictReader(stream))


def test_earlier_results_stand_beside_runs_as_they_did_before(tmp_path: Path, write_run: WriteRun) -> None:
    for number, ratio in enumerate((0.1, 0.2)):
        write_run(f"old/{number}", mask_ratio=ratio, ppl=100.0 / 3 + number)
    write_run("old/restored", "gptq", preprocess={"name": "restorative_lora"}, bits=2.1)
    assert main([str(tmp_path / "old"), "--out", str(tmp_path / "first")]) == 0
    write_run("new", "billm", ppl=70.0, bits=2.9)
    earlier = tmp_path / "first" / "results.csv"
    assert main([str(tmp_path / "new"), "--out", str(tmp_path / "both"), "--earlier", str(earlier)]) == 0
    of_runs = tmp_path / "runs"
    assert main([str(tmp_path / "old"), str(tmp_path / "new"), "--out", str(of_runs)]) == 0

    def by_method(folder: Path) -> list[tuple[str, ...]]:
        return sorted(tuple(f"{name}={value}" for name, value in sorted(row.items())) for row in rows(folder))

    assert by_method(tmp_path / "both") == by_method(of_runs)
    assert len(rows(of_runs)) == 5  # full precision, once, and four runs
    for name in ("mask_ratio", "billm", "gptq"):
        assert name in (tmp_path / "both" / "index.html").read_text()


def test_a_result_whose_record_is_at_hand_is_shown_once(tmp_path: Path, write_run: WriteRun) -> None:
    run_dir, out = write_run("run"), tmp_path / "out"
    assert main([str(run_dir), "--out", str(out)]) == 0
    first = (out / "results.csv").read_bytes()
    assert main([str(run_dir), "--out", str(out), "--earlier", str(out / "results.csv")]) == 0
    assert (out / "results.csv").read_bytes() == first


def test_keys_that_the_table_does_not_have_tell_nothing_apart(tmp_path: Path, write_run: WriteRun) -> None:
    """Whether an earlier run of the same method had the new run's learning rate is not known."""
    write_run("old", settings={"lr": 0.1})
    assert main([str(tmp_path / "old"), "--out", str(tmp_path / "first")]) == 0
    new = write_run("new", ppl=50.0, settings={"lr": 0.1})
    both = tmp_path / "both"
    assert main([str(new), "--out", str(both), "--earlier", str(tmp_path / "first" / "results.csv")]) == 0
    assert list(rows(both)[0]) == list(rows(tmp_path / "first")[0])
    assert [row["ppl/boolq@512"] for row in rows(both)] == ["18.0", "50.0", "100.0"]


def test_restored_models_stay_apart_from_quantized_ones(tmp_path: Path, write_run: WriteRun) -> None:
    document = {"metrics": {"ppl/boolq@512": 50.0}, "merged": {"ppl/boolq@512": 40.0}}
    write_run("old", results=document, preprocess={"name": "restorative_lora"})
    assert main([str(tmp_path / "old"), "--out", str(tmp_path / "first")]) == 0
    new = write_run("new", "rtn", ppl=60.0)
    both = tmp_path / "both"
    assert main([str(new), "--out", str(both), "--earlier", str(tmp_path / "first" / "results.csv")]) == 0
    assert [row["method"] for row in rows(both)] == [
        "none",
        "ptq161+preprocessing, not quantized",
        "rtn",
        "ptq161+preprocessing",
    ]


def test_means_over_seeds_are_left_out(tmp_path: Path, write_run: WriteRun, capsys: pytest.CaptureFixture[str]) -> None:
    for seed in (0, 1):
        write_run(f"old/{seed}", seed=seed, ppl=100.0 + seed)
    assert main([str(tmp_path / "old"), "--out", str(tmp_path / "first")]) == 0
    new, file = write_run("new", "rtn"), tmp_path / "first" / "results.csv"
    assert main([str(new), "--out", str(tmp_path / "both"), "--earlier", str(file)]) == 0
    assert f"1 of the results in {file} are left out: they are means over several seeds." in capsys.readouterr().err
    assert [row["method"] for row in rows(tmp_path / "both")] == ["none", "rtn"]


@pytest.mark.parametrize(
    ("content", "sentence"),
    [
        (None, "cannot be read"),
        ("method,model\n", "has no column 'seeds'"),
        ("method,model,seeds,ppl/boolq@512,commit,run_dir\nrtn,tiny,0,many,,\n", "ppl/boolq@512 is 'many'"),
        ("method,model,seeds,ppl/boolq@512,commit,run_dir\nrtn,tiny,zero,5,,\n", "seeds is 'zero'"),
        ("method,model,seeds,ppl/boolq@512,commit,run_dir\nrtn,tiny,0,,,\n", "it has no score"),
        ("method,model,seeds,ppl/boolq@512,commit,run_dir\n,tiny,0,5,,\n", "it has no method or model"),
    ],
)
def test_what_is_no_table_of_results_is_refused(
    tmp_path: Path, write_run: WriteRun, capsys: pytest.CaptureFixture[str], content: str | None, sentence: str
) -> None:
    run_dir, file = write_run("run"), tmp_path / "earlier.csv"
    if content is not None:
        file.write_text(content)
    assert main([str(run_dir), "--out", str(tmp_path / "out"), "--earlier", str(file)]) == 1
    error = capsys.readouterr().err
    assert sentence in error and error.count("\n") == 1
    assert not (tmp_path / "out").exists()
