"""The stages of a run, which :mod:`ptq161.run.pipeline` puts together; each reuses cached results."""

from __future__ import annotations

import contextlib
import copy
import dataclasses
import functools
import logging
from collections.abc import Callable, Mapping
from functools import partial
from pathlib import Path
from typing import Any

from torch import Tensor, nn
from transformers import PretrainedConfig, PreTrainedModel, PreTrainedTokenizerBase

from ptq161.cache.results import CHECKPOINT, MERGED
from ptq161.data.calibration import calibration_tokens
from ptq161.data.masking import check_mask_token
from ptq161.driver.quantization import quantize
from ptq161.evaluation.checks import check_tokens, vocabulary_of
from ptq161.evaluation.denoising import denoised_sample
from ptq161.evaluation.protocol import OpenEvaluation, Scores, evaluate, open_evaluation
from ptq161.evaluation.sample import greedy_sample
from ptq161.files import identity
from ptq161.files.fingerprints import Fingerprint, key_of
from ptq161.files.hashing import sha256_of_file, sha256_of_tensors
from ptq161.methods.base import Method
from ptq161.methods.embeddings import quantize_embeddings
from ptq161.models.architectures import config_key, decoder_blocks, diffusion_of, max_seq_len
from ptq161.models.checks import check_causal, check_quantizable, check_seq_len
from ptq161.models.loading import load_tokenizer, load_weights
from ptq161.numerics import COMPUTE_DTYPES
from ptq161.packed.checkpoint import load, save
from ptq161.packed.embedding import embedding_bits
from ptq161.packed.export import save_dense
from ptq161.packed.layout import WEIGHTS_FILE, stored_nominal_bits
from ptq161.packed.linear import dense_cache, dense_products
from ptq161.packed.model import activation_bits, cast_rest, measure, packed_settings
from ptq161.preprocess.restoration import Restoration
from ptq161.preprocess.rounds import restore
from ptq161.run.session import Session, timed
from ptq161.training.settings import Training
from ptq161.training.text import training_tokens

log = logging.getLogger(__name__)


@dataclasses.dataclass(frozen=True)
class Texts:
    """The texts and tasks of a run, opened and checked before the weights are loaded.

    Attributes:
        tokenizer: of the model.
        longest: longest sequence that the model takes, in tokens; None where nothing bounds it.
        vocabulary: rows of the model's embedding.
        evaluation: perplexity texts and zero-shot tasks.
        training: ``[n, seq_len]`` int64, of the preprocessing; empty without one.
        distillation: ``[n, seq_len]`` int64, of the finetuning; empty without one, and where its text is sampled.
    """

    tokenizer: PreTrainedTokenizerBase
    longest: int | None
    vocabulary: int
    evaluation: OpenEvaluation
    training: Tensor
    distillation: Tensor


@dataclasses.dataclass(frozen=True)
class Weights:
    """A model, and the facts that its scores and its quantization depend on.

    Attributes:
        model: full precision, restored or packed.
        sha256: of its weights, hashed once.
        label: its name in metrics and progress bars.
        size: ``bits_per_weight`` and the other sizes.
        salient_masks: for its quantization; None lets the method select them.
    """

    model: PreTrainedModel
    sha256: str
    label: str
    size: Mapping[str, float]
    salient_masks: dict[str, Tensor] | None = None


# --- load -------------------------------------------------------------------------------------------------------------


@timed("load")
def open_texts(session: Session) -> Texts:
    """Open every text and task, and draw the tokens."""
    tokenizer, hf_config = load_tokenizer(session.config.model)
    return _texts(session, tokenizer, hf_config)


@timed("load")
def load_model(session: Session) -> Weights:
    """Load the full-precision model."""
    model = load_weights(session.config.model)
    check_quantizable(model)
    sha256 = sha256_of_tensors(model.state_dict())
    session.record.describe(model_sha256=sha256, n_blocks=len(decoder_blocks(model)))
    return Weights(model, sha256, "full precision", _dense_size(session, model))


@timed("load")
def load_packed(session: Session, folder: str) -> tuple[Weights, Texts]:
    """Load a packed checkpoint, and open the texts and tasks that it is evaluated on."""
    log.info("%s is a packed checkpoint: it is evaluated, and nothing is quantized", folder)
    model, tokenizer = load(folder)
    return described(session, model, Path(folder) / WEIGHTS_FILE), _texts(session, tokenizer, model.config)


