"""The hyperparameters of finetuning adapters."""

from __future__ import annotations

import dataclasses
from typing import ClassVar

from ptq161.checks import check_at_least, check_choice
from ptq161.packed.weight import SCALE_DTYPES
from ptq161.training.arithmetic.base import ArithmeticSettings
from ptq161.training.arithmetic.registry import check_arithmetic
from ptq161.training.settings import Names, check_counts, check_list, check_positive, check_share, check_training
from ptq161.training.targets import ROLES


@dataclasses.dataclass(frozen=True, kw_only=True)
class Tuning(ArithmeticSettings):
    """Low-rank adapters on a quantized model, trained on a text (GSQ-Tuning: Zhou et al., ACL 2025, arXiv 2502.12913).

    The settings of the arithmetic are in :class:`ptq161.training.arithmetic.base.ArithmeticSettings`.

    Attributes:
        rank: of each adapter.
        alpha: an adapter is scaled by ``alpha / rank``.
        dropout: of the adapters' inputs.
        targets: the linears that get one, by their role in a block (``ptq161.training.targets.ROLES``); a role that an
            architecture lacks (the gate of OPT) is left out.
        adapter_dtype: in which they are stored, ``float16`` or ``float32``; they are trained in float32.
        lr: learning rate at the end of the warm-up; it falls to zero along a cosine.
        warmup_share: share of the steps over which the rate rises.
        max_grad_norm: gradients are scaled down to this norm.
        steps: optimizer steps at most.
        batch_size: sequences per forward pass.
        accumulation: forward passes per step.
        seq_len: tokens per sequence; documents are packed without padding.
        corpora: training text, each one of ``ptq161.data.settings.CALIBRATION_SETS``.
        text_file: a file; where ``corpora`` does not name it as ``text_file``, it is read in their place.
        held_out: sequences that are never trained on; the best state on them is kept. 0 keeps the last state.
        held_out_every: steps between two measurements on them.
        patience: measurements without a new best, after which the training ends; None goes through all steps.
        compute_dtype: of matrix products; trained parameters are always float32.
        gradient_checkpointing: compute each block's activations again in the backward pass in place of keeping them.
        checkpoint_every: steps between two checkpoints.
        score_before: evaluate the quantized model before the training as well.
    """

    names: ClassVar[Names] = Names(
        group="finetune",
        function="tune",
        title="finetuning",
        bar="finetune",
        stage="tuning",
        rates="finetune.lr",
    )
    objective: ClassVar[str] = "lm"
    """The next token's cross-entropy: there is no full-precision model to compare with."""
    hidden_weight: ClassVar[float] = 1.0

    rank: int = 64
    alpha: float = 16.0
    dropout: float = 0.0
    targets: list[str] = dataclasses.field(default_factory=lambda: list(ROLES))
    adapter_dtype: str = "float16"
    lr: float = 1e-3
    warmup_share: float = 0.05
    max_grad_norm: float = 1.0
    steps: int = 60
    batch_size: int = 8
    seq_len: int = 256
    corpora: list[str] = dataclasses.field(default_factory=lambda: ["passages"])
    text_file: str | None = None
    held_out: int = 0
    held_out_every: int = 10
    patience: int | None = None
    compute_dtype: str = "float32"
    arithmetic: str = "gse"
    gradient_checkpointing: bool = False
    checkpoint_every: int = 20
    score_before: bool = True

    def __post_init__(self) -> None:
        """Reject values outside their range."""
        group = self.names.group
        check_choice(f"{group}.adapter_dtype", self.adapter_dtype, SCALE_DTYPES)
        check_list(f"{group}.targets", self.targets, tuple(ROLES))
        check_training(self)
        check_arithmetic(group, self)
        check_counts(self, ("rank", "held_out_every"))
        check_at_least(f"{group}.held_out", self.held_out, 0)
        check_at_least(f"{group}.patience", self.patience, 1)
        check_positive(self, ("alpha", "lr"))
        check_share(self, "dropout")

    @property
    def corpora_read(self) -> list[str]:
        """The text file alone where one is given, unless it is one of the corpora."""
        return ["text_file"] if self.text_file and "text_file" not in self.corpora else self.corpora

    @property
    def sequences(self) -> int:
        """Sequences of the training, and those held out."""
        return self.steps * self.accumulation * self.batch_size + self.held_out
