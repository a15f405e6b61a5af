"""SHA256SUMS is what sha256sum reads and writes, and finds every change of a listed file."""

from __future__ import annotations

import shutil
import subprocess
from pathlib import Path

import pytest
from hypothesis import given
from hypothesis import strategies as st

from ptq161.errors import UserError
from ptq161.files.checksums import SUMS, check_sums, sums_of, what_is_wrong

CONTENTS = {
    "config.json": b"{}",
    "weights.bin": bytes(range(256)),
    "a name.txt": b"",
    "sub/ü.txt": b"x",
    "README.md": b"#",
}


def fill(folder: Path) -> Path:
    for name, content in CONTENTS.items():
        (folder / name).parent.mkdir(parents=True, exist_ok=True)
        (folder / name).write_bytes(content)
    (folder / SUMS).write_text(sums_of(folder, leave_out=("README.md",)), encoding="utf-8")
    return folder


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    return fill(tmp_path / "folder")


@pytest.mark.skipif(shutil.which("sha256sum") is None, reason="sha256sum is not installed")
def test_sha256sum_reads_the_same_list(folder: Path) -> None:
    def verdict() -> int:
        return subprocess.run(["sha256sum", "--strict", "-c", SUMS], cwd=folder, capture_output=True).returncode

    assert verdict() == 0
    assert len((folder / SUMS).read_text(encoding="utf-8").splitlines()) == len(CONTENTS) - 1
    (folder / "weights.bin").write_bytes(b"")
    assert verdict() == 1


def test_what_is_not_listed_may_change(folder: Path) -> None:
    (folder / "README.md").write_text("edited")
    (folder / "tokenizer.json").write_text("added")
    check_sums(folder, ("config.json",))
    (folder / SUMS).unlink()
    (folder / "config.json").unlink()
    check_sums(folder, ("config.json",))  # a folder of an earlier version


@pytest.mark.parametrize("name", [name for name in CONTENTS if name != "README.md"])
def test_a_listed_file_that_changed_or_is_gone_is_named(folder: Path, name: str) -> None:
    (folder / name).write_bytes(CONTENTS[name] + b"\n")
    with pytest.raises(UserError, match=f"folder is damaged: {name} has another SHA-256 than SHA256SUMS says"):
        check_sums(folder)
    (folder / name).unlink()
    with pytest.raises(UserError, match=rf"folder is damaged: {name} cannot be read \(No such file or directory\)"):
        check_sums(folder)


@pytest.mark.parametrize(
    "content", ["x", "0" * 64 + "  ../out", "0" * 64 + "  /etc/hosts", "0" * 64 + " *config.json", "\n"]
)
def test_a_list_that_is_none_is_refused(folder: Path, content: str) -> None:
    (folder / SUMS).write_text(content)
    with pytest.raises(UserError, match=r"line 1 of SHA256SUMS is no checksum of a file of this folder"):
        check_sums(folder)


@pytest.mark.parametrize("content", [b"", b"\xff\xfe"])
def test_an_empty_list_lacks_what_is_required(folder: Path, content: bytes) -> None:
    (folder / SUMS).write_bytes(content)
    with pytest.raises(UserError, match=r"SHA256SUMS (has no checksum of config\.json|cannot be read)"):
        check_sums(folder, ("config.json",))


@given(st.data())
def test_no_flipped_byte_of_a_listed_file_passes(tmp_path_factory: pytest.TempPathFactory, data: st.DataObject) -> None:
    folder = fill(tmp_path_factory.mktemp("folder"))
    name = data.draw(st.sampled_from([name for name in CONTENTS if CONTENTS[name] and name != "README.md"]))
    position = data.draw(st.integers(0, len(CONTENTS[name]) - 1))
    content = bytearray(CONTENTS[name])
    content[position] ^= data.draw(st.integers(1, 255))
    (folder / name).write_bytes(content)
    with pytest.raises(UserError, match="is damaged"):
        check_sums(folder)


def test_every_bit_of_the_list_itself(tmp_path: Path) -> None:
    """One of them makes a line break a vertical tab, at which ``str.splitlines`` would break a line as well."""
    for name in ("a", "b"):
        (tmp_path / name).write_text(name)
    (tmp_path / SUMS).write_text(sums_of(tmp_path))
    whole = (tmp_path / SUMS).read_bytes()
    unseen = []
    for bit in range(8 * len(whole)):
        damaged = bytearray(whole)
        damaged[bit // 8] ^= 1 << bit % 8
        (tmp_path / SUMS).write_bytes(damaged)
        if what_is_wrong(tmp_path, required=("a", "b")) is None:
            unseen.append(bit)
    assert unseen == []
