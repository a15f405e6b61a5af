"""The stages of a run whose full-precision model is never in memory (``model.stream=true``)."""

from __future__ import annotations

from torch import Tensor

from ptq161.cache.results import CHECKPOINT
from ptq161.driver.folders import quantize_stored
from ptq161.errors import UserError
from ptq161.files.hashing import sha256_of_tensors
from ptq161.methods.base import Method
from ptq161.models.architectures import architecture_of, decoder_blocks
from ptq161.models.stored import StoredModel
from ptq161.numerics import COMPUTE_DTYPES
from ptq161.packed.checkpoint import load
from ptq161.run.session import Session, timed
from ptq161.run.stages import Texts, Weights, described, quantization


@timed("load")
def open_stored(session: Session) -> StoredModel:
    """Open the model in its folder.

    Raises:
        UserError: it is none that can be read in parts, or its packed checkpoint could not be loaded.
    """
    stored = StoredModel(session.config.model)
    if architecture_of(stored.model).own_code:
        raise UserError(
            f"model.stream=true: the packed checkpoint of a {stored.model.config.model_type} model, whose code is none "
            "of transformers' own, cannot be loaded for its scores: set model.stream=false."
        )
    return stored


@timed("quantize")
def quantize_by_blocks(
    session: Session, stored: StoredModel, texts: Texts, calibration: Tensor, method: Method
) -> Weights:
    """Quantize a model out of its folder, continuing from finished blocks, and load the checkpoint that this makes."""
    config, record = session.config, session.record
    with stored.tensors() as tensors:
        sha256 = sha256_of_tensors(tensors)
    record.describe(model_sha256=sha256, n_blocks=len(decoder_blocks(stored.model)))
    full = Weights(stored.model, sha256, "full precision", {})
    with session.stages.folder("blocks", quantization(session, full, method)) as folder:
        file = quantize_stored(
            stored,
            calibration,
            method,
            record.run_dir / CHECKPOINT,
            tokenizer=texts.tokenizer,
            dtype=COMPUTE_DTYPES[config.dtype],
            on_metric=record.metric,
            seed=config.seed,
            device=config.device,
            progress=True,
            resume=folder,
            nominal_bits=method.nominal_bits(),
            embedding_bits=config.model.embedding_bits,
            overwrite=True,
        )
    model, _ = load(file.parent)
    return described(session, model, file)
