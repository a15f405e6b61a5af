"""The typed schema of every config group: Hydra's composed config in, checked dataclasses out.

Everything that can be known to be wrong without loading a model or a text is rejected here.
"""

from __future__ import annotations

import dataclasses
import math
import types
from collections.abc import Mapping
from typing import Any, TypeVar, Union, get_args, get_origin, get_type_hints

import torch
from hydra.utils import get_class
from omegaconf import DictConfig, OmegaConf
from omegaconf.errors import OmegaConfBaseException

from ptq161.errors import UserError
from ptq161.methods.base import Method, check_choice
from ptq161.numerics import resolve_device, resolve_dtype
from ptq161.preprocess.restoration import Restoration
from ptq161.texts import CALIBRATION_SETS, CORPORA

DTYPES = ("auto", "float32", "bfloat16", "float16")
ON_ERROR = ("continue", "stop")
TRACKERS = ("wandb", "none")
WANDB_MODES = ("auto", "online", "offline")

T = TypeVar("T")


@dataclasses.dataclass(frozen=True)
class ModelConfig:
    """Which model, and where it comes from. Exactly one source is used: ``path``, else ``asset``, else ``repo``.

    Attributes:
        name: what tables and figures call it.
        path: a local Hugging Face folder, or a checkpoint that this project wrote.
        asset: name of an embedded asset (:mod:`ptq161.assets`).
        repo: name on the Hugging Face hub.
        revision: commit or tag on the hub.
        n_blocks: keep only the first decoder blocks (for debugging).
    """

    name: str
    path: str | None = None
    asset: str | None = None
    repo: str | None = None
    revision: str | None = None
    n_blocks: int | None = None

    def __post_init__(self) -> None:
        """Reject a config without a source."""
        if not (self.path or self.asset or self.repo):
            raise UserError(f"model={self.name} has no source: set model.path, model.asset or model.repo.")
        check_at_least("model.n_blocks", self.n_blocks, 1)


@dataclasses.dataclass(frozen=True)
class CalibConfig:
    """The calibration tokens ``[n_samples, seq_len]``.

    Attributes:
        name: one of ``CALIBRATION_SETS``.
        n_samples: windows drawn at random starts; overlap is allowed.
        seq_len: tokens per window.
        text_file: the file of ``name=text_file``.
    """

    name: str
    n_samples: int
    seq_len: int
    text_file: str | None = None

    def __post_init__(self) -> None:
        """Reject unknown sets and empty windows."""
        check_choice("calib.name", self.name, CALIBRATION_SETS)
        check_at_least("calib.n_samples", self.n_samples, 1)
        check_at_least("calib.seq_len", self.seq_len, 2)
        if self.name == "text_file" and not self.text_file:
            raise UserError("calib=text_file needs a file: set calib.text_file=FILE.")


@dataclasses.dataclass(frozen=True)
class EvalConfig:
    """What is measured.

    Attributes:
        name: what the protocol is called.
        corpora: perplexity corpora, each one of ``CORPORA``.
        seq_len: tokens per perplexity window.
        max_windows: first windows of each corpus that are scored; None scores all.
        text_file: the file of the corpus ``text_file``.
        tasks: zero-shot tasks: the embedded ones (``ptq161.evaluation.EMBEDDED_TASKS``) or any of lm-eval's.
        limit: first documents of each task that are scored; None scores all.
        batch_size: sequences per forward pass.
        full_precision: score the unquantized model as well.
        sample_prompt: prompt of the greedy text sample that each run logs.
        sample_tokens: new tokens of that sample.
    """

    name: str
    corpora: list[str]
    seq_len: int
    tasks: list[str]
    max_windows: int | None = None
    text_file: str | None = None
    limit: int | None = None
    batch_size: int = 16
    full_precision: bool = True
    sample_prompt: str = "The capital of France is"
    sample_tokens: int = 24

    def __post_init__(self) -> None:
        """Reject unknown corpora and empty windows."""
        for corpus in self.corpora:
            check_choice("eval.corpora", corpus, CORPORA)
        check_at_least("eval.seq_len", self.seq_len, 2)
        check_at_least("eval.max_windows", self.max_windows, 1)
        check_at_least("eval.limit", self.limit, 1)
        check_at_least("eval.batch_size", self.batch_size, 1)
        check_at_least("eval.sample_tokens", self.sample_tokens, 1)
        if "text_file" in self.corpora and not self.text_file:
            raise UserError("eval.corpora=[text_file] needs a file: set eval.text_file=FILE.")


