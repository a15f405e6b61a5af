"""The hyperparameters of restorative training."""

from __future__ import annotations

import dataclasses
from typing import ClassVar

from ptq161.checks import check_choice
from ptq161.training.settings import Names, check_counts, check_list, check_positive, check_share, check_training

_UPDATES = ("lora", "full")
_OBJECTIVES = ("lm", "kl", "kl_hidden")
_MASKS = ("first", "fresh")

ROLES: dict[str, tuple[str, ...]] = {
    "q": ("q_proj",),
    "k": ("k_proj",),
    "v": ("v_proj",),
    "o": ("o_proj", "out_proj", "attn_out"),
    "gate": ("gate_proj", "ff_proj"),
    "up": ("up_proj", "fc1"),
    "down": ("down_proj", "fc2", "ff_out"),
}
"""Role of a linear in its decoder block -> its names in the architectures."""


@dataclasses.dataclass(frozen=True)
class Restoration:
    """Restorative training before quantization (Zhao et al., ACL 2025, Section 3.4). The defaults are the paper's.

    The paper does not state the number of steps and the batch size.

    Attributes:
        update: ``lora``, a low-rank update merged after training, or ``full``, the target weights themselves.
        rank: of the low-rank update.
        alpha: the update is scaled by ``alpha / rank``.
        dropout: of the low-rank update's inputs.
        targets: the linears that are trained, by their role in a block (``ROLES``); a role that an architecture lacks
            (the gate of OPT) is left out.
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
    checkpoint_every: int = 100
    save_merged: bool = False
    score_merged: bool = True

    def __post_init__(self) -> None:
        """Reject values outside their range."""
        check_choice("preprocess.update", self.update, _UPDATES)
        check_choice("preprocess.objective", self.objective, _OBJECTIVES)
        check_choice("preprocess.mask", self.mask, _MASKS)
        check_list("preprocess.targets", self.targets, tuple(ROLES))
        check_training(self)
        check_counts(self, ("rank", "rounds"))
        check_positive(self, ("alpha", "lr"))
        check_share(self, "dropout")

    @property
    def corpora_read(self) -> list[str]:
        """All corpora."""
        return self.corpora

    @property
    def sequences(self) -> int:
        """Sequences of one round."""
        return self.steps * self.accumulation * self.batch_size
