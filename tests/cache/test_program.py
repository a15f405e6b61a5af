"""`python -m ptq161.cache`: what it shows, what it deletes, and what it leaves alone."""

from __future__ import annotations

import os
import time
from pathlib import Path

import pytest

from ptq161.cache.__main__ import main
from ptq161.cache.store import Store, stored_entries

DAY = 86400


@pytest.fixture
def store(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Store:
    """Two scores, one of them last used ten days ago, a result of 2 MB and an unfinished quantization."""
    monkeypatch.setenv("PTQ161_STORE", str(tmp_path / "store"))
    store = Store(tmp_path / "store")
    for seed in (0, 1):
        store.remember("scores", {"seed": seed}, lambda: {"ppl": 20.0})
    with store.entry("results", {"seed": 0}) as entry:
        entry.write("packed.safetensors", bytes(2_000_000))
        entry.finish()
    with store.entry("blocks", {"seed": 0}) as entry:
        entry.write("block_00000.safetensors", bytes(1000))
    ago = time.time() - 10 * DAY
    os.utime(next(entry for entry in stored_entries(store.root) if entry.kind == "scores").folder, (ago, ago))
    return store


def kinds(store: Store) -> list[str]:
    return [entry.kind for entry in stored_entries(store.root)]


def test_what_is_there(store: Store, capsys: pytest.CaptureFixture[str]) -> None:
    assert main([]) == 0
    lines = {line.split()[1]: line.split()[3:] for line in capsys.readouterr().out.splitlines() if line.startswith("│")}
    assert list(lines) == ["blocks", "results", "scores", "all"]
    assert [(cells[0], cells[2]) for cells in lines.values()] == [("1", "1"), ("1", "0"), ("2", "0"), ("4", "1")]
    assert lines["results"][4:6] == ["2.00", "MB"]
    dates = [cell for cell in lines["scores"] if cell.count("-") == 2]
    assert len(dates) == 2 and dates[0] < dates[1]
    assert kinds(store) == ["blocks", "results", "scores", "scores"]


@pytest.mark.parametrize(
    ("options", "left", "message"),
    [
        ("", [], "4 entries"),
        ("--kind scores", ["blocks", "results"], "2 entries"),
        ("--older-than 5", ["blocks", "results", "scores"], "1 entries"),
        ("--older-than 20", ["blocks", "results", "scores", "scores"], "0 entries"),
        ("--unfinished", ["results", "scores", "scores"], "1 entries"),
        ("--kind results --unfinished", ["blocks", "results", "scores", "scores"], "0 entries"),
    ],
)
def test_pruning(options: str, left: list[str], message: str, store: Store, capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["--prune", *options.split()]) == 0
    assert kinds(store) == left
    out = capsys.readouterr().out
    assert message in out and "freed" in out
    assert ("2.00 MB freed" in out) is ("results" not in left)


def test_an_entry_in_use_is_kept(store: Store, capsys: pytest.CaptureFixture[str]) -> None:
    with store.entry("results", {"seed": 0}):
        assert main(["--prune"]) == 0
    assert kinds(store) == ["results"]
    assert "3 entries" in capsys.readouterr().out


def test_an_entry_is_not_old_once_it_is_used_again(store: Store) -> None:
    for seed in (0, 1):
        store.remember("scores", {"seed": seed}, dict)
    assert main(["--prune", "--older-than", "5"]) == 0
    assert len(kinds(store)) == 4


def test_mistakes_are_one_sentence(store: Store, capsys: pytest.CaptureFixture[str]) -> None:
    for arguments, sentence in [
        (["--kind=x"], "--kind=x: the store has no such entries; use one of blocks, results, scores."),
        (["--prune", "--older-than", "-5"], "--older-than -5: use a number of days, 0 or more."),
        (["--prune", "--older-than", "nan"], "--older-than nan: use a number of days, 0 or more."),
        (["--unfinished"], "--older-than and --unfinished select entries to delete: use them with --prune."),
    ]:
        assert main(arguments) == 1
        assert capsys.readouterr().err.strip() == sentence
    assert len(kinds(store)) == 4


def test_an_empty_store(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> None:
    monkeypatch.setenv("PTQ161_STORE", str(tmp_path / "nothing"))
    assert main([]) == 0 and main(["--prune"]) == 0
    assert "0 entries" in capsys.readouterr().out
    assert not (tmp_path / "nothing").exists()
