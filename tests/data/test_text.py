"""Text files as editors and systems write them, and what is no text."""

from __future__ import annotations

import bz2
import codecs
import gzip
import io
import lzma
import os
import zipfile
from collections.abc import Callable
from pathlib import Path

import pytest

from ptq161.data.text import check_text, read_text
from ptq161.errors import UserError

TEXT = "Zwölf Boxkämpfer\n\njagen Viktor 🥊.\n"


def zipped() -> bytes:
    buffer = io.BytesIO()
    with zipfile.ZipFile(buffer, "w") as archive:
        archive.writestr("text.txt", TEXT)
    return buffer.getvalue()


@pytest.mark.parametrize("line_end", ["\n", "\r\n", "\r"])
@pytest.mark.parametrize(
    ("mark", "encoding"),
    [
        (b"", "utf-8"),
        (codecs.BOM_UTF8, "utf-8"),
        (codecs.BOM_UTF16_LE, "utf-16-le"),
        (codecs.BOM_UTF16_BE, "utf-16-be"),
        (codecs.BOM_UTF32_LE, "utf-32-le"),
        (codecs.BOM_UTF32_BE, "utf-32-be"),
    ],
)
def test_the_same_text_in_any_form(tmp_path: Path, mark: bytes, encoding: str, line_end: str) -> None:
    file = tmp_path / "text"
    file.write_bytes(mark + TEXT.replace("\n", line_end).encode(encoding))
    assert read_text("calib.text_file", str(file)) == TEXT
    assert check_text("calib.text_file", str(file)) == file


def test_a_mark_inside_a_text_is_a_character_of_it(tmp_path: Path) -> None:
    file = tmp_path / "text"
    file.write_text("a\ufeffb", encoding="utf-8")
    assert read_text("calib.text_file", str(file)) == "a\ufeffb"


def test_a_home_folder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("HOME", str(tmp_path))
    (tmp_path / "a=b é.txt").write_text(TEXT, encoding="utf-8")
    assert read_text("calib.text_file", "~/a=b é.txt") == TEXT


@pytest.mark.parametrize(
    ("content", "part"),
    [
        (b"", "is empty"),
        (codecs.BOM_UTF8, "is empty"),
        (b" \n\r\n", "is empty"),
        (b"version https://git-lfs.github.com/spec/v1\noid sha256:0\nsize 1\n", "git lfs pull"),
        (gzip.compress(TEXT.encode(), mtime=0), "is a gzip file"),
        (bz2.compress(TEXT.encode()), "is a bzip2 file"),
        (lzma.compress(TEXT.encode()), "is a xz file"),
        (zipped(), "is a zip file"),
        (b"PAR1....", "is a Parquet file"),
        (b"ab\0c", "byte 2 is NUL"),
        (TEXT.encode("utf-16-le"), "is no UTF-8 text: byte 1 is NUL"),
    ],
)
def test_what_the_first_bytes_show_is_refused_early(tmp_path: Path, content: bytes, part: str) -> None:
    file = tmp_path / "text"
    file.write_bytes(content)
    for function in (check_text, read_text):
        assert part in refused(function, str(file))


@pytest.mark.parametrize(
    ("content", "part"),
    [
        (
            b"x" * 5000 + "ä".encode("latin-1"),
            "is not UTF-8 text: byte 5000 is 0xE4 (ä in Latin-1); convert it to UTF-8",
        ),
        (codecs.BOM_UTF8 + b"ab\xff", "is not UTF-8 text: byte 5 is 0xFF"),
        (codecs.BOM_UTF16_LE + b"a\0b", "is not UTF-16-LE text: byte 4 is 0x62"),
        ("€".encode("cp1252") * 3, "byte 0 is 0x80; convert"),
        (b"x" * 5000 + b"\0", "character 5000 is NUL"),
    ],
)
def test_a_wrong_byte_is_named(tmp_path: Path, content: bytes, part: str) -> None:
    file = tmp_path / "text"
    file.write_bytes(content)
    assert part in refused(read_text, str(file))


@pytest.mark.parametrize(
    ("make", "part"),
    [
        (lambda path: None, "there is no such file"),
        (Path.mkdir, "is a folder"),
        (os.mkfifo, "is a pipe or a device"),
        (lambda path: path.symlink_to(path), "cannot be read"),
        (lambda path: path.symlink_to("nowhere"), "there is no such file"),
        (lambda path: path.symlink_to("/dev/null"), "is a pipe or a device"),
    ],
)
def test_what_is_no_file_is_refused_without_waiting(tmp_path: Path, make: Callable[[Path], None], part: str) -> None:
    make(tmp_path / "text")
    assert part in refused(read_text, str(tmp_path / "text"))


def refused(function: Callable[[str, str | None], object], path: str) -> str:
    with pytest.raises(UserError) as caught:
        function("calib.text_file", path)
    sentence = str(caught.value)
    assert sentence.startswith(f"calib.text_file={path}") and sentence.endswith(".") and "\n" not in sentence
    return sentence
