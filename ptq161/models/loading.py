"""Loading models and tokenizers from a folder, an embedded asset or the hub."""

from __future__ import annotations

import json
import logging
from collections.abc import Iterator
from contextlib import contextmanager, nullcontext
from pathlib import Path
from typing import Any

from safetensors import SafetensorError
from transformers import (
    AutoConfig,
    AutoModel,
    AutoModelForCausalLM,
    AutoModelForImageTextToText,
    AutoTokenizer,
    PretrainedConfig,
    PreTrainedModel,
    PreTrainedTokenizerBase,
)
from transformers.utils.hub import cached_file

from ptq161.data.hub import offline_unless_reachable
from ptq161.errors import UserError
from ptq161.files.reading import LFS_POINTER
from ptq161.models.architectures import (
    LANGUAGE_MODELS,
    architecture_from_config,
    decoder_blocks,
    keep_first_blocks,
    quant_method,
)
from ptq161.models.checks import check_not_quantized
from ptq161.models.gguf import dense_folder
from ptq161.models.settings import PACKED_FORMAT, ModelConfig

log = logging.getLogger(__name__)


def is_packed_folder(folder: str | Path) -> bool:
    """Whether ``folder`` is a checkpoint that this project wrote."""
    file = Path(folder) / "config.json"
    return file.is_file() and quant_method(_read_json(file)) == PACKED_FORMAT


def load_model(config: ModelConfig) -> tuple[PreTrainedModel, PreTrainedTokenizerBase]:
    """Load a full-precision model, in its checkpoint's own dtype, and its tokenizer.

    Raises:
        UserError: see :func:`load_tokenizer` and :func:`load_weights`.
    """
    tokenizer, _ = load_tokenizer(config)
    return load_weights(config), tokenizer


def load_tokenizer(config: ModelConfig) -> tuple[PreTrainedTokenizerBase, PretrainedConfig]:
    """Load a model's tokenizer and its own config, without the weights.

    Raises:
        UserError: the folder is missing or not a model, the hub cannot be reached, the architecture is not supported
            or the model is already quantized.
    """
    source, kwargs = source_of(config)
    with loading_errors(config):
        hf_config = AutoConfig.from_pretrained(source, **kwargs)
        architecture_from_config(hf_config)  # raises before the weights are loaded
        check_not_quantized(hf_config)
        with _naming_the_tokenizer():
            return AutoTokenizer.from_pretrained(source, **kwargs), hf_config


def hub_commit(config: ModelConfig) -> str:
    """Resolve a model's name and revision on the hub to a commit.

    Raises:
        UserError: the hub cannot be reached and the model is not in its cache.
    """
    source, kwargs = source_of(config)
    with loading_errors(config):
        file = cached_file(source, "config.json", **kwargs)
    assert file is not None  # cached_file raises where the file is missing
    return Path(file).parent.name  # the hub's cache has a folder for each commit


def load_weights(config: ModelConfig) -> PreTrainedModel:
    """Load a full-precision model, in its checkpoint's own dtype, cut to ``config.n_blocks``.

    Raises:
        UserError: the weights are missing, incomplete or cannot be read.
    """
    source, kwargs = source_of(config)
    with loading_errors(config):
        hf_config = AutoConfig.from_pretrained(source, **kwargs)
        loaded: Any = auto_class(hf_config).from_pretrained(
            source, dtype="auto", output_loading_info=True, ignore_mismatched_sizes=True, **kwargs
        )
        model: PreTrainedModel = loaded[0]
        loading: dict[str, Any] = loaded[1]
        # transformers would fill these in at random.
        wrong = sorted(loading["missing_keys"]) + [key for key, *_ in sorted(loading["mismatched_keys"])]
        if wrong:
            raise ValueError(f"tensor {wrong[0]} is missing from the weights or has another shape than in the config")
    model.eval()
    cut_to(model, config.n_blocks)
    return model


