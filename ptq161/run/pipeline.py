"""One run from beginning to end; :func:`run` reads like the method section of a paper."""

from __future__ import annotations

import contextlib
import copy
import dataclasses
import functools
import logging
import resource
import shutil
import time
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from functools import partial
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn
from transformers import PreTrainedModel, PreTrainedTokenizerBase

from ptq161.cache.stages import Reuse, keep_result, take_over
from ptq161.cache.store import Entry, Store, store_dir
from ptq161.data.calibration import calibration_tokens
from ptq161.driver.quantization import quantize
from ptq161.errors import UserError
from ptq161.evaluation import OpenEvaluation, Scores, evaluate, greedy_sample, open_evaluation
from ptq161.files.fingerprints import describe, device_name, key_of
from ptq161.files.hashing import sha256_of_file, sha256_of_tensors
from ptq161.models.architectures import check_quantizable, decoder_blocks, max_seq_len
from ptq161.models.loading import is_packed_folder, load_tokenizer, load_weights
from ptq161.numerics import COMPUTE_DTYPES
from ptq161.packed.checkpoint import cast_rest, load, measure, save, save_dense, sha256_of_packed, stored_nominal_bits
from ptq161.packed.linear import dense_cache
from ptq161.preprocess.checkpoint import fingerprint
from ptq161.preprocess.restoration import check_seq_len
from ptq161.preprocess.rounds import restore
from ptq161.preprocess.text import training_tokens
from ptq161.run.config import RunConfig
from ptq161.run.identity import identity
from ptq161.run.preflight import QUANTIZATION
from ptq161.run.summary import print_results
from ptq161.tracking.record import RunRecord

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
    """Quantize, score, record; or find the record of a run that was the same.

    Returns:
        what ``results.json`` holds.

    Raises:
        UserError: whatever the user can put right, in one sentence.
    """
    stored = config.model.path is not None and is_packed_folder(config.model.path)
    # The lock on the result outlives the record, which is kept when it is complete.
    with contextlib.ExitStack() as locks:
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
            entry, reuse = _find(config, record, locks)
            results = take_over(entry, record) if entry is not None and entry.finished else None
            reused = results is not None
            if results is None:
                results = _compute(_Job(config, context, record, reuse), stored)
            record.finish(results)
            print_results(results, context.run_dir)
        if entry is not None and not reused:
            _keep(entry, record)
    return results


def _find(config: RunConfig, record: RunRecord, locks: contextlib.ExitStack) -> tuple[Entry | None, Reuse]:
    """Open this run's place among the finished results; ``locks`` closes it."""
    if not config.cache:
        return None, Reuse(None, {})
    store = Store(store_dir(), force=config.force)
    about = identity(config, store)
    record.describe(identity=key_of(about))
    entry = locks.enter_context(store.entry("results", about))
    return entry, Reuse(store, about)


def _keep(entry: Entry, record: RunRecord) -> None:
    try:
        keep_result(entry, record.run_dir)
    except UserError as error:
        log.warning("the result is complete, but not kept for later runs: %s", error)


@dataclasses.dataclass(frozen=True)
class _Job:
    """What every stage of a run gets."""

    config: RunConfig
    context: RunContext
    record: RunRecord
    reuse: Reuse
    seconds: dict[str, float] = dataclasses.field(default_factory=dict)

    @contextmanager
    def stage(self, name: str) -> Iterator[None]:
        """Take a stage's seconds."""
        began = time.perf_counter()
        yield
        self.seconds[name] = round(time.perf_counter() - began, 2)


def _compute(job: _Job, stored: bool) -> dict[str, Any]:
    for folder in (CHECKPOINT, MERGED):  # of a run that had this directory before
        shutil.rmtree(Path(job.context.run_dir) / folder, ignore_errors=True)
    results = (_score_stored if stored else _quantize_and_score)(job)
    results["seconds"] = job.seconds
    results["peak_memory_bytes"] = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024
    return results


