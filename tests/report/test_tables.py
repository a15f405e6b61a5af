"""Tables of runs, and published figures beside ours."""

from __future__ import annotations

import csv
import io
import json
from pathlib import Path

import pytest

from ptq161.errors import UserError
from ptq161.report.collect import collect
from ptq161.report.published import COLUMNS, FURTHER_COLUMNS, Published, compare, read_published
from ptq161.report.results import Results, results_of
from ptq161.report.tables import (
    best_cells,
    csv_comparison,
    csv_table,
    latex_table,
    markdown_comparison,
    markdown_table,
    result_table,
)
from tests.report.conftest import FULL, WriteRun

BASELINES = Path(__file__).resolve().parents[2] / "experiments" / "baselines" / "published.csv"


def published(method: str = "ptq161", metric: str = "ppl/boolq@512", value: float = 80.0) -> Published:
    return Published("A paper", "Table 6", "tiny", method, "1.61", None, metric, value)


def results(*folders: Path) -> Results:
    return results_of(collect(folders).runs)


def cells(line: str) -> list[str]:
    return [cell.strip() for cell in line.strip("|").split("|")]


def test_markdown_begins_with_full_precision(write_run: WriteRun) -> None:
    table = result_table(results(write_run("a", mask_ratio=0.1, ppl=1234.5), write_run("b", "rtn", 3e6, 2.05)))
    header, rule, full, ptq161, rtn = markdown_table(table).splitlines()
    before = ["method", "model", "mask_ratio", "calibration text", "bits/weight", "nominal"]
    assert cells(header) == [*before, "ppl/boolq@512", "piqa acc %", "seconds", "GB", "commit"]
    assert len(cells(rule)) == 11
    assert cells(full)[:7] == ["full precision", "tiny", "", "none", "16.00", "16.00", "18.00"]
    assert cells(full)[7:] == ["66.0", "", "", "01234567"]
    assert cells(ptq161)[:7] == ["ptq161", "tiny", "0.1", "squad", "1.70", "1.60", "1234.5 ± 2.50"]
    assert cells(ptq161)[7:] == ["55.0", "22", "2.50", "01234567"]
    assert cells(rtn)[:7] == ["rtn", "tiny", "", "squad", "2.05", "1.60", "3e+06 ± 2.50"]


def test_chosen_metrics_alone(write_run: WriteRun) -> None:
    header = markdown_table(result_table(results(write_run("a")), ["zero_shot/piqa/acc_norm"])).splitlines()[0]
    assert cells(header)[6:-3] == ["piqa acc_norm %"]


def test_csv_has_everything_unrounded(write_run: WriteRun) -> None:
    run_dir = write_run("a", ppl=100 / 3)
    full, row = csv.DictReader(io.StringIO(csv_table(results(run_dir))))
    assert (full["method"], full["ppl/boolq@512"], full["ppl/boolq@512 standard_error"]) == ("none", "18.0", "")
    assert float(row["ppl/boolq@512"]) == 100 / 3
    assert (row["ppl/boolq@512 standard_error"], row["zero_shot/piqa/acc_norm"]) == ("2.5", "0.54")
    assert (row["bits_per_weight"], row["checkpoint_bytes"], row["seconds quantize"]) == ("1.7", "1000", "20.5")
    assert (row["mask_ratio"], row["commit"], row["run_dir"]) == ("0.2", "01234567", str(run_dir))


def test_csv_names_the_bits_of_activations_where_a_run_rounds_them(write_run: WriteRun) -> None:
    plain, rounding = write_run("a"), write_run("b", "qdrop")
    assert "activation_bits" not in next(csv.DictReader(io.StringIO(csv_table(results(plain)))))
    file = rounding / "results.json"
    stored = json.loads(file.read_text())
    stored["metrics"]["activation_bits"] = 8
    file.write_text(json.dumps(stored))
    rows = {
        row["method"]: row["activation_bits"]
        for row in csv.DictReader(io.StringIO(csv_table(results(plain, rounding))))
    }
    assert rows == {"none": "", "ptq161": "", "qdrop": "8.0"}


def test_several_seeds_are_a_row_with_an_interval(write_run: WriteRun) -> None:
    folders = [write_run(f"s{seed}", seed=seed, ppl=ppl) for seed, ppl in enumerate((90.0, 100.0, 110.0))]
    found = results(*folders, write_run("rtn", "rtn", 565.0))
    header, _, _, ptq161, rtn = markdown_table(result_table(found)).splitlines()
    seeds, ppl = cells(header).index("seeds"), cells(header).index("ppl/boolq@512")
    assert (cells(ptq161)[seeds], cells(ptq161)[ppl]) == ("3", "100.0 [90.00, 110.0]")
    assert (cells(rtn)[seeds], cells(rtn)[ppl]) == ("1", "565.0 ± 2.50")
    _, row, alone = csv.DictReader(io.StringIO(csv_table(found)))
    assert (row["seeds"], row["ppl/boolq@512"], row["ppl/boolq@512 low"]) == ("0 1 2", "100.0", "90.0")
    assert (row["ppl/boolq@512 standard_error"], alone["ppl/boolq@512 low"]) == ("", "")
    assert row["run_dir"] == " ".join(map(str, folders))