@dataclasses.dataclass(frozen=True)
class TrackerConfig:
    """Where the run's record is mirrored.

    Attributes:
        name: ``wandb`` or ``none``.
        project: W&B project.
        entity: W&B entity; None is the account's own.
        mode: ``online``, ``offline``, or ``auto``: online where a login exists.
        group: W&B group; None is the sweep's directory, or nothing for a single run.
        tags: W&B tags.
    """

    name: str
    project: str = "ptq161"
    entity: str | None = None
    mode: str = "auto"
    group: str | None = None
    tags: list[str] = dataclasses.field(default_factory=list)

    def __post_init__(self) -> None:
        """Reject unknown trackers and modes."""
        check_choice("tracker.name", self.name, TRACKERS)
        check_choice("tracker.mode", self.mode, WANDB_MODES)


@dataclasses.dataclass(frozen=True)
class RunConfig:
    """One run, checked.

    Attributes:
        method: None for a full-precision run (``method=none``).
        method_name: what tables and figures call it.
        preprocess: None where the weights are quantized as they are (``preprocess=none``).
        preprocess_name: what tables and figures call it.
        mask_ratio: share of salient input channels.
        block_size: decoder blocks per window.
        seed: every random number follows from it.
        device: a torch device, ``auto`` resolved.
        dtype: dtype of evaluation and of what is stored beside the packed weights, ``auto`` resolved.
        dtype_reason: why it is this one.
        on_error: what a sweep does when a job fails: ``continue`` or ``stop``.
        cache: find what was computed before, and keep what is computed (:mod:`ptq161.store`).
        force: compute everything again, and keep that.
    """

    model: ModelConfig
    method: Method | None
    method_name: str
    calib: CalibConfig
    preprocess: Restoration | None
    preprocess_name: str
    eval: EvalConfig
    tracker: TrackerConfig
    mask_ratio: float
    block_size: int
    seed: int
    device: torch.device
    dtype: str
    dtype_reason: str
    on_error: str
    cache: bool
    force: bool


def load_run_config(cfg: DictConfig) -> RunConfig:
    """Check a composed config and turn it into dataclasses.

    Raises:
        UserError: a key is unknown, a value has the wrong type or is out of range.
    """
    try:
        raw = OmegaConf.to_container(cfg, resolve=True, throw_on_missing=True)
    except OmegaConfBaseException as error:
        raise UserError(f"the configuration cannot be resolved: {str(error).splitlines()[0]}.") from error
    assert isinstance(raw, dict)
    values: dict[str, Any] = {str(k): v for k, v in raw.items() if k != "hydra"}
    hints = get_type_hints(RunConfig)
    known = [key for key in hints if key not in ("method_name", "preprocess_name", "dtype_reason")]
    if unknown := sorted(set(values) - set(known)):
        raise UserError(f"unknown key {unknown[0]!r}: known are {', '.join(known)}.")
    if missing := [key for key in known if key not in values]:
        raise UserError(f"{missing[0]} is not set.")
    _check_top_level(values)
    device = resolve_device(values.pop("device"))
    dtype, reason = resolve_dtype(values.pop("dtype"), device)
    method_name, method = _build_method(values.pop("method"), device)
    preprocess_name, preprocess = _build_preprocess(values.pop("preprocess"), device, method)
    built = {
        key: build(hints[key], value, key) if dataclasses.is_dataclass(hints[key]) else value
        for key, value in values.items()
    }
    return RunConfig(
        method=method,
        method_name=method_name,
        preprocess=preprocess,
        preprocess_name=preprocess_name,
        device=device,
        dtype=dtype,
        dtype_reason=reason,
        **built,
    )


