"""The typed schema of every config group: Hydra's composed config in, checked dataclasses out.

Every error that can be found without loading a model or a text is raised here.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping
from typing import Any, TypeVar, get_args, get_origin, get_type_hints

import torch
from hydra.utils import get_class
from omegaconf import DictConfig, OmegaConf
from omegaconf.errors import OmegaConfBaseException
from pydantic import ConfigDict, TypeAdapter, ValidationError

from ptq161.checks import check_at_least, check_choice
from ptq161.data.settings import CalibConfig
from ptq161.errors import UserError
from ptq161.evaluation.settings import EvalConfig
from ptq161.finetune.distillation import Distillation, check_learnable
from ptq161.finetune.tuning import Tuning
from ptq161.methods.base import Method
from ptq161.methods.ptq161.saliency import check_mask_ratio
from ptq161.models.settings import ModelConfig
from ptq161.numerics import resolve_device, resolve_dtype
from ptq161.preprocess.restoration import Restoration
from ptq161.tracking.settings import TrackerConfig

_DTYPES = ("auto", "float32", "bfloat16", "float16")
_ON_ERROR = ("continue", "stop")

_INTERPOLATED = ("mask_ratio", "block_size", "on_error")
"""Top-level keys that are not fields of ``RunConfig``: groups interpolate them, or the sweep reads them."""

_T = TypeVar("_T")


@dataclasses.dataclass(frozen=True)
class RunConfig:
    """One run, checked.

    Attributes:
        method: None for a full-precision run (``method=none``).
        method_name: display name, in tables and figures.
        preprocess: None where the weights are quantized as they are (``preprocess=none``).
        preprocess_name: display name, in tables and figures.
        finetune: None where the quantized weights are evaluated as they are (``finetune=none``).
        finetune_name: display name, in tables and figures.
        seed: every random number follows from it.
        device: a torch device, ``auto`` resolved.
        dtype: dtype of evaluation and of what is stored beside the packed weights, ``auto`` resolved.
        dtype_reason: why ``auto`` is this dtype, for the log.
        cache: reuse stored results, and store new ones (:mod:`ptq161.cache.store`).
        force: compute everything again, and replace the stored results.
    """

    model: ModelConfig
    method: Method | None
    method_name: str
    calib: CalibConfig
    preprocess: Restoration | None
    preprocess_name: str
    finetune: Distillation | Tuning | None
    finetune_name: str
    eval: EvalConfig
    tracker: TrackerConfig
    seed: int
    device: torch.device
    dtype: str
    dtype_reason: str
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
    derived = {"method_name", "preprocess_name", "finetune_name", "dtype_reason"}
    known = [key for key in hints if key not in derived] + [*_INTERPOLATED]
    if unknown := sorted(set(values) - set(known)):
        raise UserError(f"unknown key {unknown[0]!r}: known are {', '.join(known)}.")
    if missing := [key for key in known if key not in values]:
        raise UserError(f"{missing[0]} is not set.")
    _check_top_level(values)
    device = resolve_device(values.pop("device"))
    dtype, reason = resolve_dtype(values.pop("dtype"), device)
    method_name, method = _build_method(values.pop("method"), device)
    preprocess_name, preprocess = _build_training("preprocess", Restoration, values.pop("preprocess"), device, method)
    finetune_name, finetune = _build_training("finetune", Distillation, values.pop("finetune"), device, method)
    if isinstance(finetune, Distillation) and finetune.update == "codes" and method is not None:
        check_learnable(method, method_name)
    built = {
        key: build(hints[key], value, key) if dataclasses.is_dataclass(hints[key]) else value
        for key, value in values.items()
        if key not in _INTERPOLATED
    }
    return RunConfig(
        method=method,
        method_name=method_name,
        preprocess=preprocess,
        preprocess_name=preprocess_name,
        finetune=finetune,
        finetune_name=finetune_name,
        device=device,
        dtype=dtype,
        dtype_reason=reason,
        **built,
    )


def build(cls: type[_T], values: Mapping[str, Any], where: str) -> _T:
    """Instantiate a config dataclass from checked keys and values.

    Args:
        cls: the dataclass.
        values: by the names of its fields.
        where: path of the node in the configuration, for errors.

    Raises:
        UserError: a key is unknown or missing, or a value has the wrong type.
    """
    hints = get_type_hints(cls)
    # type[_T] cannot say that _T is a dataclass.
    fields = {f.name: f for f in dataclasses.fields(cls) if f.init}  # type: ignore[arg-type]
    for key in values:
        if key not in fields:
            raise UserError(f"unknown key {where}.{key}: known are {', '.join(fields)}.")
    required = {n for n, f in fields.items() if f.default is f.default_factory is dataclasses.MISSING}
    missing = sorted(required - set(values))
    if missing:
        raise UserError(f"{where}.{missing[0]} is not set.")
    return cls(**{key: _typed(hints[key], value, f"{where}.{key}") for key, value in values.items()})


def _build_method(values: dict[str, Any], device: torch.device) -> tuple[str, Method | None]:
    if values.get("compute_dtype") == "auto":
        values["compute_dtype"] = resolve_dtype("auto", device)[0]
    name, method = _build_target(values, "method")
    return name, method


def _build_training(
    group: str, cls: type[_T], values: dict[str, Any], device: torch.device, method: Method | None
) -> tuple[str, _T | None]:
    """Return name and settings of a training before or after the quantization; None for ``GROUP=none``."""
    if values.get("compute_dtype") == "auto":
        # Training in float16 would need loss scaling, which the loop does not have.
        resolved = resolve_dtype("auto", device)[0]
        values["compute_dtype"] = "float32" if resolved == "float16" else resolved
    if "_target_" not in values:
        # debug=smoke sets a few keys of a training, even where there is none.
        fields = {field.name for field in dataclasses.fields(cls)}  # type: ignore[arg-type]  # _T is a dataclass
        values = {key: value for key, value in values.items() if key not in fields}
    name, training = _build_target(values, group)
    # Adapters are trained on a packed checkpoint, too, which has been quantized (ptq161.run.preflight).
    if training is not None and method is None and not isinstance(training, Tuning):
        raise UserError(nothing_quantized(group, name))
    return name, training


def nothing_quantized(group: str, name: str) -> str:
    """Return the sentence for a training of what ``method=none`` does not quantize."""
    return f"{group}={name}: method=none quantizes nothing; choose a method, or {group}=none."


def _build_target(values: dict[str, Any], group: str) -> tuple[str, Any]:
    """Instantiate the ``_target_`` class of a node; None where it has none (``method=none``)."""
    name = str(values.pop("name"))
    target = values.pop("_target_", None)
    if target is None:
        check_choice(f"{group}.name", name, ("none",))
        if values:
            raise UserError(f"unknown key {group}.{next(iter(values))}: {group}={name} has no settings.")
        return name, None
    return name, build(get_class(target), values, group)


def _check_top_level(values: Mapping[str, Any]) -> None:
    check_mask_ratio(_typed(float, values["mask_ratio"], "mask_ratio"))
    check_at_least("block_size", _typed(int, values["block_size"], "block_size"), 1)
    check_at_least("seed", _typed(int, values["seed"], "seed"), 0)
    check_choice("dtype", values["dtype"], _DTYPES)
    check_choice("on_error", values["on_error"], _ON_ERROR)
    cache, force = (_typed(bool, values[key], key) for key in ("cache", "force"))
    if force and not cache:
        raise UserError("force=true cache=false: without the cache everything is computed anyway; leave force out.")


def _typed(hint: Any, value: Any, where: str) -> Any:
    """Return ``value`` as the annotated type; an integer is also a float.

    Raises:
        UserError: it has another type, or is not finite.
    """
    try:
        return TypeAdapter(hint, config=ConfigDict(strict=True, allow_inf_nan=False)).validate_python(value)
    except ValidationError as error:
        first = error.errors()[0]
        if first["type"] == "finite_number":
            raise UserError(f"{where}={first['input']}: use a finite number.") from error
        inner = get_origin(hint) is list and first["loc"]
        expected = _type_name(get_args(hint)[0] if inner else hint)
        quoted = first["input"] == value and not isinstance(value, str | list | dict) and "str" in expected.split()
        advice = f"; text is quoted, \"{where}='{value}'\"" if quoted else ""
        raise UserError(f"{where}={first['input']!r}: use a value of type {expected}{advice}.") from error


def _type_name(hint: Any) -> str:
    options = () if get_origin(hint) is list else get_args(hint)
    if options:
        return " or ".join(map(_type_name, options))
    return "null" if hint is type(None) else str(getattr(hint, "__name__", hint))
