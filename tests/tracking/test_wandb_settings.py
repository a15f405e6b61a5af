"""W&B as its users set it: its own switches, ids of several jobs, and names within its limits."""

from __future__ import annotations

import logging
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest
import wandb

from ptq161.errors import UserError
from ptq161.tracking.settings import TrackerConfig
from ptq161.tracking.wandb_settings import own_run_id, shortened, valid_tags, wandb_mode
from tests.tracking.conftest import OpenRecord
from tests.tracking.wandb_file import read_wandb_file

KEY = "a" * 40
TRACKER = TrackerConfig("wandb")


@pytest.fixture(autouse=True)
def fresh(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture) -> Iterator[None]:
    """A working directory and a process in which W&B has read no settings yet."""
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("WANDB_SILENT", "true")
    caplog.set_level(logging.INFO, "ptq161")
    wandb.teardown()
    yield
    wandb.teardown()


def by_command(verb: str) -> None:
    """`wandb disabled` and the like, as a user types it."""
    subprocess.run([sys.executable, "-m", "wandb", verb], check=True, capture_output=True, stdin=subprocess.DEVNULL)


def by_user_file(verb: str) -> None:
    folder = Path.home() / "wandb"
    folder.mkdir()
    (folder / "settings").write_text(f"[default]\nmode = {verb}\n")


@pytest.mark.parametrize("switch", [by_command, by_user_file])
@pytest.mark.parametrize("login", [False, True])
@pytest.mark.parametrize("verb", ["disabled", "offline"])
def test_its_own_settings_files(
    monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture, switch, login: bool, verb: str
) -> None:
    if login:
        monkeypatch.setenv("WANDB_API_KEY", KEY)
    switch(verb)
    assert wandb_mode(TRACKER) == verb
    (line,) = caplog.messages
    assert "its own settings file" in line and "login" not in line


@pytest.mark.parametrize(
    ("variable", "key", "mode", "reason"),
    [
        (None, None, "offline", "No W&B login was found"),
        (None, KEY, "online", None),
        ("online", KEY, "online", None),
        ("online", None, "offline", "No W&B login was found"),
        ("offline", KEY, "offline", "offline by WANDB_MODE=offline"),
        ("dryrun", KEY, "offline", "offline by WANDB_MODE=dryrun"),
        ("disabled", KEY, "disabled", "switched off by WANDB_MODE=disabled"),
    ],
)
def test_its_variable(
    monkeypatch: pytest.MonkeyPatch,
    caplog: pytest.LogCaptureFixture,
    variable: str | None,
    key: str | None,
    mode: str,
    reason: str | None,
) -> None:
    for name, value in (("WANDB_MODE", variable), ("WANDB_API_KEY", key)):
        if value:
            monkeypatch.setenv(name, value)
    assert wandb_mode(TRACKER) == mode
    assert caplog.messages == [] if reason is None else reason in caplog.messages[0]


def test_the_variable_is_above_the_files_and_the_tracker_above_both(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("WANDB_API_KEY", KEY)
    by_command("disabled")
    monkeypatch.setenv("WANDB_MODE", "offline")
    assert wandb_mode(TRACKER) == "offline"
    assert wandb_mode(TrackerConfig("wandb", mode="online")) == "online"


def test_switched_off_leaves_no_folder(tmp_path: Path, open_record: OpenRecord) -> None:
    by_command("disabled")
    with open_record(tracker=TRACKER) as record:
        record.finish({"metrics": {}})
    assert not (tmp_path / "run" / "wandb").exists()
    assert "switched off" in (tmp_path / "run" / "run.log").read_text()


def test_nothing_is_asked_where_online_is_wanted_without_a_login(caplog: pytest.LogCaptureFixture) -> None:
    assert wandb_mode(TrackerConfig("wandb", mode="online")) == "offline"
    assert "No W&B login" in caplog.messages[0]


def test_names_over_its_limits_are_cut_and_stay_different(tmp_path: Path, open_record: OpenRecord) -> None:
    long = "x" * 200
    ends = ("a", "b")
    tags = [long + end for end in ends] + ["", "t", "t", "ä" * 64]
    seen = []
    for end in ends:
        folder = tmp_path / end
        with open_record(folder, tracker=TRACKER, job_name=long + end, group=long + end, tags=tags) as record:
            record.finish({"metrics": {}})
        seen.append(read_wandb_file(folder).run)
    assert len({run.display_name for run in seen}) == len({run.run_group for run in seen}) == 2
    for run in seen:
        assert len(run.display_name) == len(run.run_group) == 128
        assert len(run.tags) == len(set(run.tags)) == 4 and {"t", "ä" * 64} < set(run.tags)
        assert max(map(len, run.tags)) == 64


@pytest.mark.parametrize("length", [0, 1, 63, 64, 65, 66, 1000])
def test_any_length(length: int) -> None:
    text = "é" * length
    assert len(shortened(text, 64)) == min(length, 64)
    assert (shortened(text, 64) == text) == (length <= 64)
    assert len(valid_tags([text])) == bool(length)


@pytest.mark.parametrize(
    "changes",
    [{"tags": ["x" * 65]}, {"tags": ["a", ""]}, {"project": "x" * 129}, {"project": ""}, {"project": "a/b"}],
)
def test_what_a_user_wrote_is_told_at_once(changes) -> None:
    with pytest.raises(UserError, match=r"^tracker\.(tags|project)[^\n]* W&B takes 1 to [^\n]*\.$"):
        TrackerConfig("wandb", **changes)


def test_the_longest_that_a_user_may_write() -> None:
    assert TrackerConfig("wandb", tags=["x" * 64, "a b/c"], project="ä" * 128).tags[0] == "x" * 64


def test_each_of_several_jobs_has_an_id_of_its_own(
    monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    monkeypatch.delenv("WANDB_RUN_ID", raising=False)
    assert own_run_id(0) == {} and caplog.messages == []
    for shared in ("fixed", "x" * 128):
        monkeypatch.setenv("WANDB_RUN_ID", shared)
        ids = {own_run_id(job)["WANDB_RUN_ID"] for job in range(12)}
        assert len(ids) == 12 and max(map(len, ids)) <= 128 and all(own.startswith(shared[:100]) for own in ids)
    assert "WANDB_RUN_ID=fixed is set for several jobs: job 0 is mirrored as fixed-0." in caplog.messages