@timed("load")
def calibrate(session: Session, texts: Texts) -> Tensor:
    """Draw the calibration tokens: ``[n_samples, seq_len]`` int64."""
    config = session.config
    check_seq_len("calib.seq_len", config.calib.seq_len, texts.longest)
    if config.calib.masking != "none":
        check_mask_token(config.calib.mask_token, texts.vocabulary)
    drawn = identity.tokens(model=session.identity["model"], text=session.identity["calibration"], seed=config.seed)
    tokens = session.stages.tensor(
        "tokens", drawn, lambda: calibration_tokens(texts.tokenizer, config.calib, config.seed)
    )
    check_tokens(texts.tokenizer, tokens, texts.vocabulary, f"calib={config.calib.name}")
    session.record.describe(calibration_sha256=sha256_of_tensors({"tokens": tokens}))
    return tokens


def _texts(session: Session, tokenizer: PreTrainedTokenizerBase, hf_config: PretrainedConfig) -> Texts:
    longest = max_seq_len(hf_config)
    _check_kind(session, hf_config)
    config, vocabulary = session.config.eval, vocabulary_of(hf_config)
    if not config.corpora and not config.tasks:
        log.warning("eval.corpora and eval.tasks are empty: the run scores nothing but records sizes and a text sample")
    evaluation = open_evaluation(tokenizer, config, longest, vocabulary)
    trainings = (session.config.preprocess, session.config.finetune)
    training, distillation = (_training(session, training, tokenizer, longest, vocabulary) for training in trainings)
    return Texts(tokenizer, longest, vocabulary, evaluation, training, distillation)


def _check_kind(session: Session, hf_config: PretrainedConfig) -> None:
    """Check that a run asks nothing of a masked-diffusion model that only a causal one can do."""
    config = session.config
    for stage, asked in (
        ("eval.tasks", config.eval.tasks),
        ("preprocess", config.preprocess),
        ("finetune", config.finetune),
    ):
        if asked:
            check_causal(hf_config, stage)
    if diffusion_of(hf_config) is not None:
        log.info("%s is a masked-diffusion model: its denoising loss is measured, not perplexity", config.model.name)


def _training(
    session: Session, config: Training | None, tokenizer: PreTrainedTokenizerBase, longest: int | None, vocabulary: int
) -> Tensor:
    if config is None:
        return Tensor()
    seed, group = session.config.seed, config.names.group
    check_seq_len(f"{group}.seq_len", config.seq_len, longest)
    if not config.corpora_read:
        return Tensor()
    text = {
        "stage": config.names.stage,  # part of what the order of the documents follows from
        "training": session.identity[group]["corpora"],
        "sequences": config.sequences,
        "seq_len": config.seq_len,
    }
    drawn = identity.tokens(model=session.identity["model"], text=text, seed=seed)
    tokens = session.stages.tensor("tokens", drawn, lambda: training_tokens(tokenizer, config, seed))
    check_tokens(tokenizer, tokens, vocabulary, f"the text of {group}")
    return tokens


# --- preprocess, quantize -----------------------------------------------------------------------------------


@timed("preprocess")
def preprocess(
    session: Session, full: Weights, texts: Texts, calibration: Tensor, method: Method, restoration: Restoration
) -> Weights:
    """Restore the model before it is quantized."""
    config, record = session.config, session.record
    restored_from = identity.restoration(
        quantization(session, full, method),
        training=sha256_of_tensors({"tokens": texts.training}),
        settings=restoration,
    )
    record.describe(preprocess=restored_from)
    with session.stages.folder("preprocessed", restored_from) as folder:
        model, masks = restore(
            full.model,
            texts.training,
            calibration,
            method,
            restoration,
            folder=folder,
            on_metric=record.metric,
            seed=config.seed,
            device=config.device,
            progress=True,
        )
    sha256 = sha256_of_tensors(model.state_dict())
    record.describe(merged_sha256=sha256)
    if restoration.save_merged:
        save_dense(model, texts.tokenizer, record.run_dir / MERGED)
    return Weights(model, sha256, "merged", _dense_size(session, model), masks)


@timed("quantize")
def quantize_model(session: Session, weights: Weights, texts: Texts, calibration: Tensor, method: Method) -> Weights:
    """Quantize a model in place, continuing from finished blocks, and save it as the run's checkpoint."""
    config, record, model = session.config, session.record, weights.model
    with session.stages.folder("blocks", quantization(session, weights, method)) as folder:
        quantize(
            model,
            calibration,
            method,
            on_metric=record.metric,
            seed=config.seed,
            device=config.device,
            progress=True,
            salient_masks=weights.salient_masks,
            resume=folder,
        )
    quantize_embeddings(model, config.model.embedding_bits)
    cast_rest(model, COMPUTE_DTYPES[config.dtype])
    return save_checkpoint(session, model, texts, method.nominal_bits())


def save_checkpoint(session: Session, model: PreTrainedModel, texts: Texts, nominal_bits: float | None) -> Weights:
    """Save a packed model as the run's checkpoint, in the place of an earlier stage's."""
    folder = session.record.run_dir / CHECKPOINT
    file = save(model, texts.tokenizer, folder, nominal_bits=nominal_bits, overwrite=True)
    return described(session, model, file)


