"""Which text a run has seen, and that a report ranks no results of different texts together without a word."""

from __future__ import annotations

import csv
import io
import pkgutil
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import yaml

from ptq161.report.__main__ import main
from ptq161.report.collect import collect
from ptq161.report.details import chosen_runs
from ptq161.report.results import Results, results_of
from ptq161.report.score_figures import bits_figure, variants_figure
from ptq161.report.tables import best_cells, csv_table, latex_table, markdown_table, result_table
from ptq161.report.texts import TEXT_FREE, remark, text_seen
from tests.report.conftest import WriteRun

ROOT = Path(__file__).parents[2]
PPL = "ppl/boolq@512"
C4 = {"calib": {"name": "c4", "n_samples": 128}}
RTN = {"_target_": "ptq161.methods.rtn.RTN"}
FILE = {"calib.name": "text_file", "calib.text_file": "/texts/notes.txt"}


@pytest.mark.parametrize(
    ("changed", "facts", "text"),
    [
        ({}, {}, "squad"),
        ({"method.name": "none"}, {}, "none"),
        ({"method._target_": "ptq161.methods.rtn.RTN"}, {}, "none"),
        ({"method._target_": "ptq161.methods.gptq.GPTQ"}, {}, "squad"),
        ({"method._target_": "ptq161.methods.waterfill.Waterfill"}, {}, "squad"),
        ({"method._target_": "ptq161.methods.of_another_version.RTN"}, {}, "squad"),
        ({"method._target_": "antigravity.RTN"}, {}, "squad"),
        (FILE, {}, "text_file notes.txt"),
        (FILE, {"text_files": {"calib": "0123456789abcdef"}}, "text_file 01234567"),
        ({"preprocess.name": "lora", "preprocess.corpora": ["squad", "drop"]}, {}, "drop, squad"),
        ({"preprocess.name": "none", "preprocess.corpora": ["drop"]}, {}, "squad"),
        ({"finetune.corpora": ["coqa"]}, {}, "coqa, squad"),
        ({"calib.name": "passages"}, {}, "coqa, drop, squad"),
        ({"finetune.name": "none", "finetune.corpora": ["coqa"]}, {}, "squad"),
        ({"finetune.text": "corpora", "finetune.corpora": ["coqa"]}, {}, "coqa, squad"),
        ({"finetune.text": "self", "finetune.corpora": ["coqa"]}, {}, "sampled from the model, squad"),
        (
            {"preprocess.corpora": ["text_file"], "preprocess.text_file": "a.txt"},
            {"text_files": {"preprocess": "fedcba9876543210"}},
            "squad, text_file fedcba98",
        ),
        (
            {"finetune.corpora": ["passages"], "finetune.text_file": "a.txt"},
            {"text_files": {"finetune": "fedcba9876543210"}},
            "squad, text_file fedcba98",
        ),
    ],
)
def test_the_text_that_a_run_has_seen(changed: dict[str, Any], facts: dict[str, Any], text: str) -> None:
    config = {"method.name": "some", "calib.name": "squad", "calib.text_file": None, "preprocess.name": "some"}
    assert text_seen(config | changed, facts) == text


def test_the_methods_without_data_are_those_whose_classes_say_so() -> None:
    nodes = [yaml.safe_load(file.read_text()) for file in (ROOT / "conf/method").glob("*.yaml")]
    targets = {str(node["_target_"]) for node in nodes if "_target_" in node}
    assert len(targets) > 8
    free = {target for target in targets if not getattr(pkgutil.resolve_name(target), "needs_statistics", True)}
    assert free == set(TEXT_FREE)


def test_a_report_does_without_torch(tmp_path: Path, write_run: WriteRun) -> None:
    folder = write_run("one").parent
    script = f"import sys; from ptq161.report.__main__ import main; main(['{folder}', '--out', '{tmp_path}/out'])"
    command = [sys.executable, "-c", f"{script}; sys.exit('torch' in sys.modules)"]
    assert subprocess.run(command).returncode == 0


