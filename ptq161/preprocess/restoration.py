"""The hyperparameters of restorative training."""

from __future__ import annotations

import dataclasses
from typing import ClassVar

from ptq161.checks import check_at_least, check_choice
from ptq161.errors import UserError
from ptq161.methods.base import Method
from ptq161.training.arithmetic.base import ArithmeticSettings
from ptq161.training.arithmetic.registry import check_arithmetic
from ptq161.training.settings import Names, check_counts, check_list, check_positive, check_share, check_training
from ptq161.training.targets import ROLES

_UPDATES = ("lora", "full")
_BASES = ("packed", "nf4")
_OBJECTIVES = ("lm", "kl", "kl_hidden")
_MASKS = ("first", "fresh")


@dataclasses.dataclass(frozen=True, kw_only=True)
class Restoration(ArithmeticSettings):
    """Restorative training before quantization (Zhao et al., ACL 2025, Section 3.4). The defaults are the paper's.

    The paper does not state the number of steps and the batch size. The settings of the arithmetic are in
    :class:`ptq161.training.arithmetic.base.ArithmeticSettings`.

    Attributes:
        update: ``lora``, a low-rank update merged after training, or ``full``, the target weights themselves.
        rank: of the low-rank update.
        alpha: the update is scaled by ``alpha / rank``.
        dropout: of the low-rank update's inputs.
        base: what the low-rank update is trained on: ``packed``, the quantized model, or ``nf4``, its trained linears
            rounded to NormalFloat codes of 4 bits, to which the update is then added.
        targets: the linears that are trained, by their role in a block (``ptq161.training.targets.ROLES``); a role
            that an architecture lacks (the gate of OPT) is left out.
        objective: ``lm``, the next token's cross-entropy; ``kl``, the divergence of the next token's distribution from
            the full-precision model's; ``kl_hidden``, that and ``hidden_weight`` x the hidden states' relative error.
        hidden_weight: weight of the hidden states in ``kl_hidden``.
        lr: learning rate at the end of the warm-up; it falls to zero along a cosine.
        warmup_share: share of the steps over which the rate rises.
        max_grad_norm: gradients are scaled down to this norm.
        steps: optimizer steps per round.
        batch_size: sequences per forward pass.
        accumulation: forward passes per step.
        seq_len: tokens per sequence; documents are packed without padding.
        corpora: training text, each one of ``ptq161.data.settings.CALIBRATION_SETS``.
        text_file: the file of the corpus ``text_file``.
        rounds: how often the model is quantized and restored.
        mask: salient channels of the final quantization, and of every round's but the first: ``first``, those of the
            first pass (the paper), or ``fresh``, selected anew. Without effect on methods without salient channels.
        gradient_checkpointing: compute each block's activations again in the backward pass in place of keeping them.
        compute_dtype: of matrix products and frozen weights; trained parameters are always float32.
        regulariser: strength of the dual-range regulariser of the trained weights, added to the loss; 0 for none. With
            a full update only (:func:`ptq161.training.arithmetic.spectral.dual_range`).
        regulariser_alpha1: weight of large numbers in it.
        regulariser_alpha2: weight of small numbers in it.
        checkpoint_every: steps between two checkpoints.
        save_merged: keep the restored full-precision model as a plain Hugging Face folder.
        score_merged: evaluate the restored full-precision model, where full precision is evaluated at all.
    """

    names: ClassVar[Names] = Names(
        group="preprocess",
        function="restore",
        title="restorative training",
        bar="restore",
        stage="restoration",
        rates="preprocess.lr",
    )

    update: str = "lora"
    rank: int = 64
    alpha: float = 16.0
    dropout: float = 0.1
    base: str = "packed"
    targets: list[str] = dataclasses.field(default_factory=lambda: ["q", "k", "v", "gate", "up", "down"])
    objective: str = "lm"
    hidden_weight: float = 1.0
    lr: float = 1e-4
    warmup_share: float = 0.05
    max_grad_norm: float = 1.0
    steps: int = 1000
    batch_size: int = 1
    accumulation: int = 2
    seq_len: int = 2048
    corpora: list[str] = dataclasses.field(default_factory=lambda: ["redpajama"])
    text_file: str | None = None
    rounds: int = 1
    mask: str = "first"
    gradient_checkpointing: bool = False
    compute_dtype: str = "float32"
    regulariser: float = 0.0
    regulariser_alpha1: float = 1.0
    regulariser_alpha2: float = 1.0
    checkpoint_every: int = 100
    save_merged: bool = False
    score_merged: bool = True

    def __post_init__(self) -> None:
        """Reject values outside their range."""
        check_choice("preprocess.update", self.update, _UPDATES)
        check_choice("preprocess.objective", self.objective, _OBJECTIVES)
        check_choice("preprocess.mask", self.mask, _MASKS)
        check_choice("preprocess.base", self.base, _BASES)
        if self.base != "packed" and self.update != "lora":
            raise UserError(f"preprocess.base={self.base}: a full update has no base; use preprocess.update=lora.")
        check_list("preprocess.targets", self.targets, tuple(ROLES))
        check_training(self)
        check_arithmetic(self.names.group, self)
        check_counts(self, ("rank", "rounds"))
        check_positive(self, ("alpha", "lr"))
        check_share(self, "dropout")
        for name in ("regulariser", "regulariser_alpha1", "regulariser_alpha2"):
            check_at_least(f"preprocess.{name}", getattr(self, name), 0)
        if self.regulariser and self.update != "full":
            raise UserError(
                f"preprocess.regulariser={self.regulariser}: it is of whole weights; use preprocess.update=full."
            )

    @property
    def corpora_read(self) -> list[str]:
        """All corpora."""
        return self.corpora

    @property
    def sequences(self) -> int:
        """Sequences of one round."""
        return self.steps * self.accumulation * self.batch_size


def check_restorable(method: Method) -> None:
    """Check that a dense model can stand for one that a method quantizes: before anything is loaded.

    Raises:
        UserError: the method rounds activations.
    """
    if bits := getattr(method, "activation_bits", None):
        raise UserError(
            f"method.activation_bits={bits}: preprocessing trains a dense model, which does not round its activations; "
            "use method.activation_bits=null, or preprocess=none."
        )