def test_the_best_of_each_model_is_marked_among_quantized_results(write_run: WriteRun) -> None:
    folders = [write_run("a", ppl=50.0, bits=2.5), write_run("b", "rtn", 60.0, 2.0), write_run("c", "none")]
    folders.append(write_run("d", "gptq", 10.0, 9.0, model={"name": "other", "path": None}))
    found = results(*folders)
    cells = best_cells(result_table(found), found)
    best = {(found.rows.method[row], heading) for (row, heading), is_best in cells.stack().items() if is_best}
    assert best >= {("ptq161", "ppl/boolq@512"), ("rtn", "bits/weight")}
    assert not {method for method, _ in best} & {"none", "gptq"}  # a model's only result is no best one
    assert ("rtn", "ppl/boolq@512") not in best and ("ptq161", "bits/weight") not in best


def test_latex_is_escaped_and_printed_without_what_is_no_result(write_run: WriteRun) -> None:
    folders = [write_run("a", mask_ratio=0.1, ppl=50.0), write_run("b", mask_ratio=0.2, ppl=60.0)]
    found = results(*folders)
    text = latex_table(result_table(found), found)
    lines = text.splitlines()
    assert lines[1] == r"\begin{tabular}{llllrrrr}"
    before = r"method & model & mask\_ratio & calibration text"
    assert lines[3] == rf"{before} & bits/weight & nominal & ppl/boolq@512 & piqa acc \% \\"
    assert [line for line in lines if "rule" in line] == [r"\toprule", r"\midrule", r"\midrule", r"\bottomrule"]
    assert r"\textbf{50.00} \textpm{} 2.50" in text and r"\textbf{60.00}" not in text
    assert "01234567" not in text


def test_scores_of_the_preprocessed_model_follow_full_precision(write_run: WriteRun) -> None:
    document = {"metrics": {"ppl/boolq@512": 99.0}, "full_precision": FULL, "merged": {"ppl/boolq@512": 21.0}}
    run = write_run("a", preprocess={"name": "restorative_lora"}, results={**document, "protocol": {}})
    table = result_table(results(run))
    assert list(table.text["method"]) == [
        "full precision",
        "ptq161+preprocessing, not quantized",
        "ptq161+preprocessing",
    ]
    assert list(table.text["ppl/boolq@512"]) == ["18.00", "21.00", "99.00"]
    assert list(table.value["ppl/boolq@512"]) == [18.0, 21.0, 99.0]


def test_a_score_that_is_not_a_number_is_no_missing_one(write_run: WriteRun) -> None:
    other = {"metrics": {"ppl/c4@512": 50.0}, "full_precision": {}, "protocol": {}}
    found = results(write_run("a", ppl=float("nan")), write_run("b", "rtn", results=other)).quantized
    assert list(result_table(found).text["ppl/boolq@512"]) == ["nan", ""]
    assert [row["ppl/boolq@512"] for row in csv.DictReader(io.StringIO(csv_table(found)))] == ["nan", ""]


def test_bars_and_line_breaks_do_not_break_a_table(write_run: WriteRun) -> None:
    folders = [write_run(str(i), settings={"text": text}) for i, text in enumerate(("a|b", "c\nd"))]
    *_, first, second = markdown_table(result_table(results(*folders))).splitlines()
    assert "a\\|b" in first and "c d" in second


def test_paper_ours_difference(write_run: WriteRun) -> None:
    found = results(write_run("a", ppl=100.0), write_run("b", "rtn"), write_run("c", "none"))
    figures = [
        published(),
        published("none", "zero_shot/piqa/acc", 0.7),
        published("gptq"),
        published(metric="ppl/boolq@2048"),
        published(value=90.0),
    ]
    compared = compare(found, figures)
    assert list(compared[["method", "ours", "published"]].itertuples(index=False, name=None)) == [
        ("none", 0.66, 0.7),
        ("ptq161", 100.0, 80.0),
        ("ptq161", 100.0, 90.0),
    ]
    full, first, _ = (line for line in markdown_comparison(compared).splitlines() if "A paper" in line)
    assert cells(first)[2:] == ["squad", "ppl/boolq@512", "80.00", "100.0", "+20.00 (+25.0 %)", "A paper, Table 6"]
    assert (cells(full)[2], cells(full)[4:7]) == ("none", ["70.0", "66.0", "-4.0 (-5.7 %)"])
    _, row, _ = csv.DictReader(io.StringIO(csv_comparison(compared)))
    assert (row["published"], row["ours"], row["difference"]) == ("80.0", "100.0", "20.0")


