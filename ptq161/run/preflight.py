"""Checks of a run before anything is loaded: its configuration, and the files that it names."""

from __future__ import annotations

import os
import tempfile
from collections.abc import Sequence
from pathlib import Path

from omegaconf import DictConfig, OmegaConf

from ptq161.cache.store import STORE_VARIABLE, store_dir
from ptq161.data.text import check_text
from ptq161.errors import UserError
from ptq161.evaluation.settings import EvalConfig
from ptq161.files.paths import absolute_path
from ptq161.finetune.tuning import Tuning
from ptq161.methods.base import PlanningMethod
from ptq161.run.config import RunConfig, load_run_config, nothing_quantized
from ptq161.training.settings import Training

QUANTIZATION = ("method", "mask_ratio", "block_size", "calib", "preprocess", "finetune", "recipe")
"""Keys that configure the quantization; they are refused for a model that is already quantized, but for adapters."""

_PATHS = ("model.path", "calib.text_file", "eval.text_file", "preprocess.text_file", "finetune.text_file")


def make_paths_absolute(cfg: DictConfig, base: str | Path = ".") -> None:
    """Make the paths of a composed config absolute, in place; nothing after this depends on the working directory.

    Args:
        cfg: the composed config.
        base: the folder in which the command was typed, which is not the working directory of a job whose
            ``hydra.job.chdir`` is true.

    Raises:
        UserError: there is no home folder for a ``~``.
    """
    for key in _PATHS:
        # Values of other types are refused later, and one that cannot be resolved as well.
        path = OmegaConf.select(cfg, key, throw_on_resolution_failure=False)
        if isinstance(path, str) and path:
            OmegaConf.update(cfg, key, str(absolute_path(key, path, base)))


def checked_config(cfg: DictConfig, overrides: Sequence[str]) -> RunConfig:
    """Turn a composed config into a :class:`~ptq161.run.config.RunConfig`, and check that its files exist.

    Args:
        cfg: the composed config.
        overrides: of the command line.

    Raises:
        UserError: a key or value is wrong, a file or folder is missing, or a packed checkpoint would be quantized.
    """
    config = load_run_config(cfg)
    if config.calib.name == "text_file" and config.method is not None:
        check_text("calib.text_file", config.calib.text_file)
    if "text_file" in config.eval.corpora:
        check_text("eval.text_file", config.eval.text_file)
    for training in (config.preprocess, config.finetune):
        if training is not None and "text_file" in training.corpora_read:
            _check_training_file(training, config.eval)
    if config.model.path is not None:
        _check_model_folder(config.model.path, overrides, unread_of_packed(config))
    if config.method is None and config.finetune is not None and not _is_packed(config.model.path):
        raise UserError(nothing_quantized("finetune", config.finetune_name))
    if config.model.embedding_bits != 16:
        _check_embedding_bits(config)
    if config.model.stream and not _is_packed(config.model.path):
        _check_stream(config)
    return config


def unread_of_packed(config: RunConfig) -> tuple[str, ...]:
    """Return the keys that a run of a model that is already quantized does not read; adapters are trained on any."""
    return tuple(key for key in QUANTIZATION if key != "finetune" or not isinstance(config.finetune, Tuning))


def name_local_model(cfg: DictConfig, overrides: Sequence[str]) -> None:
    """Name the model of ``model.path`` after its folder, in place: the configured name is that of another model."""
    named = any(override.lstrip("+").startswith("model.name=") for override in overrides)
    path = OmegaConf.select(cfg, "model.path")
    if path and not named:
        cfg.model.name = Path(os.path.abspath(path)).name  # without .., which is no name


def check_store() -> None:
    """Check that the store can be written, and let a relative ``PTQ161_STORE`` mean one folder for all jobs.

    Raises:
        UserError: it cannot be written.
    """
    folder = str(store_dir())
    if os.environ.get(STORE_VARIABLE):  # of a job that changes its working directory, too
        os.environ[STORE_VARIABLE] = folder
    check_writable(STORE_VARIABLE, folder, "choose a writable folder, or cache=false")


def check_writable(setting: str, folder: str, advice: str = "choose a writable directory") -> None:
    """Make a directory, and check that files can be written in it.

    Args:
        setting: names the directory.
        folder: its path.
        advice: ends the sentence of the error.

    Raises:
        UserError: it cannot be made or written.
    """
    try:
        Path(folder).mkdir(parents=True, exist_ok=True)
        with tempfile.TemporaryFile(dir=folder):
            pass
    except OSError as error:
        raise UserError(f"{setting}={folder} cannot be written ({error.strerror or error}): {advice}.") from error


def _check_training_file(training: Training, evaluation: EvalConfig) -> None:
    setting, file = f"{training.names.group}.text_file", training.text_file
    trained = check_text(setting, file)
    if "text_file" in evaluation.corpora and trained.samefile(check_text("eval.text_file", evaluation.text_file)):
        raise UserError(f"{setting}={file} is the file of eval.text_file as well: train on another text.")


def _check_model_folder(folder: str, overrides: Sequence[str], unread: Sequence[str]) -> None:
    if not (Path(folder) / "config.json").is_file():
        raise UserError(f"model.path={folder}: no config.json is there; give the folder of a Hugging Face model.")
    explicit = [o for o in overrides if o.lstrip("+~").split("=")[0].split(".")[0] in unread]
    if explicit and _is_packed(folder):
        raise UserError(
            f"{explicit[0]}: the model {folder} is already quantized; leave this setting out to evaluate the model, "
            "or give a full-precision model."
        )


def _check_embedding_bits(config: RunConfig) -> None:
    """Check that a run which rounds the embeddings quantizes a model, and trains nothing afterwards."""
    for asked, sentence in (
        (_is_packed(config.model.path), f"the model {config.model.path} is already quantized: leave this setting out"),
        (config.method is None, "method=none quantizes nothing: choose a method, or 16"),
        (config.finetune, "finetuning trains with embeddings as they are: set finetune=none, or 16"),
    ):
        if asked:
            raise UserError(f"model.embedding_bits={config.model.embedding_bits}: {sentence}.")


def _check_stream(config: RunConfig) -> None:
    """Check that a run whose full-precision model is never in memory asks for nothing that needs it there."""
    method, model = config.method, config.model
    from_hub = not (model.path or model.asset)
    plans = isinstance(method, PlanningMethod) and method.needs_plan
    for asked, sentence in (
        (method is None, "method=none quantizes nothing: set model.stream=false"),
        (from_hub, f"it reads a folder: get {model.repo} from the hub, and give its folder as model.path"),
        (plans, f"method={config.method_name} plans for the whole model: set method.level=linear"),
        (config.preprocess, f"preprocess={config.preprocess_name} trains the whole model: set preprocess=none"),
        (config.finetune, "finetuning needs the whole model: set finetune=none, and finetune the checkpoint"),
        (config.eval.full_precision, "there is no whole model to score: set eval.full_precision=false"),
    ):
        if asked:
            raise UserError(f"model.stream=true: {sentence}.")


def _is_packed(folder: str | None) -> bool:
    from ptq161.models.loading import is_packed_folder  # takes seconds, which other errors need not wait for

    return folder is not None and is_packed_folder(folder)
