"""The embedded GGUF model as a plain Hugging Face folder in the cache.

Dequantizing a GGUF file takes transformers half a minute, reading the result less than a second, so it is done once.
"""

from __future__ import annotations

import logging
import shutil
import tempfile
from pathlib import Path

import transformers
from filelock import FileLock
from transformers import AutoModelForCausalLM, AutoTokenizer, GgufConfig

from ptq161.data import assets
from ptq161.files.hashing import sha256_of_file
from ptq161.files.paths import cache_dir

log = logging.getLogger(__name__)

_WEIGHTS = "model.safetensors"
_CHECKSUM = "model.safetensors.sha256"


def dense_folder(asset: str) -> Path:
    """Return a folder with the asset's model in float32 and its tokenizer; convert it if it is missing or damaged.

    Raises:
        UserError: the asset cannot be fetched.
    """
    gguf = sorted(assets.fetch(asset).rglob("*.gguf"))[0]
    # The converted model depends on the version of transformers.
    name = f"{asset}-{assets.ASSETS[asset].version}-transformers-{transformers.__version__}"
    folder = cache_dir() / "dense" / name
    folder.parent.mkdir(parents=True, exist_ok=True)
    with FileLock(f"{folder}.lock"):
        if not _intact(folder):
            _convert(gguf, folder)
    return folder


def _intact(folder: Path) -> bool:
    weights, checksum = folder / _WEIGHTS, folder / _CHECKSUM
    if not (weights.is_file() and checksum.is_file()):
        return False
    if sha256_of_file(weights) == checksum.read_text(encoding="utf-8"):
        return True
    log.warning("%s has a wrong checksum; the GGUF file is converted again", weights)
    return False


def _convert(gguf: Path, folder: Path) -> None:
    log.info("dequantizing %s (once, half a minute)", gguf.name)
    model = AutoModelForCausalLM.from_pretrained(
        gguf.parent,
        gguf_file=gguf.name,
        dtype="auto",
        quantization_config=GgufConfig(dequantize=True),
        trust_remote_code=False,
    )
    tokenizer = AutoTokenizer.from_pretrained(gguf.parent, gguf_file=gguf.name, trust_remote_code=False)
    with tempfile.TemporaryDirectory(dir=folder.parent) as temporary:
        made = Path(temporary) / "model"
        model.save_pretrained(made)
        tokenizer.save_pretrained(made)
        (made / _CHECKSUM).write_text(sha256_of_file(made / _WEIGHTS), encoding="utf-8")
        shutil.rmtree(folder, ignore_errors=True)
        made.rename(folder)