def test_a_method_without_data_has_seen_what_its_weights_were_trained_on() -> None:
    config = {"method.name": "rtn", "method._target_": RTN["_target_"], "calib.name": "c4"}
    assert text_seen({**config, "preprocess.corpora": ["squad"]}, {}) == "squad"


def test_what_a_stored_checkpoint_has_seen_is_unknown() -> None:
    assert text_seen({"model.name": "tiny"}, {}) == "unknown"


@pytest.fixture
def mixed(write_run: WriteRun) -> list[Path]:
    """Two results on squad and two on c4, all of whose perplexities are below those on squad; and one without text."""
    return [
        write_run("a", ppl=90.0, bits=1.7),
        write_run("b", "gptq", 80.0, 2.0),
        write_run("c", ppl=30.0, bits=1.7, **C4),
        write_run("d", "gptq", 20.0, 2.0, **C4),
        write_run("e", "rtn", 85.0, 1.6, settings=RTN),
    ]


def results(folders: list[Path]) -> Results:
    return results_of(collect(folders).runs)


def test_each_text_has_a_best_of_its_own(mixed: list[Path]) -> None:
    found = results(mixed)
    best = best_cells(result_table(found), found)
    assert list(found.rows.method[best[PPL]] + " " + found.rows.calibration_text[best[PPL]]) == [
        "gptq squad",
        "gptq c4",
    ]
    assert list(found.rows.method[best["bits/weight"]]) == ["rtn"]  # needs no text: it is in both comparisons


def test_each_text_has_a_front_of_its_own(mixed: list[Path]) -> None:
    figure = bits_figure(results(mixed), [PPL])
    fronts = {trace.text[-1]: list(trace.y) for trace in figure.data if trace.name == "Pareto front"}
    assert fronts == {"front of squad": [85.0, 80.0], "front of c4": [85.0, 30.0, 20.0]}
    assert list(chosen_runs(results(mixed), 4)) == ["gptq calib=squad", "ptq161 calib=c4", "gptq calib=c4", "rtn"]


def test_methods_on_different_texts_say_so_in_their_figure(write_run: WriteRun) -> None:
    found = results([write_run("a"), write_run("b", "gptq", **C4), write_run("c", "rtn", settings=RTN)])
    assert {trace.name for trace in variants_figure(found, "method", [PPL]).data} >= {"on squad", "on c4", ""}


def test_the_sentence_stands_beside_every_ranking(mixed: list[Path], tmp_path: Path) -> None:
    found = results(mixed)
    sentence = remark(found.quantized.rows)
    assert "(c4; squad)" in sentence
    table = result_table(found)
    assert sentence in markdown_table(table) and sentence in latex_table(table, found)
    rows = csv.DictReader(io.StringIO(csv_table(found)))
    assert [row["calibration_text"] for row in rows] == ["none", "squad", "squad", "c4", "c4", "none"]
    assert main([*map(str, mixed), "--out", str(tmp_path / "out")]) == 0
    page = (tmp_path / "out" / "index.html").read_text()
    assert page.count("<figcaption>") >= 2
    assert page.count(sentence) == 5  # the table's note; caption and description of two figures
    assert "lowest ppl/boolq@512, tiny, calibration text c4" in page
    assert sentence in (tmp_path / "out" / "table.md").read_text()


def test_nothing_is_said_where_all_texts_agree(write_run: WriteRun) -> None:
    folders = [write_run("a"), write_run("b", "gptq"), write_run("c", "rtn", settings=RTN)]
    found = results(folders)
    assert remark(found.quantized.rows) == "" == result_table(found).note
    (front,) = (trace for trace in bits_figure(found, [PPL]).data if trace.name == "Pareto front")
    assert front.mode == "lines" and front.text is None


def test_texts_that_nobody_knows_are_not_known_to_agree(write_run: WriteRun) -> None:
    folders = [write_run("a"), write_run("b")]
    for number, folder in enumerate(folders):
        (folder / "config.yaml").write_text(f"model: {{name: tiny}}\nseed: {number}\neval: {{limit: {number}}}\n")
    assert "(unknown)" in remark(results(folders).quantized.rows)
