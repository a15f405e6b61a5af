"""What is stored of the studies: published figures are those of the collected papers, results name their runs."""

from __future__ import annotations

import csv
from pathlib import Path

import pytest

from ptq161.report.published import read_published

ROOT = Path(__file__).resolve().parents[1]
FILES = sorted((ROOT / "experiments").glob("*/published.csv"))


@pytest.mark.parametrize("file", FILES, ids=lambda file: file.parent.name)
def test_published_figures_are_in_the_collection(file: Path, golden_dir: Path) -> None:
    with (golden_dir / "published" / "ptq161_paper.csv").open() as stream:
        paper = {
            (r["source"], r["table"], r["model"], r["metric"], f"{float(r['value']):.6g}")
            for r in csv.DictReader(stream)
        }
    figures = [figure for figure in read_published(file) if figure.source.startswith("PTQ1.61")]
    assert figures
    assert {(f.source, f.table, f.model, f.metric, f"{f.value:.6g}") for f in figures} <= paper


def test_components_pair_with_the_papers_rows() -> None:
    """A run's method, as tables call it, finds its published figure."""
    figures = read_published(ROOT / "experiments" / "components" / "published.csv")
    wikitext2 = {f.method: f.value for f in figures if f.model == "llama_13b" and f.metric == "ppl/wikitext2@2048"}
    assert wikitext2 == {
        "binarized": 14664.0,
        "mask": 1370.4,
        "binarized+preprocessing": 569.81,
        "mask+scales+angles+cosine": 14.22,
        "mask+scales+angles+preprocessing": 9.98,
        "mask+scales+angles+cosine+preprocessing": 9.67,
    }


@pytest.mark.parametrize("file", sorted((ROOT / "experiments").glob("**/results.csv")), ids=lambda f: f.parent.name)
def test_results_name_their_runs_by_the_command(file: Path) -> None:
    """Not by the folder of the machine on which they were made."""
    with file.open() as stream:
        folders = [folder for row in csv.DictReader(stream) for folder in row["run_dir"].split()]
    assert folders and all(folder.startswith("multirun/") for folder in folders)