def auto_class(hf_config: PretrainedConfig) -> Any:
    """Return the class of transformers that makes a model of a config.

    A model around a language model is loaded whole: what is evaluated and stored is the model that was given.
    """
    if architecture_from_config(hf_config).diffusion is not None:
        return AutoModel  # under which such models register themselves, head included
    return AutoModelForImageTextToText if hf_config.model_type in LANGUAGE_MODELS else AutoModelForCausalLM


def cut_to(model: PreTrainedModel, n_blocks: int | None) -> None:
    """Keep the first ``n_blocks`` decoder blocks of a model; None keeps all.

    Raises:
        UserError: it has fewer.
    """
    if n_blocks is not None:
        if n_blocks > len(decoder_blocks(model)):
            raise UserError(f"model.n_blocks={n_blocks}: the model has {len(decoder_blocks(model))} blocks.")
        keep_first_blocks(model, n_blocks)


def source_of(config: ModelConfig) -> tuple[str, dict[str, Any]]:
    """Return what transformers is to load a model from, and the arguments that go with it.

    Raises:
        UserError: a folder has no ``config.json``, or holds pointers of git-lfs.
    """
    code: dict[str, Any] = {"trust_remote_code": config.trust_remote_code}  # without a value transformers would ask
    if config.path:
        path = Path(config.path)
        if not (path / "config.json").is_file():
            raise UserError(
                f"model.path={config.path}: no config.json is there; give the folder of a Hugging Face model."
            )
        _check_no_pointers(path)
        return str(path), {"local_files_only": True, **code}
    if config.asset:
        return str(dense_folder(config.asset)), {"local_files_only": True, **code}
    assert config.repo is not None
    return config.repo, {"revision": config.revision, **code} if config.revision else code


def _check_no_pointers(folder: Path) -> None:
    """Check that no file of a folder is only a pointer of git-lfs."""
    for file in sorted(folder.glob("*")):
        if file.suffix in (".safetensors", ".bin", ".json", ".model") and file.is_file():
            with file.open("rb") as opened:
                if opened.read(len(LFS_POINTER)) == LFS_POINTER:
                    raise UserError(f"{file} is a pointer of git-lfs and not the file itself: run git lfs pull there.")


@contextmanager
def _naming_the_tokenizer() -> Iterator[None]:
    try:
        yield
    except (OSError, ValueError, KeyError) as error:
        if "trust_remote_code" in str(error):
            raise
        raise ValueError(f"it has no usable tokenizer ({_first_line(error)})") from error


@contextmanager
def loading_errors(config: ModelConfig) -> Iterator[None]:
    """Turn the errors of loading into a ``UserError``, without retries where the hub cannot be reached."""
    hub = offline_unless_reachable() if config.repo and not (config.path or config.asset) else nullcontext()
    try:
        with hub:
            yield
    except (OSError, ValueError, SafetensorError) as error:
        raise UserError(_cannot_load(config, error)) from error


def _first_line(error: Exception) -> str:
    lines = str(error).strip().splitlines() or [type(error).__name__]
    # The first line may end where a list follows.
    return " ".join(lines[:2] if lines[0].endswith(":") else lines[:1]).rstrip(".")


def _cannot_load(config: ModelConfig, error: Exception) -> str:
    if "trust_remote_code" in str(error):
        return (
            f"model {config.path or config.asset or config.repo} comes with code of its own (auto_map), "
            "and none of it is run; use a model whose architecture and tokenizer are part of transformers, or read the "
            "code, and set model.trust_remote_code=true if you trust it."
        )
    reason = _first_line(error)
    if config.path or config.asset:
        return f"model {config.path or config.asset} cannot be loaded: {reason}."
    return (
        f"model {config.repo} cannot be loaded from the Hugging Face hub ({reason}); "
        "use model=smollm2_135m, or model.path=FOLDER for a local copy."
    )


def _read_json(file: Path) -> dict[str, Any]:
    try:
        content = json.loads(file.read_text(encoding="utf-8"))
    except (OSError, ValueError) as error:  # not JSON, not UTF-8
        raise UserError(f"{file} cannot be read as JSON: {error}.") from error
    if not isinstance(content, dict):
        raise UserError(f"{file} is not the configuration of a model: it holds no JSON object.")
    return content
