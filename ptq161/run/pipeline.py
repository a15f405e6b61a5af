"""One run from beginning to end, to be read like the method section of a paper.

The stages are functions of :mod:`ptq161.run.stages`, which also use the cache and write the record.
"""

from __future__ import annotations

import dataclasses
import logging

from ptq161.allocation import keep_freed_memory
from ptq161.finetune.distillation import Distillation
from ptq161.finetune.tuning import Tuning
from ptq161.methods.base import Method
from ptq161.run.config import RunConfig
from ptq161.run.finetuning import finetune
from ptq161.run.session import Results, RunContext, Session, is_packed_model, run_once
from ptq161.run.stages import (
    BEFORE_FINETUNE,
    Texts,
    Weights,
    calibrate,
    load_model,
    load_packed,
    open_texts,
    preprocess,
    quantize_model,
    score,
)
from ptq161.run.streaming import open_stored, quantize_by_blocks
from ptq161.run.summary import print_results

log = logging.getLogger(__name__)


def run(config: RunConfig, context: RunContext) -> Results:
    """Quantize, score and record; or reuse the record of an identical run.

    Returns:
        the content of ``results.json``.

    Raises:
        UserError: any error that the user can put right.
    """
    keep_freed_memory()
    results = run_once(config, context, _experiment)
    # The record is complete. Whatever the caller's stdout cannot take is lost to the screen alone.
    try:
        print_results(results, context.run_dir)
    except Exception as error:
        log.warning("the results are in %s, but could not be printed: %s", context.run_dir, error)
    return results


def _experiment(session: Session) -> Results:
    config = session.config
    if is_packed_model(config):
        return _evaluate_packed(session, str(config.model.path))
    if config.method is None:
        return _evaluate_full_precision(session)
    if config.model.stream:
        return _quantize_by_blocks_and_evaluate(session, config.method)
    return _quantize_and_evaluate(session, config.method)


def _quantize_and_evaluate(session: Session, method: Method) -> Results:
    config = session.config
    compared, restoration, finetuning = config.eval.full_precision, config.preprocess, config.finetune
    results: Results = {"full_precision": {}}

    # Texts are opened before the weights are loaded: their errors show within seconds.
    texts = open_texts(session)
    calibration = calibrate(session, texts)
    weights = load_model(session)
    if compared:
        results["full_precision"] = score(session, weights, texts).metrics

    # Preprocessing: the weights are trained so that quantizing them loses less.
    if restoration is not None:
        weights = preprocess(session, weights, texts, calibration, method, restoration)
        if compared and restoration.score_merged:
            results["merged"] = score(session, weights, texts).metrics

    packed = quantize_model(session, weights, texts, calibration, method)

    # Finetuning: what the packed weights store is distilled from the full-precision model, or adapters are trained.
    if finetuning is not None:
        packed = _finetuned(session, packed, texts, finetuning, results)

    scores = score(session, packed, texts)
    return {"metrics": scores.metrics, **results, "protocol": scores.protocol}


def _quantize_by_blocks_and_evaluate(session: Session, method: Method) -> Results:
    """The same for a model that is never in memory, which nothing is trained or compared with."""
    texts = open_texts(session)
    calibration = calibrate(session, texts)
    packed = quantize_by_blocks(session, open_stored(session), texts, calibration, method)
    scores = score(session, packed, texts)
    return {"metrics": scores.metrics, "full_precision": {}, "protocol": scores.protocol}


def _evaluate_full_precision(session: Session) -> Results:
    texts = open_texts(session)
    scores = score(session, load_model(session), texts)
    return {"metrics": scores.metrics, "full_precision": scores.metrics, "protocol": scores.protocol}


def _evaluate_packed(session: Session, folder: str) -> Results:
    packed, texts = load_packed(session, folder)
    results: Results = {"full_precision": {}}
    if isinstance(session.config.finetune, Tuning):
        packed = _finetuned(session, packed, texts, session.config.finetune, results)
    scores = score(session, packed, texts)
    return {"metrics": scores.metrics, **results, "protocol": scores.protocol}


def _finetuned(
    session: Session, packed: Weights, texts: Texts, finetuning: Distillation | Tuning, results: Results
) -> Weights:
    """Finetune a quantized model, with its scores before among the results."""
    if finetuning.score_before:
        before = dataclasses.replace(packed, label=BEFORE_FINETUNE)
        results["before_finetune"] = score(session, before, texts).metrics
    return finetune(session, packed, texts, finetuning)
