"""The hyperparameters of finetuning, and which methods they fit."""

from __future__ import annotations

import dataclasses

from ptq161.checks import check_at_least, check_choice
from ptq161.errors import UserError
from ptq161.methods.base import Method
from ptq161.methods.coded import LEARNABLE
from ptq161.training.settings import Names, check_counts, check_positive, check_training

_UPDATES = ("scales", "codes")
_OBJECTIVES = ("kl", "kl_hidden")
_TEXTS = ("corpora", "self")


@dataclasses.dataclass(frozen=True)
class Distillation:
    """Distillation of a quantized model from the full-precision one (this project's own).

    Attributes:
        update: ``scales``, all floating-point tensors that packed weights store, or ``codes``, these and the codes, for
            the formats in ``ptq161.methods.coded.LEARNABLE`` (zero points are theirs to keep then).
        train_norms: train the weights of the model's norms as well, which take no further byte.
        train_embeddings: train the embeddings of the tokens as well, at the input and the output, in the dtype in which
            they are stored.
        objective: ``kl``, the divergence of the next token's distribution from the full-precision model's;
            ``kl_hidden``, that and ``hidden_weight`` x the hidden states' relative error.
        hidden_weight: weight of the hidden states in ``kl_hidden``.
        lr: learning rate of scales, means, zero points and norms, as a share of their size, at the end of the warm-up;
            it falls to zero along a cosine.
        code_lr: learning rate of codes, in cells of their grid; without effect on ``scales``.
        embedding_lr: learning rate of embeddings, in units of their root mean square; without effect unless
            ``train_embeddings``.
        warmup_share: share of the steps over which the rates rise.
        max_grad_norm: gradients are scaled down to this norm.
        steps: optimizer steps at most.
        batch_size: sequences per forward pass.
        accumulation: forward passes per step.
        seq_len: tokens per sequence; documents are packed without padding.
        text: ``corpora``, or ``self``: what the full-precision model says, sampled at temperature one.
        corpora: training text, each one of ``ptq161.data.settings.CALIBRATION_SETS``; not read with ``text=self``.
        text_file: the file of the corpus ``text_file``.
        held_out: sequences that are never trained on; the best state on them is kept. 0 keeps the last state.
        held_out_every: steps between two measurements on them.
        patience: measurements without a new best, after which the training ends; None goes through all steps.
        compute_dtype: of matrix products and frozen weights; trained parameters are always float32.
        checkpoint_every: steps between two checkpoints.
        score_before: evaluate the quantized model before the training as well.
    """

    update: str = "scales"
    train_norms: bool = True
    train_embeddings: bool = False
    objective: str = "kl"
    hidden_weight: float = 1.0
    lr: float = 2e-3
    code_lr: float = 3e-3
    embedding_lr: float = 1e-3
    warmup_share: float = 0.05
    max_grad_norm: float = 1.0
    steps: int = 60
    batch_size: int = 8
    accumulation: int = 1
    seq_len: int = 256
    text: str = "corpora"
    corpora: list[str] = dataclasses.field(default_factory=lambda: ["passages"])
    text_file: str | None = None
    held_out: int = 16
    held_out_every: int = 10
    patience: int | None = None
    compute_dtype: str = "float32"
    checkpoint_every: int = 20
    score_before: bool = True

    def __post_init__(self) -> None:
        """Reject values outside their range."""
        check_choice("finetune.update", self.update, _UPDATES)
        check_choice("finetune.objective", self.objective, _OBJECTIVES)
        check_choice("finetune.text", self.text, _TEXTS)
        check_training(self)
        check_counts(self, ("held_out_every",))
        check_at_least("finetune.held_out", self.held_out, 0)
        check_at_least("finetune.patience", self.patience, 1)
        check_positive(self, ("lr", "code_lr", "embedding_lr"))

    @property
    def names(self) -> Names:
        """What it is called."""
        rates = "finetune.lr" if self.update == "scales" else "finetune.lr or finetune.code_lr"
        return Names(
            group="finetune",
            function="distil",
            title="finetuning",
            bar="finetune",
            stage="distillation",
            rates=rates,
        )

    @property
    def corpora_read(self) -> list[str]:
        """All corpora, or none where the text is sampled."""
        return [] if self.text == "self" else self.corpora

    @property
    def sequences(self) -> int:
        """Sequences of the training, and those held out."""
        return self.steps * self.accumulation * self.batch_size + self.held_out


def check_learnable(method: Method, name: str) -> None:
    """Check that the codes of a method can be learned, as far as it names its format: before anything is loaded.

    Args:
        method: hyperparameters.
        name: of the method, in the error.

    Raises:
        UserError: they cannot.
    """
    stored = getattr(method, "format", None)
    if stored is not None and stored not in LEARNABLE:
        raise UserError(
            f"finetune.update=codes: the codes of method={name} (format {stored}) cannot be learned; use "
            "finetune=scales, or a method of another format, such as waterfill or ptq161."
        )
