"""Two never write into one directory."""

from __future__ import annotations

import threading
from pathlib import Path

import pytest

from ptq161.errors import UserError
from ptq161.tracking.ownership import check_free, owned
from tests.tracking.conftest import OpenRecord
from tests.tracking.owner import in_another_process


def content(folder: Path) -> dict[str, bytes]:
    return {str(path.relative_to(folder)): path.read_bytes() for path in folder.rglob("*") if path.is_file()}


def test_a_record_of_a_live_run_is_not_touched(tmp_path: Path, open_record: OpenRecord) -> None:
    with open_record() as record:
        record.sample("greedy", "text")
        record.finish({"metrics": {}})
    before = content(tmp_path / "run")
    with in_another_process(tmp_path / "run") as process:
        for _ in range(2):
            with pytest.raises(UserError, match=r"run belongs to a run that has not ended: .*\.$"), open_record():
                pass
        assert content(tmp_path / "run") == before
        process.kill()
        process.wait()
        with open_record() as record:  # the lock has gone with its process
            record.finish({"metrics": {}})


def test_two_threads_do_not_share_a_directory_either(tmp_path: Path, open_record: OpenRecord) -> None:
    errors: list[BaseException] = []

    def work() -> None:
        try:
            with open_record():
                pass
        except UserError as error:
            errors.append(error)

    with open_record() as record:
        thread = threading.Thread(target=work)
        thread.start()
        thread.join()
        record.finish({"metrics": {}})
    assert len(errors) == 1


def test_one_process_may_own_a_directory_several_times(tmp_path: Path, open_record: OpenRecord) -> None:
    with owned(tmp_path / "run"):
        with open_record() as record:
            record.finish({"metrics": {}})
        check_free(tmp_path / "run")
        with pytest.raises(AssertionError), in_another_process(tmp_path / "run"):
            pass
    with in_another_process(tmp_path / "run"), pytest.raises(UserError):
        check_free(tmp_path / "run")
    check_free(tmp_path / "run")


def test_a_run_and_a_sweep_are_two_owners(tmp_path: Path) -> None:
    with in_another_process(tmp_path, "sweep"):
        check_free(tmp_path)
        with owned(tmp_path, "run"), pytest.raises(UserError, match="belongs to a sweep that has not ended"):
            check_free(tmp_path, "sweep")


def test_a_free_directory_is_not_made(tmp_path: Path) -> None:
    check_free(tmp_path / "new")
    assert list(tmp_path.iterdir()) == []
