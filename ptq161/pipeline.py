"""One run from beginning to end; :func:`run` reads like the method section of a paper."""

from __future__ import annotations

import copy
import dataclasses
import logging
import resource
import time
from collections.abc import Iterator
from contextlib import contextmanager
from functools import partial
from pathlib import Path
from typing import Any

from torch import Tensor, nn
from transformers import PreTrainedModel, PreTrainedTokenizerBase

from ptq161.assets import cache_dir
from ptq161.blockwise import quantize
from ptq161.config import RunConfig
from ptq161.data import calibration_tokens
from ptq161.errors import UserError
from ptq161.evaluation import OpenEvaluation, Scores, evaluate, greedy_sample, open_evaluation
from ptq161.methods.base import COMPUTE_DTYPES
from ptq161.models import check_quantizable, is_packed_folder, load_tokenizer, load_weights, max_seq_len
from ptq161.packed.checkpoint import cast_rest, load, measure, save, save_dense
from ptq161.packed.linear import dense_cache
from ptq161.preflight import QUANTIZATION
from ptq161.preprocess import restore, training_tokens
from ptq161.preprocess.checkpoint import fingerprint, sha256_of_fingerprint
from ptq161.preprocess.restoration import check_seq_len
from ptq161.report.table import print_results
from ptq161.tracking import RunRecord, sha256_of_file, sha256_of_tensors

log = logging.getLogger(__name__)

CHECKPOINT = "checkpoint"
MERGED = "merged"


@dataclasses.dataclass(frozen=True)
class RunContext:
    """What surrounds a run and does not change its result.

    Attributes:
        run_dir: where the record and the checkpoint go.
        resolved: the composed configuration with every interpolation resolved.
        overrides: what was typed.
        job_name: what the mirror calls the run.
        group: the sweep it belongs to.
    """

    run_dir: str
    resolved: dict[str, Any]
    overrides: list[str]
    job_name: str
    group: str | None = None


def run(config: RunConfig, context: RunContext) -> dict[str, Any]:
    """Quantize, score, record.

    Returns:
        what ``results.json`` holds.

    Raises:
        UserError: whatever the user can put right, in one sentence.
    """
    stored = config.model.path is not None and is_packed_folder(config.model.path)
    with RunRecord.open(
        context.run_dir,
        config={key: value for key, value in context.resolved.items() if not (stored and key in QUANTIZATION)},
        tracker=config.tracker,
        seeds={"seed": config.seed},
        job_name=context.job_name,
        group=context.group,
        tags=[config.model.name] if stored else [config.model.name, config.method_name],
    ) as record:
        log.info("evaluating and storing in %s: %s", config.dtype, config.dtype_reason)
        record.describe(device=str(config.device), dtype=config.dtype)
        stage = _Stages()
        results = (_score_stored if stored else _quantize_and_score)(config, context, record, stage)
        results["seconds"] = stage.seconds
        results["peak_memory_bytes"] = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024
        record.finish(results)
        print_results(results, context.run_dir)
    return results


def _quantize_and_score(config: RunConfig, context: RunContext, record: RunRecord, stage: _Stages) -> dict[str, Any]:
    with stage("load"):
        tokenizer, hf_config = load_tokenizer(config.model)
        opened = open_evaluation(tokenizer, config.eval, max_seq_len(hf_config))
        tokens = _calibration(config, tokenizer, max_seq_len(hf_config)) if config.method else None
        training = _training(config, tokenizer, max_seq_len(hf_config))
        model = load_weights(config.model)
        check_quantizable(model)
        record.describe(model_sha256=sha256_of_tensors(model.state_dict()))
    full_precision: dict[str, float] = {}
    scores = Scores({}, {})
    if config.eval.full_precision or config.method is None:
        with stage("full_precision"):
            scores = _score_dense(config, model, tokenizer, opened, record, "full precision")
            full_precision = {**scores.metrics, **_dense_size(model, config)}
    if config.method is None or tokens is None:
        return {"metrics": full_precision, "full_precision": full_precision, "protocol": scores.protocol}
    record.describe(calibration_sha256=sha256_of_tensors({"tokens": tokens}))
    merged: dict[str, Any] = {}
    masks: dict[str, Tensor] | None = None
    if training is not None:
        with stage("preprocess"):
            model, masks = _preprocess(config, context, model, tokenizer, training, tokens, record)
        if config.eval.full_precision and config.preprocess is not None and config.preprocess.score_merged:
            with stage("merged"):
                scores = _score_dense(config, model, tokenizer, opened, record, "merged")
                merged = {"merged": {**scores.metrics, **_dense_size(model, config)}}
    with stage("quantize"):
        quantize(
            model,
            tokens,
            config.method,
            on_metric=record.metric,
            seed=config.seed,
            device=config.device,
            progress=True,
            salient_masks=masks,
        )
        cast_rest(model, COMPUTE_DTYPES[config.dtype])
        file = save(model, tokenizer, Path(context.run_dir) / CHECKPOINT)
        record.describe(checkpoint_sha256=sha256_of_file(file))
    with stage("evaluate"):
        scores = _score(config, model, tokenizer, opened, record, "quantized")
    sizes = {**_packed_size(model, file), "nominal_bits_per_weight": config.method.nominal_bits()}
    return {
        "metrics": {**scores.metrics, **sizes},
        "full_precision": full_precision,
        **merged,
        "protocol": scores.protocol,
    }


