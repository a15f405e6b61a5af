"""The console of the commands: its width where stdout is a terminal, and where it is not."""

from __future__ import annotations

import sys

import pytest

from ptq161.console import stdout_console


def test_a_file_or_a_pipe_is_120_columns_wide(monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture) -> None:
    monkeypatch.setenv("COLUMNS", "40")
    assert not sys.stdout.isatty()  # pytest captures it
    assert stdout_console().width == 120


def test_a_terminal_has_its_own_width(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(sys.stdout, "isatty", lambda: True)
    monkeypatch.setenv("COLUMNS", "40")
    assert stdout_console().width == 40


def test_brackets_are_no_markup(capsys: pytest.CaptureFixture[str]) -> None:
    stdout_console().print("Record: a[/b]/[bold]c")
    assert capsys.readouterr().out == "Record: a[/b]/[bold]c\n"
