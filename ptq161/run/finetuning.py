"""The stage of a run that finetunes the quantized model."""

from __future__ import annotations

from torch import Tensor
from transformers import PreTrainedModel

from ptq161.files import identity
from ptq161.files.hashing import sha256_of_tensors
from ptq161.finetune.adapters import tune
from ptq161.finetune.distillation import Distillation
from ptq161.finetune.sampling import first_token, sample_text
from ptq161.finetune.training import distil
from ptq161.finetune.tuning import Tuning
from ptq161.models.architectures import config_key
from ptq161.models.loading import load_weights
from ptq161.numerics import COMPUTE_DTYPES
from ptq161.run.session import Session, timed
from ptq161.run.stages import Texts, Weights, save_checkpoint
from ptq161.seeding import stage_generator
from ptq161.training.losses import frozen_copy


@timed("finetune")
def finetune(session: Session, packed: Weights, texts: Texts, settings: Distillation | Tuning) -> Weights:
    """Finetune the quantized model in place, and save it as the run's checkpoint."""
    if isinstance(settings, Tuning):
        _tune(session, packed, texts, settings)
    else:
        _distil(session, packed, texts, settings)
    return save_checkpoint(session, packed.model, texts, packed.size.get("nominal_bits_per_weight"))


def _tune(session: Session, packed: Weights, texts: Texts, tuning: Tuning) -> None:
    """Train adapters on the finetuning's text."""
    config = session.config
    tuned = identity.tuning(
        packed=packed.sha256,
        tokens=sha256_of_tensors({"tokens": texts.distillation}),
        settings=tuning,
        seed=config.seed,
        device=config.device,
    )
    with session.stages.folder("finetuned", tuned) as folder:
        tune(
            packed.model,
            texts.distillation,
            tuning,
            folder=folder,
            on_metric=session.record.metric,
            seed=config.seed,
            device=config.device,
            progress=True,
        )


def _distil(session: Session, packed: Weights, texts: Texts, distillation: Distillation) -> None:
    """Distil the quantized model from the full-precision one."""
    config, model = session.config, packed.model
    # Loaded again, since the quantization took the first in place.
    full = load_weights(config.model)
    tokens = texts.distillation if distillation.corpora_read else _sampled(session, full, texts, distillation)
    distilled = identity.distillation(
        packed=packed.sha256,
        full_precision=str(session.record.manifest["model_sha256"]),
        tokens=sha256_of_tensors({"tokens": tokens}),
        settings=distillation,
        seed=config.seed,
        device=config.device,
    )
    with session.stages.folder("finetuned", distilled) as folder:
        distil(
            model,
            full,
            tokens,
            distillation,
            folder=folder,
            on_metric=session.record.metric,
            seed=config.seed,
            device=config.device,
            progress=True,
        )


def _sampled(session: Session, full: PreTrainedModel, texts: Texts, distillation: Distillation) -> Tensor:
    """Sample the finetuning's text from the full-precision model."""
    config = session.config
    first = first_token(texts.tokenizer)
    n, seq_len, dtype = distillation.sequences, distillation.seq_len, distillation.compute_dtype
    said = identity.sampled_text(
        weights=str(session.record.manifest["model_sha256"]),
        config=config_key(full),
        n=n,
        seq_len=seq_len,
        first=first,
        dtype=dtype,
        seed=config.seed,
        device=config.device,
    )

    def sample() -> Tensor:
        speaker = frozen_copy(full, COMPUTE_DTYPES[dtype], config.device)
        generator = stage_generator(config.seed, "sampled text")
        return sample_text(speaker, n, seq_len, generator, first=first, progress=True)

    return session.stages.tensor("tokens", said, sample)