def test_the_papers_settings_are_the_papers_method(write_run: WriteRun) -> None:
    found = results(write_run("a", "ptq161_paper"), write_run("b", preprocess={"name": "restorative_lora"}))
    assert list(compare(found, [published()]).method) == ["ptq161_paper"]
    assert list(compare(found, [published("ptq161+preprocessing")]).method) == ["ptq161+preprocessing"]


def test_the_published_baselines() -> None:
    figures = read_published(BASELINES)
    found = {(f.model, f.method, f.metric, f.table): f for f in figures}
    keys = {(f.source, f.table, f.model, f.method, f.bits, f.metric, f.training_tokens) for f in figures}
    assert len(keys) == len(figures)
    assert found["llama_7b", "ptq161", "ppl/wikitext2@2048", "Table 6"].value == 20.86
    assert found["llama_7b", "ptq161+preprocessing", "ppl/wikitext2@2048", "Table 1"].value == 12.5
    assert found["opt_6.7b", "billm", "ppl/c4@2048", "Table 6"].value == 39.58
    assert found["llama_7b", "pb_llm", "ppl/c4@2048", "Table 1"].bits == pytest.approx(2.7)
    assert all(figure.source for figure in figures)
    conf = Path(__file__).resolve().parents[2] / "conf" / "model"
    names = {
        line.split(": ")[1] for p in conf.glob("*.yaml") for line in p.read_text().splitlines() if "name: " in line
    }
    assert {figure.model for figure in figures} - names == {"qwen3_0_6b_base", "llama3_2_1b"}  # of NanoQuant alone


def test_the_published_baselines_are_the_collected_ones(golden_dir: Path) -> None:
    with (golden_dir / "published" / "ptq161_paper.csv").open() as stream:
        paper = list(csv.DictReader(stream))
    ours = {(f.model, f.method, f.metric, f"{f.value:.6g}") for f in read_published(BASELINES)}
    rows = [row for row in paper if row["table"] in ("Table 1", "Table 2", "Table 6")]
    assert len(rows) > 400
    for row in rows:
        assert (row["model"], row["method"], row["metric"], f"{float(row['value']):.6g}") in ours


def test_the_field_of_2026_is_published_with_true_bits_and_calibration_text(golden_dir: Path) -> None:
    with (golden_dir / "published" / "field_2026.csv").open() as stream:
        field = list(csv.DictReader(stream))
    ours = {
        (f.model, f.method, f.measured_bits, f.metric, f.value, f.calibration_text, f.training_tokens)
        for f in read_published(BASELINES)
    }
    assert len(field) > 30
    for row in field:
        bits = float(row["true_bits"]) if row["true_bits"] else None
        metric, value = f"ppl/wikitext2@{row['context']}", float(row["ppl_wikitext2"])
        text, tokens = row["calibration_text"] or "unknown", row["training_tokens"]
        assert (row["model"], row["method"], bits, metric, value, text, tokens) in ours


def test_figures_of_different_calibration_texts_are_never_in_one_table(write_run: WriteRun, tmp_path: Path) -> None:
    file = tmp_path / "published.csv"
    lines = [
        "A paper,,tiny,ptq161,1.61,,ppl/boolq@512,80,wikitext2,1M",
        "A paper,,tiny,ptq161,1.61,,ppl/boolq@512,90,c4,",
    ]
    lines += ["A paper,,tiny,none,16,,ppl/boolq@512,18,,", "B,,tiny,ptq161,1.61,,ppl/boolq@512,85,wikitext2,"]
    file.write_text("\n".join([",".join((*COLUMNS, *FURTHER_COLUMNS)), *lines]))
    compared = compare(results(write_run("a", ppl=100.0), write_run("b", "none", ppl=20.0)), read_published(file))
    tables = markdown_comparison(compared).split("Published figures, ")
    assert tables[0] == "" and [len(table.splitlines()) for table in tables[1:]] == [6, 7, 5]
    assert [table.partition(":")[0] for table in tables[1:]] == [
        "which need no calibration",
        "calibrated on wikitext2",
        "calibrated on c4",
    ]
    texts = [row["published_text"] for row in csv.DictReader(io.StringIO(csv_comparison(compared)))]
    assert texts == ["none", "wikitext2", "c4", "wikitext2"]


@pytest.mark.parametrize(
    ("content", "message"),
    [
        (None, "cannot be read"),
        ("source,table\n", "has no column 'model'"),
        (f"{','.join(COLUMNS)}\na,b,c,d,1,,ppl/x,much\n", "line 2 of .* is no published figure"),
        (f"{','.join(COLUMNS)}\na,b,c,d,many,,ppl/x,1\n", "line 2 of .* is no published figure"),
        (f"{','.join(COLUMNS)}\na,b\n", "line 2 of .* is no published figure"),
    ],
)
def test_published_figures_that_are_none(tmp_path: Path, content: str | None, message: str) -> None:
    file = tmp_path / "published.csv"
    if content is not None:
        file.write_text(content)
    with pytest.raises(UserError, match=message):
        read_published(file)