def build(cls: type[T], values: Mapping[str, Any], where: str) -> T:
    """Instantiate a config dataclass, with every key known and every value of its type.

    Raises:
        UserError: otherwise; the sentence begins with ``where``.
    """
    hints = get_type_hints(cls)
    # type[T] cannot say that T is a dataclass.
    fields = {f.name: f for f in dataclasses.fields(cls) if f.init}  # type: ignore[arg-type]
    for key in values:
        if key not in fields:
            raise UserError(f"unknown key {where}.{key}: known are {', '.join(fields)}.")
    required = {n for n, f in fields.items() if f.default is f.default_factory is dataclasses.MISSING}
    missing = sorted(required - set(values))
    if missing:
        raise UserError(f"{where}.{missing[0]} is not set.")
    return cls(**{key: _typed(hints[key], value, f"{where}.{key}") for key, value in values.items()})


def check_at_least(setting: str, value: int | None, least: int) -> None:
    """Check an optional integer.

    Raises:
        UserError: it is below ``least``.
    """
    if value is not None and value < least:
        raise UserError(f"{setting}={value}: use at least {least}.")


def _build_method(values: dict[str, Any], device: torch.device) -> tuple[str, Method | None]:
    if values.get("compute_dtype") == "auto":
        values["compute_dtype"] = resolve_dtype("auto", device)[0]
    name, method = _build_target(values, "method")
    return name, method


def _build_preprocess(
    values: dict[str, Any], device: torch.device, method: Method | None
) -> tuple[str, Restoration | None]:
    if values.get("compute_dtype") == "auto":
        # float16 would need its loss scaled.
        resolved = resolve_dtype("auto", device)[0]
        values["compute_dtype"] = "float32" if resolved == "float16" else resolved
    if "_target_" not in values:
        # debug=smoke shortens a training, whether there is one or not.
        values = {key: value for key, value in values.items() if key not in Restoration.__dataclass_fields__}
    name, restoration = _build_target(values, "preprocess")
    if restoration is not None and method is None:
        raise UserError(f"preprocess={name}: method=none quantizes nothing; choose a method, or preprocess=none.")
    return name, restoration


def _build_target(values: dict[str, Any], group: str) -> tuple[str, Any]:
    """Instantiate the class that a node names as ``_target_``; None where it names none (``method=none``)."""
    name = str(values.pop("name"))
    target = values.pop("_target_", None)
    if target is None:
        check_choice(f"{group}.name", name, ("none",))
        if values:
            raise UserError(f"unknown key {group}.{next(iter(values))}: {group}={name} has no settings.")
        return name, None
    return name, build(get_class(target), values, group)


def _check_top_level(values: Mapping[str, Any]) -> None:
    ratio = _typed(float, values["mask_ratio"], "mask_ratio")
    if not 0 <= ratio < 1:
        raise UserError(f"mask_ratio={ratio}: use a value in [0, 1), the share of salient input channels.")
    check_at_least("block_size", _typed(int, values["block_size"], "block_size"), 1)
    check_at_least("seed", _typed(int, values["seed"], "seed"), 0)
    check_choice("dtype", values["dtype"], DTYPES)
    check_choice("on_error", values["on_error"], ON_ERROR)
    cache, force = (_typed(bool, values[key], key) for key in ("cache", "force"))
    if force and not cache:
        raise UserError("force=true cache=false: without the cache everything is computed anyway; leave force out.")


def _typed(hint: Any, value: Any, where: str) -> Any:
    """Return ``value`` as the annotated type, or say what it is instead."""
    options = get_args(hint) if get_origin(hint) in (Union, types.UnionType) else (hint,)
    for option in options:
        if option is type(None) and value is None:
            return None
        if option is bool and isinstance(value, bool):
            return value
        if option is int and isinstance(value, int) and not isinstance(value, bool):
            return value
        if option is float and isinstance(value, int | float) and not isinstance(value, bool):
            if not math.isfinite(value):
                raise UserError(f"{where}={value}: use a finite number.")
            return float(value)
        if option is str and isinstance(value, str):
            return value
        if get_origin(option) is list and isinstance(value, list):
            return [_typed(get_args(option)[0], item, where) for item in value]
    expected = " or ".join("null" if o is type(None) else getattr(o, "__name__", str(o)) for o in options)
    raise UserError(f"{where}={value!r}: use a value of type {expected}.")