def _quantize_and_score(job: _Job) -> dict[str, Any]:
    config, record = job.config, job.record
    with job.stage("load"):
        tokenizer, hf_config = load_tokenizer(config.model)
        opened = _open(job, tokenizer, max_seq_len(hf_config))
        tokens = _calibration(job, tokenizer, max_seq_len(hf_config)) if config.method else None
        training = _training(job, tokenizer, max_seq_len(hf_config))
        model = load_weights(config.model)
        check_quantizable(model)
        record.describe(model_sha256=sha256_of_tensors(model.state_dict()), n_blocks=len(decoder_blocks(model)))
    full_precision: dict[str, float] = {}
    scores = Scores({}, {})
    if config.eval.full_precision or config.method is None:
        with job.stage("full_precision"):
            scores = _score_dense(job, model, tokenizer, opened, "full precision", record.manifest["model_sha256"])
            full_precision = {**scores.metrics, **_dense_size(model, config)}
    if config.method is None or tokens is None:
        return {"metrics": full_precision, "full_precision": full_precision, "protocol": scores.protocol}
    record.describe(calibration_sha256=sha256_of_tensors({"tokens": tokens}))
    merged: dict[str, Any] = {}
    masks: dict[str, Tensor] | None = None
    if training is not None:
        with job.stage("preprocess"):
            model, masks = _preprocess(job, model, tokenizer, training, tokens)
        if config.eval.full_precision and config.preprocess is not None and config.preprocess.score_merged:
            with job.stage("merged"):
                scores = _score_dense(job, model, tokenizer, opened, "merged", record.manifest["merged_sha256"])
                merged = {"merged": {**scores.metrics, **_dense_size(model, config)}}
    with job.stage("quantize"):
        file = _quantize(job, model, tokenizer, tokens, masks)
    with job.stage("evaluate"):
        scores = _score(job, model, tokenizer, opened, "quantized", sha256_of_packed(model))
    return {
        "metrics": {**scores.metrics, **_packed_size(model, file)},
        "full_precision": full_precision,
        **merged,
        "protocol": scores.protocol,
    }


def _score_stored(job: _Job) -> dict[str, Any]:
    """Evaluate a checkpoint of this project as it is."""
    path = job.config.model.path
    assert path is not None
    log.info("%s is a packed checkpoint: it is evaluated as it is, nothing is quantized", path)
    with job.stage("load"):
        model, tokenizer = load(path)
        opened = _open(job, tokenizer, max_seq_len(model.config))
        file = next(Path(path).glob("*.safetensors"))
        job.record.describe(checkpoint_sha256=sha256_of_file(file))
    with job.stage("evaluate"):
        scores = _score(job, model, tokenizer, opened, "quantized", sha256_of_packed(model))
    return {
        "metrics": {**scores.metrics, **_packed_size(model, file)},
        "full_precision": {},
        "protocol": scores.protocol,
    }


_last_opened: dict[str, OpenEvaluation] = {}


def _open(job: _Job, tokenizer: PreTrainedTokenizerBase, max_length: int) -> OpenEvaluation:
    """Open the evaluation, or take the one that the job before in this process has opened, where it is the same."""
    about = job.reuse.identity
    key = key_of({"model": about["model"], "evaluation": about["evaluation"]}) if about else None
    if key in _last_opened:
        return _last_opened[key]
    opened = open_evaluation(tokenizer, job.config.eval, max_length)
    _last_opened.clear()
    if key is not None:
        _last_opened[key] = opened
    return opened


def _calibration(job: _Job, tokenizer: PreTrainedTokenizerBase, max_length: int) -> Tensor:
    config = job.config
    if config.calib.seq_len > max_length:
        raise UserError(
            f"calib.seq_len={config.calib.seq_len}: the model holds at most {max_length} tokens; use a shorter one."
        )
    return job.reuse.tensor(
        "tokens",
        {"calibration": job.reuse.identity.get("calibration"), "seed": config.seed},
        lambda: calibration_tokens(tokenizer, config.calib, config.seed),
    )


def _training(job: _Job, tokenizer: PreTrainedTokenizerBase, max_length: int) -> Tensor | None:
    config, seed = job.config.preprocess, job.config.seed
    if config is None:
        return None
    check_seq_len(config, max_length)
    texts = (job.reuse.identity.get("preprocess") or {}).get("corpora")
    about = {"training": texts, "sequences": config.sequences, "seq_len": config.seq_len, "seed": seed}
    return job.reuse.tensor("tokens", about, lambda: training_tokens(tokenizer, config, seed))


