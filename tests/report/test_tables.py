"""Tables of runs, and published figures beside ours."""

from __future__ import annotations

import csv
import io
from pathlib import Path

import pytest

from ptq161.errors import UserError
from ptq161.report.collect import collect
from ptq161.report.published import COLUMNS, Published, compare, read_published
from ptq161.report.tables import csv_comparison, csv_table, markdown_comparison, markdown_table
from tests.report.conftest import WriteRun

BASELINES = Path(__file__).resolve().parents[2] / "experiments" / "baselines" / "published.csv"


def published(method: str = "ptq161", metric: str = "ppl/boolq@512", value: float = 80.0) -> Published:
    return Published("A paper", "Table 6", "tiny", method, "1.61", None, metric, value)


def cells(line: str) -> list[str]:
    return [cell.strip() for cell in line.strip("|").split("|")]


def test_markdown_begins_with_full_precision(write_run: WriteRun) -> None:
    runs = collect([write_run("a", mask_ratio=0.1, ppl=1234.5), write_run("b", "rtn", 3e6, 2.05)]).runs
    header, rule, full, ptq161, rtn = markdown_table(runs).splitlines()
    assert cells(header) == [
        *["method", "model", "mask_ratio", "bits/weight", "nominal"],
        *["ppl/boolq@512", "piqa acc %", "seconds", "commit"],
    ]
    assert len(cells(rule)) == 9
    assert cells(full) == ["full precision", "tiny", "", "16.00", "16.00", "18.00", "66.0", "", "01234567"]
    assert cells(ptq161) == ["ptq161", "tiny", "0.1", "1.70", "1.60", "1234.5 ± 2.50", "55.0", "22", "01234567"]
    assert cells(rtn)[:6] == ["rtn", "tiny", "", "2.05", "1.60", "3e+06 ± 2.50"]


def test_chosen_metrics_alone(write_run: WriteRun) -> None:
    header = markdown_table(collect([write_run("a")]).runs, ["zero_shot/piqa/acc_norm"]).splitlines()[0]
    assert cells(header)[5:-2] == ["piqa acc_norm %"]


def test_csv_has_everything_unrounded(write_run: WriteRun) -> None:
    run_dir = write_run("a", ppl=100 / 3)
    full, row = csv.DictReader(io.StringIO(csv_table(collect([run_dir]).runs)))
    assert (full["method"], full["ppl/boolq@512"], full["ppl/boolq@512 standard_error"]) == ("none", "18.0", "")
    assert float(row["ppl/boolq@512"]) == 100 / 3
    assert (row["ppl/boolq@512 standard_error"], row["zero_shot/piqa/acc_norm"]) == ("2.5", "0.54")
    assert (row["bits_per_weight"], row["checkpoint_bytes"], row["seconds quantize"]) == ("1.7", "1000", "20.5")
    assert (row["mask_ratio"], row["commit"], row["run_dir"]) == ("0.2", "01234567", str(run_dir))


def test_paper_ours_difference(write_run: WriteRun) -> None:
    runs = collect([write_run("a", ppl=100.0), write_run("b", "rtn"), write_run("c", "none")]).runs
    figures = [
        *[published(), published("none", "zero_shot/piqa/acc", 0.7), published("gptq")],
        *[published(metric="ppl/boolq@2048"), published(value=90.0)],
    ]
    comparisons = compare(runs, figures)
    assert [(c.run.method, c.value, c.published.value) for c in comparisons] == [
        *[("ptq161", 100.0, 80.0), ("ptq161", 100.0, 90.0), ("none", 0.66, 0.7)],
    ]
    first, _, third = markdown_comparison(comparisons).splitlines()[2:]
    assert cells(first)[3:] == ["80.00", "100.0", "+20.00 (+25.0 %)", "A paper, Table 6"]
    assert cells(third)[3:6] == ["70.0", "66.0", "-4.0 (-5.7 %)"]
    row = next(csv.DictReader(io.StringIO(csv_comparison(comparisons))))
    assert (row["published"], row["ours"], row["difference"]) == ("80.0", "100.0", "20.0")


def test_the_papers_settings_are_the_papers_method(write_run: WriteRun) -> None:
    runs = collect([write_run("a", "ptq161_paper"), write_run("b", preprocess={"name": "restorative_lora"})]).runs
    assert [c.run.method for c in compare(runs, [published()])] == ["ptq161_paper"]
    assert [c.run.method for c in compare(runs, [published("ptq161+preprocessing")])] == ["ptq161+preprocessing"]


def test_the_published_baselines() -> None:
    figures = read_published(BASELINES)
    found = {(f.model, f.method, f.metric, f.table): f for f in figures}
    assert len({(f.source, f.table, f.model, f.method, f.nominal_bits, f.metric) for f in figures}) == len(figures)
    assert found["llama_7b", "ptq161", "ppl/wikitext2@2048", "Table 6"].value == 20.86
    assert found["llama_7b", "ptq161+preprocessing", "ppl/wikitext2@2048", "Table 1"].value == 12.5
    assert found["opt_6.7b", "billm", "ppl/c4@2048", "Table 6"].value == 39.58
    assert found["llama_7b", "pb_llm", "ppl/c4@2048", "Table 1"].bits == pytest.approx(2.7)
    assert all(figure.source for figure in figures)
    conf = Path(__file__).resolve().parents[2] / "conf" / "model"
    names = {
        line.split(": ")[1] for p in conf.glob("*.yaml") for line in p.read_text().splitlines() if "name: " in line
    }
    assert {figure.model for figure in figures} <= names


def test_the_published_baselines_are_the_shared_ones(shared_dir: Path) -> None:
    with (shared_dir / "data/published/ptq161_paper.csv").open() as stream:
        paper = list(csv.DictReader(stream))
    ours = {(f.model, f.method, f.metric, f"{f.value:.6g}") for f in read_published(BASELINES)}
    rows = [row for row in paper if row["table"] in ("Table 1", "Table 2", "Table 6")]
    assert len(rows) > 400
    for row in rows:
        assert (row["model"], row["method"], row["metric"], f"{float(row['value']):.6g}") in ours


@pytest.mark.parametrize(
    ("content", "told"),
    [
        (None, "cannot be read"),
        ("source,table\n", "has no column 'model'"),
        (f"{','.join(COLUMNS)}\na,b,c,d,1,,ppl/x,much\n", "line 2 of .* is no published figure"),
        (f"{','.join(COLUMNS)}\na,b,c,d,many,,ppl/x,1\n", "line 2 of .* is no published figure"),
        (f"{','.join(COLUMNS)}\na,b\n", "line 2 of .* is no published figure"),
    ],
)
def test_published_figures_that_are_none(tmp_path: Path, content: str | None, told: str) -> None:
    file = tmp_path / "published.csv"
    if content is not None:
        file.write_text(content)
    with pytest.raises(UserError, match=told):
        read_published(file)