def quantization(session: Session, weights: Weights, method: Method) -> Fingerprint:
    """Describe the quantization of a model by what its result depends on."""
    masks = weights.salient_masks
    return identity.quantization(
        weights=weights.sha256,
        config=config_key(weights.model),
        calibration=session.record.manifest["calibration_sha256"],
        method=method,
        salient_masks=None if masks is None else sha256_of_tensors(masks),
        seed=session.config.seed,
        device=session.config.device,
    )


def described(session: Session, model: PreTrainedModel, file: Path) -> Weights:
    """Describe a packed model by the hash of its file."""
    sha256 = sha256_of_file(file)
    session.record.describe(checkpoint_sha256=sha256)
    return Weights(model, key_of({"file": sha256, **packed_settings(model)}), "quantized", _packed_size(model, file))


# --- evaluate ---------------------------------------------------------------------------------------------------------

BEFORE_FINETUNE = "before finetuning"
"""Label of the quantized model before it is finetuned."""
_CLOCKS = {
    "full precision": "full_precision",
    "merged": "merged",
    BEFORE_FINETUNE: "before_finetune",
    "quantized": "evaluate",
}
"""Label of the model that is scored -> the stage that the time counts for."""


def score(session: Session, weights: Weights, texts: Texts) -> Scores:
    """Score a model in the run's dtype, with a text sample; a model of another dtype is copied for it."""
    model, dtype, home = weights.model, COMPUTE_DTYPES[session.config.dtype], weights.model.device
    with session.clock(_CLOCKS[weights.label]):
        if model.dtype != dtype:  # a packed model has it already
            model = copy.deepcopy(model)
            cast_rest(model, dtype)
        scores = _score(session, dataclasses.replace(weights, model=model), texts)
        nn.Module.to(model, home)
    return dataclasses.replace(scores, metrics={**scores.metrics, **weights.size})


def _score(session: Session, weights: Weights, texts: Texts) -> Scores:
    config, record, model, label = session.config, session.record, weights.model, weights.label
    with contextlib.ExitStack() as prepared:

        @functools.cache
        def prepare() -> None:
            # Called by the first score that is not cached: with all of them cached, nothing is moved or dequantized.
            nn.Module.to(model, config.device)
            stream = config.model.stream
            prepared.enter_context(
                dense_products(model) if stream else dense_cache(model, COMPUTE_DTYPES[config.dtype])
            )

        def remember(measured: Mapping[str, Any], compute: Callable[[], Mapping[str, Any]]) -> Mapping[str, Any]:
            def compute_prepared() -> Mapping[str, Any]:
                prepare()
                return compute()

            fingerprint = identity.score(
                model=session.identity["model"],
                weights=weights.sha256,
                device=config.device,
                dtype=config.dtype,
                measured=measured,
            )
            return session.stages.value("scores", fingerprint, compute_prepared)

        on_metric = partial(record.metric, model=label)
        scores = evaluate(model, texts.tokenizer, texts.evaluation, on_metric=on_metric, label=label, remember=remember)
        prompt, n_tokens = config.eval.sample_prompt, config.eval.sample_tokens
        sample = greedy_sample if diffusion_of(model.config) is None else denoised_sample
        text = remember(
            {"prompt": prompt, "n_tokens": n_tokens},
            lambda: {"text": sample(model, texts.tokenizer, prompt, n_tokens)},
        )["text"]
        if not prepare.cache_info().currsize:
            log.info("%s: all scores were found in the cache", label)
    record.sample(label, text)
    log.info("%s sample: %s", label, " ".join(text.split()))
    return scores


def _dense_size(session: Session, model: PreTrainedModel) -> dict[str, float]:
    width = COMPUTE_DTYPES[session.config.dtype].itemsize
    parameters = sum(parameter.numel() for parameter in model.parameters())
    bits = 8.0 * width
    return {"bits_per_weight": bits, "nominal_bits_per_weight": bits, "checkpoint_bytes": parameters * width}


def _packed_size(model: PreTrainedModel, file: Path) -> dict[str, float]:
    size, nominal = measure(model), stored_nominal_bits(file.parent)
    sizes = {"bits_per_weight": size.bits_per_weight}
    if nominal is not None:
        sizes["nominal_bits_per_weight"] = nominal
    if bits := activation_bits(model):
        sizes["activation_bits"] = bits
    if bits := embedding_bits(model):
        sizes["embedding_bits"] = bits
    sizes["checkpoint_bytes"] = file.stat().st_size
    sizes["linear_bytes"] = size.linear_bytes
    sizes["other_bytes"] = size.other_bytes
    return sizes