def _preprocess(
    job: _Job, model: PreTrainedModel, tokenizer: PreTrainedTokenizerBase, training: Tensor, tokens: Tensor
) -> tuple[PreTrainedModel, dict[str, Tensor] | None]:
    """Restore the model; a training that was cut off, or is done, is found by what it depends on."""
    config, record = job.config, job.record
    assert config.method is not None and config.preprocess is not None
    about = fingerprint(
        model, training, tokens, config.method, config.preprocess, seed=config.seed, device=config.device
    )
    record.describe(preprocess=about)
    with job.reuse.folder("preprocessed", about) as folder:
        restored, masks = restore(
            model,
            training,
            tokens,
            config.method,
            config.preprocess,
            folder=folder,
            on_metric=record.metric,
            seed=config.seed,
            device=config.device,
            progress=True,
        )
    record.describe(merged_sha256=sha256_of_tensors(restored.state_dict()))
    if config.preprocess.save_merged:
        save_dense(restored, tokenizer, Path(job.context.run_dir) / MERGED)
    return restored, masks


def _quantize(
    job: _Job,
    model: PreTrainedModel,
    tokenizer: PreTrainedTokenizerBase,
    tokens: Tensor,
    masks: dict[str, Tensor] | None,
) -> Path:
    """Quantize the model in place, from the blocks that are finished already, and return the checkpoint's file."""
    config, manifest = job.config, job.record.manifest
    assert config.method is not None
    about = {
        "weights": manifest.get("merged_sha256", manifest["model_sha256"]),
        "calibration": manifest["calibration_sha256"],
        "method": describe(config.method),
        "salient_masks": None if masks is None else sha256_of_tensors(masks),
        "seed": config.seed,
        "device": device_name(config.device),
        "threads": torch.get_num_threads(),
    }
    with job.reuse.folder("blocks", about) as folder:
        quantize(
            model,
            tokens,
            config.method,
            on_metric=job.record.metric,
            seed=config.seed,
            device=config.device,
            progress=True,
            salient_masks=masks,
            resume=folder,
        )
    cast_rest(model, COMPUTE_DTYPES[config.dtype])
    file = save(model, tokenizer, Path(job.context.run_dir) / CHECKPOINT, nominal_bits=config.method.nominal_bits())
    job.record.describe(checkpoint_sha256=sha256_of_file(file))
    return file


def _score_dense(
    job: _Job,
    model: PreTrainedModel,
    tokenizer: PreTrainedTokenizerBase,
    opened: OpenEvaluation,
    label: str,
    weights: str,
) -> Scores:
    """Score a full-precision model in the run's dtype; the model itself keeps its own for the quantization."""
    dtype, home = COMPUTE_DTYPES[job.config.dtype], model.device
    if model.dtype != dtype:
        scored = copy.deepcopy(model)
        cast_rest(scored, dtype)
        return _score(job, scored, tokenizer, opened, label, weights)
    scores = _score(job, model, tokenizer, opened, label, weights)
    nn.Module.to(model, home)
    return scores


def _score(
    job: _Job,
    model: PreTrainedModel,
    tokenizer: PreTrainedTokenizerBase,
    opened: OpenEvaluation,
    label: str,
    weights: str,
) -> Scores:
    """Score a model and take its text sample; what was scored before with the same ``weights`` (a hash) is found."""
    config, record = job.config, job.record
    with contextlib.ExitStack() as prepared:

        @functools.cache
        def prepare() -> None:
            # Where every score is found, the model need neither be moved nor dequantized.
            nn.Module.to(model, config.device)
            prepared.enter_context(dense_cache(model, COMPUTE_DTYPES[config.dtype]))

        def remember(about: Mapping[str, Any], compute: Callable[[], Mapping[str, Any]]) -> Mapping[str, Any]:
            def compute_prepared() -> Mapping[str, Any]:
                prepare()
                return compute()

            return job.reuse.value("scores", {"weights": weights, "dtype": config.dtype, **about}, compute_prepared)

        on_metric = partial(record.metric, model=label)
        scores = evaluate(model, tokenizer, opened, on_metric=on_metric, label=label, remember=remember)
        prompt, n_tokens = config.eval.sample_prompt, config.eval.sample_tokens
        text = remember(
            {"prompt": prompt, "n_tokens": n_tokens},
            lambda: {"text": greedy_sample(model, tokenizer, prompt, n_tokens)},
        )["text"]
        if not prepare.cache_info().currsize:
            log.info("%s: every score was known", label)
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
    nominal = stored_nominal_bits(file.parent)
    return {
        "bits_per_weight": size.bits_per_weight,
        **({} if nominal is None else {"nominal_bits_per_weight": nominal}),
        "checkpoint_bytes": file.stat().st_size,
        "linear_bytes": size.linear_bytes,
        "other_bytes": size.other_bytes,
    }
