"""Folders that are whole or not there."""

from __future__ import annotations

import errno
import os
from pathlib import Path

import pytest

from ptq161.errors import UserError
from ptq161.files import folders
from ptq161.files.atomic import umask
from ptq161.files.folders import share_file, whole_folder


def write(target: Path, text: str = "new", **arguments: object) -> None:
    with whole_folder(target, "choose another", **arguments) as scratch:  # type: ignore[arg-type]
        assert list(scratch.iterdir()) == []
        (scratch / "config.json").write_text(text)
        (scratch / "below").mkdir()
        (scratch / "below" / "weights").write_bytes(b"0" * 10)
        os.chmod(scratch / "below" / "weights", 0o600)


def tree(folder: Path) -> dict[str, str]:
    return {str(path.relative_to(folder)): path.read_text() for path in folder.rglob("*") if path.is_file()}


WRITTEN = {"config.json": "new", "below/weights": "0" * 10}


@pytest.mark.parametrize("there", ["absent", "deep", "empty", "link"])
def test_a_folder_is_written_as_a_whole(there: str, tmp_path: Path) -> None:
    target = tmp_path / ("a/b/c" if there == "deep" else "target")
    if there == "empty":
        target.mkdir()
    if there == "link":
        (tmp_path / "elsewhere").mkdir()
        target.symlink_to(tmp_path / "elsewhere")
    write(target)
    assert tree(target) == WRITTEN
    assert target.is_symlink() == (there == "link")
    assert not [path for path in tmp_path.rglob(".*")]
    assert (target / "below" / "weights").stat().st_mode & 0o777 == 0o666 & ~umask()
    assert target.resolve().stat().st_mode & 0o777 == 0o777 & ~umask() or there in ("empty", "link")


@pytest.mark.parametrize("there", [False, True])
def test_a_failure_leaves_everything_as_it_was(there: bool, tmp_path: Path) -> None:
    target = tmp_path / "target"
    if there:
        target.mkdir()
    with pytest.raises(RuntimeError), whole_folder(target, "choose another") as scratch:
        (scratch / "half").write_text("")
        raise RuntimeError
    assert os.listdir(tmp_path) == (["target"] if there else [])
    assert not there or os.listdir(target) == []


def test_files_that_are_there_are_kept(tmp_path: Path) -> None:
    (tmp_path / "target").mkdir()
    (tmp_path / "target" / "thesis.tex").write_text("mine")
    with pytest.raises(UserError, match=r"target holds thesis\.tex: choose a new or empty folder"):
        write(tmp_path / "target")
    (tmp_path / "target" / "z").write_text("")
    with pytest.raises(UserError, match=r"holds thesis\.tex and 1 more, which ptq161 did not write"):
        write(tmp_path / "target", may_replace=lambda folder: False)
    with pytest.raises(UserError, match="is a file: name a folder"):
        write(tmp_path / "target" / "z")
    assert tree(tmp_path / "target") == {"thesis.tex": "mine", "z": ""}
    assert os.listdir(tmp_path) == ["target"]


def test_an_earlier_one_is_replaced_as_a_whole(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    write(tmp_path / "target", "old")
    (tmp_path / "target" / "more").write_text("")
    write(tmp_path / "target", may_replace=lambda folder: (folder / "more").exists())
    assert tree(tmp_path / "target") == WRITTEN and os.listdir(tmp_path) == ["target"]
    # Where the last step fails, the earlier one is put back.
    rename = Path.rename

    def refuse(self: Path, target: Path) -> Path:
        if self.suffix == ".tmp":
            raise OSError(errno.EIO, "Input/output error")
        return rename(self, target)

    monkeypatch.setattr(Path, "rename", refuse)
    with pytest.raises(UserError, match="cannot be written"):
        write(tmp_path / "target", "newer", may_replace=lambda folder: True)
    assert tree(tmp_path / "target") == WRITTEN and os.listdir(tmp_path) == ["target"]


def test_what_cannot_be_written_is_one_sentence(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / "file").write_text("")
    with pytest.raises(UserError, match=r"file is a file: name a folder\."):
        write(tmp_path / "file" / "target")

    def full(*_: object, **__: object) -> None:
        raise OSError(errno.EACCES, "Permission denied")

    monkeypatch.setattr(folders.tempfile, "mkdtemp", full)
    with pytest.raises(UserError, match=r"cannot be written \(Permission denied\); choose another\."):
        write(tmp_path / "target")


def test_a_shared_file_is_the_same_and_says_how(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / "a").write_bytes(os.urandom(10_000))
    how = share_file(tmp_path / "a", tmp_path / "b")
    assert (tmp_path / "b").read_bytes() == (tmp_path / "a").read_bytes()
    assert ((tmp_path / "b").stat().st_nlink == 2) == (how == "linked")

    def none(*_: object) -> None:
        raise OSError(errno.EXDEV, "Invalid cross-device link")

    monkeypatch.setattr(os, "link", none)
    monkeypatch.setattr(folders.fcntl, "ioctl", none)
    assert share_file(tmp_path / "a", tmp_path / "c") == "copied"
    assert (tmp_path / "c").read_bytes() == (tmp_path / "a").read_bytes()
    with pytest.raises(FileExistsError):
        share_file(tmp_path / "a", tmp_path / "b")
