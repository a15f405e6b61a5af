"""Home folders, and paths that begin where they were typed."""

from __future__ import annotations

import pwd
from pathlib import Path

import pytest

from ptq161.errors import UserError
from ptq161.files.paths import absolute_path


@pytest.mark.parametrize(
    ("typed", "meant"),
    [
        ("~", "/home/me"),
        ("~/a b/é=1", "/home/me/a b/é=1"),
        ("x/~", "/base/x/~"),
        ("./~me", "/base/~me"),
        ("model", "/base/model"),
        ("../model", "/base/../model"),
        ("/elsewhere/x", "/elsewhere/x"),
        (".", "/base"),
    ],
)
def test_what_a_path_means(monkeypatch: pytest.MonkeyPatch, typed: str, meant: str) -> None:
    monkeypatch.setenv("HOME", "/home/me")
    assert absolute_path("model.path", typed, "/base") == Path(meant)


def test_another_users_home() -> None:
    user = pwd.getpwuid(0)
    assert absolute_path("model.path", f"~{user.pw_name}/x") == Path(user.pw_dir, "x")
    with pytest.raises(UserError, match=r"^model\.path=~nobody-here/x: no home folder .* ~nobody-here; .*\.$"):
        absolute_path("model.path", "~nobody-here/x")


def test_the_working_directory_is_the_default(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.chdir(tmp_path)
    assert absolute_path("--out", "x") == tmp_path / "x"
