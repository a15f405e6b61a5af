"""The store: found by content, one process at a time, and nothing half-written whatever happens."""

from __future__ import annotations

import errno
import json
import logging
import math
import multiprocessing
import os
import resource
import signal
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from ptq161.cache import store as store_module
from ptq161.cache.store import Store, delete_entry, store_dir, stored_entries
from ptq161.errors import UserError
from ptq161.files.fingerprints import key_of
from tests.damage import DAMAGES, Damage

FORK = multiprocessing.get_context("fork")
FINGERPRINT = {"model": {"content": "abc", "n_blocks": None}, "seed": 0}


@pytest.fixture
def store(tmp_path: Path) -> Store:
    return Store(tmp_path / "store")


def names(store: Store) -> list[str]:
    """Everything in the store but locks."""
    found = (path.relative_to(store.root).as_posix() for path in store.root.rglob("*") if path.suffix != ".lock")
    return sorted(name for name in found if "/" in name)


def never() -> dict[str, Any]:
    raise AssertionError("computed although it is stored")


# what an entry is


def test_where_the_store_is(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.setenv("PTQ161_CACHE", str(tmp_path / "cache"))
    monkeypatch.delenv("PTQ161_STORE", raising=False)
    assert store_dir() == tmp_path / "cache" / "store"
    monkeypatch.setenv("PTQ161_STORE", str(tmp_path / "mine"))
    assert store_dir() == tmp_path / "mine"


def test_an_entry_is_a_folder_named_by_its_fingerprint(store: Store) -> None:
    with store.entry("blocks", FINGERPRINT) as entry:
        assert not entry.finished
        entry.write("block.bin", b"1")
        assert entry.folder == store.root / "blocks" / f"{key_of(FINGERPRINT)}.unfinished"
        entry.finish()
        assert entry.finished and entry.folder == store.root / "blocks" / key_of(FINGERPRINT)
    assert json.loads((entry.folder / "fingerprint.json").read_text()) == FINGERPRINT
    with store.entry("blocks", {"seed": 0, "model": {"n_blocks": None, "content": "abc"}}) as again:
        assert again.finished and (again.folder / "block.bin").read_bytes() == b"1"
    for other in ({**FINGERPRINT, "seed": 1}, {**FINGERPRINT, "seed": 0.5}, {**FINGERPRINT, "model": None}):
        with store.entry("blocks", other) as entry:
            assert not entry.finished
    with store.entry("scores", FINGERPRINT) as entry:
        assert not entry.finished


def test_an_unfinished_entry_keeps_its_files_and_an_empty_one_leaves_nothing(store: Store) -> None:
    with pytest.raises(RuntimeError), store.entry("blocks", FINGERPRINT) as entry:
        entry.write("block.bin", b"1")
        raise RuntimeError
    with store.entry("blocks", FINGERPRINT) as entry:
        assert not entry.finished and (entry.folder / "block.bin").read_bytes() == b"1"
    with store.entry("blocks", {"seed": 9}):
        pass
    assert [name for name in names(store) if key_of({"seed": 9}) in name] == []


def test_values_are_computed_once(store: Store) -> None:
    value = {"ppl": 12.345678901234567, "inf": math.inf, "n": 3, "text": "ä", "none": None, "nested": {"a": [1.5]}}
    assert store.remember("scores", FINGERPRINT, lambda: value) == value
    assert store.remember("scores", FINGERPRINT, never) == value
    assert Store(store.root).remember("scores", FINGERPRINT, never) == value


def test_what_raises_is_not_remembered(store: Store) -> None:
    def fail() -> dict[str, Any]:
        raise ValueError("no score")

    with pytest.raises(ValueError, match="no score"):
        store.remember("scores", FINGERPRINT, fail)
    assert names(store) == []
    assert store.remember("scores", FINGERPRINT, lambda: {"a": 1}) == {"a": 1}


def test_force_makes_everything_anew(store: Store) -> None:
    store.remember("scores", FINGERPRINT, lambda: {"a": 1})
    with store.entry("blocks", FINGERPRINT) as entry:
        entry.write("block.bin", b"1")
    forced = Store(store.root, force=True)
    assert forced.remember("scores", FINGERPRINT, lambda: {"a": 2}) == {"a": 2}
    assert store.remember("scores", FINGERPRINT, never) == {"a": 2}
    with forced.entry("blocks", FINGERPRINT) as entry:
        assert not (entry.folder / "block.bin").exists()


def test_a_damaged_value_is_computed_again(store: Store, caplog: pytest.LogCaptureFixture) -> None:
    store.remember("scores", FINGERPRINT, lambda: {"a": 1})
    file = store.root / "scores" / key_of(FINGERPRINT) / "value.json"
    file.write_text(file.read_text()[:-4])
    assert store.remember("scores", FINGERPRINT, lambda: {"a": 2}) == {"a": 2}
    assert "damaged" in caplog.text
    assert store.remember("scores", FINGERPRINT, never) == {"a": 2}


@settings(max_examples=60, deadline=None)
@given(st.data())
def test_whatever_happens_to_a_value_it_is_right_or_computed_again(
    tmp_path_factory: pytest.TempPathFactory, data: st.DataObject
) -> None:
    """A flipped digit is still JSON: only a checksum tells it from the number that was stored."""
    store = Store(tmp_path_factory.mktemp("store"))
    value = {"perplexity": 12.345678901234567, "n_tokens": 4096}
    store.remember("scores", FINGERPRINT, lambda: value)
    folder = store.root / "scores" / key_of(FINGERPRINT)
    name = data.draw(st.sampled_from(["value.json", "SHA256SUMS"]))
    damage: Damage = data.draw(DAMAGES)
    damage(
        folder / name, [folder / other for other in ("value.json", "SHA256SUMS", "fingerprint.json") if other != name]
    )
    if data.draw(st.booleans()):
        (folder / name).unlink()
    assert store.remember("scores", FINGERPRINT, lambda: value) == value
    assert store.remember("scores", FINGERPRINT, never) == value


@settings(max_examples=40, deadline=None)
@given(st.data())
def test_whatever_happens_to_a_fingerprint_is_one_sentence(
    tmp_path_factory: pytest.TempPathFactory, data: st.DataObject
) -> None:
    store = Store(tmp_path_factory.mktemp("store"))
    store.remember("scores", FINGERPRINT, lambda: {"a": 1})
    file = store.root / "scores" / key_of(FINGERPRINT) / "fingerprint.json"
    damage: Damage = data.draw(DAMAGES)
    damage(file, [file.with_name("value.json")])
    try:
        assert store.remember("scores", FINGERPRINT, lambda: {"a": 1}) == {"a": 1}
    except UserError as error:
        assert "\n" not in str(error) and str(error).endswith(".")


def test_a_damaged_fingerprint_is_reported(store: Store) -> None:
    store.remember("scores", FINGERPRINT, lambda: {"a": 1})
    (store.root / "scores" / key_of(FINGERPRINT) / "fingerprint.json").write_text("{")
    with pytest.raises(UserError, match=r"fingerprint\.json is damaged"):
        store.remember("scores", FINGERPRINT, never)


# several processes


def _in_parallel(n: int, work: Callable[[Any, int], None]) -> list[Any]:
    queue = FORK.Queue()
    processes = [FORK.Process(target=work, args=(queue, i)) for i in range(n)]
    for process in processes:
        process.start()
    found = [queue.get(timeout=60) for _ in processes]
    for process in processes:
        process.join(60)
    return found


def test_parallel_processes_compute_once(store: Store) -> None:
    def work(queue: Any, i: int) -> None:
        def compute() -> dict[str, Any]:
            time.sleep(0.3)
            return {"by": i}

        queue.put(store.remember("scores", FINGERPRINT, compute)["by"])

    assert len(set(_in_parallel(6, work))) == 1
    assert names(store) == [f"scores/{key_of(FINGERPRINT)}"] + [
        f"scores/{key_of(FINGERPRINT)}/{name}" for name in ("SHA256SUMS", "fingerprint.json", "value.json")
    ]


def test_waiting_is_logged(store: Store, caplog: pytest.LogCaptureFixture) -> None:
    opened, queue = FORK.Event(), FORK.Queue()

    def hold() -> None:
        with store.entry("blocks", FINGERPRINT) as entry:
            opened.set()
            time.sleep(0.5)
            entry.finish()

    process = FORK.Process(target=hold)
    process.start()
    assert opened.wait(60)
    with caplog.at_level(logging.INFO), store.entry("blocks", FINGERPRINT) as entry:
        assert entry.finished
    assert "waiting for another process" in caplog.text
    process.join(60)
    queue.close()


def test_killed_while_writing_leaves_old_or_new(store: Store) -> None:
    """Killed at many moments, the entry is unfinished or whole, and the next process finishes it."""
    content = os.urandom(300_000)

    def work() -> None:
        for i in range(10_000):
            with store.entry("blocks", {"i": i}) as entry:
                entry.write("a.bin", content)
                entry.write("b.bin", content)
                entry.finish()

    for delay in (0.01, 0.02, 0.03, 0.05, 0.08, 0.13, 0.2):
        process = FORK.Process(target=work)
        process.start()
        time.sleep(delay)
        assert process.pid is not None
        os.kill(process.pid, signal.SIGKILL)
        process.join(60)
        for stored in stored_entries(store.root):
            files = {path.name for path in stored.folder.iterdir()}
            assert not stored.finished or files == {"a.bin", "b.bin", "fingerprint.json", "SHA256SUMS"}
            assert all(path.stat().st_size == len(content) for path in stored.folder.glob("[ab].bin"))
            if "fingerprint.json" not in files:  # killed before it was written; the next process begins anew
                assert not stored.finished
                continue
            with store.entry("blocks", json.loads((stored.folder / "fingerprint.json").read_text())) as entry:
                assert not list(entry.folder.glob(".*"))
                if not entry.finished:
                    entry.finish()
            assert delete_entry(stored if stored.finished else _finished(stored)) is not None


def _finished(stored: store_module.StoredEntry) -> store_module.StoredEntry:
    folder = stored.folder.with_name(stored.folder.name.removesuffix(".unfinished"))
    return store_module.StoredEntry(stored.kind, folder, True, stored.nbytes, stored.used)


# what the operating system refuses


def test_a_full_disk_is_one_sentence(store: Store, monkeypatch: pytest.MonkeyPatch) -> None:
    store.remember("scores", {"a": 1}, lambda: {"a": 1})
    before = names(store)

    def full(*_: object) -> None:
        raise OSError(errno.ENOSPC, "No space left on device")

    monkeypatch.setattr(os, "fsync", full)
    with pytest.raises(UserError, match=r"cannot be written because the disk is full; free space and run again\.$"):
        store.remember("scores", FINGERPRINT, lambda: {"a": 1})
    assert names(store) == before or names(store) == [*before, f"scores/{key_of(FINGERPRINT)}.unfinished"]
    monkeypatch.undo()
    assert store.remember("scores", FINGERPRINT, lambda: {"a": 2}) == {"a": 2}


def test_a_limit_of_the_system_is_one_sentence(store: Store) -> None:
    """A real refusal in the middle of a file, after which nothing of it is left."""

    def work(queue: Any, _: int) -> None:
        signal.signal(signal.SIGXFSZ, signal.SIG_IGN)
        resource.setrlimit(resource.RLIMIT_FSIZE, (10_000, resource.RLIM_INFINITY))
        try:
            with store.entry("blocks", FINGERPRINT) as entry:
                entry.write("small.bin", bytes(100))
                entry.write("large.bin", bytes(100_000))
        except UserError as error:
            queue.put(str(error))

    (sentence,) = _in_parallel(1, work)
    assert "large.bin cannot be written" in sentence and "PTQ161_STORE" in sentence
    (entry,) = stored_entries(store.root)
    assert {path.name for path in entry.folder.iterdir()} == {"fingerprint.json", "small.bin"}


def test_a_store_that_is_no_folder_is_one_sentence(tmp_path: Path) -> None:
    (tmp_path / "file").write_text("")
    with pytest.raises(UserError, match=r"cannot be written \(Not a directory\); set the environment .* cache=false"):
        Store(tmp_path / "file" / "store").remember("scores", FINGERPRINT, never)


def test_a_folder_that_vanishes_is_one_sentence(store: Store) -> None:
    gone = pytest.raises(UserError, match=r"cannot be written \(No such file or directory\)")
    with gone, store.entry("blocks", FINGERPRINT) as entry:
        entry.write("a.bin", b"1")
        os.rename(store.root, store.root.with_name("gone"))
        entry.write("b.bin", b"1")
    with gone, store.entry("x", {}) as entry:
        entry.restart()
        entry.finish()


# what is there


def test_entries_are_listed_and_deleted(store: Store, tmp_path: Path) -> None:
    store.remember("scores", FINGERPRINT, lambda: {"a": 1})
    with store.entry("results", FINGERPRINT) as entry:
        entry.write("own.bin", bytes(1000))
        entry.write("shared.bin", bytes(5000))
        os.link(entry.folder / "shared.bin", tmp_path / "run.bin")
        entry.finish()
    with store.entry("blocks", FINGERPRINT) as entry:
        entry.write("a.bin", bytes(10))
    blocks, results, scores = stored_entries(store.root)
    assert [blocks.kind, results.kind, scores.kind] == ["blocks", "results", "scores"]
    assert [blocks.finished, results.finished, scores.finished] == [False, True, True]
    fingerprint = len((results.folder / "fingerprint.json").read_bytes())
    own = fingerprint + len((results.folder / "SHA256SUMS").read_bytes())
    assert results.nbytes == 6000 + own
    assert abs(results.used - time.time()) < 60
    assert delete_entry(results) == 1000 + own
    assert (tmp_path / "run.bin").read_bytes() == bytes(5000)
    assert delete_entry(blocks) == 10 + fingerprint
    assert [entry.kind for entry in stored_entries(store.root)] == ["scores"]


def test_an_entry_in_use_is_not_deleted(store: Store) -> None:
    def work(queue: Any, _: int) -> None:
        queue.put([delete_entry(entry) for entry in stored_entries(store.root)])

    with store.entry("blocks", FINGERPRINT) as entry:
        entry.write("a.bin", bytes(10))
        assert _in_parallel(1, work) == [[None]]
    assert (entry.folder / "a.bin").exists()


def test_nothing_is_no_error(tmp_path: Path) -> None:
    assert stored_entries(tmp_path / "nothing") == []