def _score_stored(config: RunConfig, context: RunContext, record: RunRecord, stage: _Stages) -> dict[str, Any]:
    """Evaluate a checkpoint of this project as it is."""
    assert config.model.path is not None
    log.info("%s is a packed checkpoint: it is evaluated as it is, nothing is quantized", config.model.path)
    with stage("load"):
        model, tokenizer = load(config.model.path)
        opened = open_evaluation(tokenizer, config.eval, max_seq_len(model.config))
        file = next(Path(config.model.path).glob("*.safetensors"))
        record.describe(checkpoint_sha256=sha256_of_file(file))
    with stage("evaluate"):
        scores = _score(config, model, tokenizer, opened, record, "quantized")
    return {
        "metrics": {**scores.metrics, **_packed_size(model, file)},
        "full_precision": {},
        "protocol": scores.protocol,
    }


def _calibration(config: RunConfig, tokenizer: PreTrainedTokenizerBase, max_length: int) -> Tensor:
    if config.calib.seq_len > max_length:
        raise UserError(
            f"calib.seq_len={config.calib.seq_len}: the model holds at most {max_length} tokens; use a shorter one."
        )
    return calibration_tokens(tokenizer, config.calib, config.seed)


def _training(config: RunConfig, tokenizer: PreTrainedTokenizerBase, max_length: int) -> Tensor | None:
    if config.preprocess is None:
        return None
    check_seq_len(config.preprocess, max_length)
    return training_tokens(tokenizer, config.preprocess, config.seed)


def _preprocess(
    config: RunConfig,
    context: RunContext,
    model: PreTrainedModel,
    tokenizer: PreTrainedTokenizerBase,
    training: Tensor,
    tokens: Tensor,
    record: RunRecord,
) -> tuple[PreTrainedModel, dict[str, Tensor] | None]:
    """Restore the model; a training that was cut off, or is done, is found by what it depends on."""
    assert config.method is not None and config.preprocess is not None
    identity = fingerprint(model, training, tokens, config.method, config.preprocess, config.seed)
    record.describe(preprocess=identity)
    restored, masks = restore(
        model,
        training,
        tokens,
        config.method,
        config.preprocess,
        folder=cache_dir() / "preprocess" / sha256_of_fingerprint(identity)[:16],
        on_metric=record.metric,
        seed=config.seed,
        device=config.device,
        progress=True,
    )
    record.describe(merged_sha256=sha256_of_tensors(restored.state_dict()))
    if config.preprocess.save_merged:
        save_dense(restored, tokenizer, Path(context.run_dir) / MERGED)
    return restored, masks


def _score_dense(
    config: RunConfig,
    model: PreTrainedModel,
    tokenizer: PreTrainedTokenizerBase,
    opened: OpenEvaluation,
    record: RunRecord,
    label: str,
) -> Scores:
    """Score a full-precision model in the run's dtype; the model itself keeps its own for the quantization."""
    dtype, home = COMPUTE_DTYPES[config.dtype], model.device
    if model.dtype != dtype:
        scored = copy.deepcopy(model)
        cast_rest(scored, dtype)
        return _score(config, scored, tokenizer, opened, record, label)
    scores = _score(config, model, tokenizer, opened, record, label)
    nn.Module.to(model, home)
    return scores


def _score(
    config: RunConfig,
    model: PreTrainedModel,
    tokenizer: PreTrainedTokenizerBase,
    opened: OpenEvaluation,
    record: RunRecord,
    label: str,
) -> Scores:
    nn.Module.to(model, config.device)
    with dense_cache(model, COMPUTE_DTYPES[config.dtype]):
        scores = evaluate(model, tokenizer, opened, on_metric=partial(record.metric, model=label), label=label)
        text = greedy_sample(model, tokenizer, config.eval.sample_prompt, config.eval.sample_tokens)
    record.sample(label, text)
    log.info("%s sample: %s", label, " ".join(text.split()))
    return scores


def _dense_size(model: PreTrainedModel, config: RunConfig) -> dict[str, float]:
    width = COMPUTE_DTYPES[config.dtype].itemsize
    parameters = sum(parameter.numel() for parameter in model.parameters())
    bits = 8.0 * width
    return {"bits_per_weight": bits, "nominal_bits_per_weight": bits, "checkpoint_bytes": parameters * width}


def _packed_size(model: PreTrainedModel, file: Path) -> dict[str, float]:
    size = measure(model)
    return {
        "bits_per_weight": size.bits_per_weight,
        "checkpoint_bytes": file.stat().st_size,
        "linear_bytes": size.linear_bytes,
        "other_bytes": size.other_bytes,
    }


class _Stages:
    """Seconds per stage."""

    def __init__(self) -> None:
        self.seconds: dict[str, float] = {}

    @contextmanager
    def __call__(self, name: str) -> Iterator[None]:
        began = time.perf_counter()
        yield
        self.seconds[name] = round(time.perf_counter() - began, 2)
