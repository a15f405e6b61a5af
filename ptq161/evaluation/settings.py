"""The settings of the evaluation."""

from __future__ import annotations

import dataclasses

from ptq161.checks import check_at_least, check_choice
from ptq161.data.settings import CORPORA
from ptq161.errors import UserError


@dataclasses.dataclass(frozen=True)
class EvalConfig:
    """The settings of the evaluation.

    Attributes:
        name: of the protocol, in tables.
        corpora: perplexity corpora, each one of ``CORPORA``.
        seq_len: tokens per perplexity window.
        max_windows: first windows of each corpus that are scored; None scores all.
        text_file: the file of the corpus ``text_file``.
        tasks: zero-shot tasks: the embedded ones (``ptq161.evaluation.EMBEDDED_TASKS``) or any of lm-eval's.
        limit: first documents of each task that are scored; None scores all.
        batch_size: sequences per forward pass.
        full_precision: score the unquantized model as well.
        sample_prompt: prompt of the greedy text sample that each run logs.
        sample_tokens: new tokens of that sample.
    """

    name: str
    corpora: list[str]
    seq_len: int
    tasks: list[str]
    max_windows: int | None = None
    text_file: str | None = None
    limit: int | None = None
    batch_size: int = 16
    full_precision: bool = True
    sample_prompt: str = "The capital of France is"
    sample_tokens: int = 24

    def __post_init__(self) -> None:
        """Reject unknown corpora and empty windows."""
        for corpus in self.corpora:
            check_choice("eval.corpora", corpus, CORPORA)
        check_at_least("eval.seq_len", self.seq_len, 2)
        check_at_least("eval.max_windows", self.max_windows, 1)
        check_at_least("eval.limit", self.limit, 1)
        check_at_least("eval.batch_size", self.batch_size, 1)
        check_at_least("eval.sample_tokens", self.sample_tokens, 1)
        if not self.sample_prompt:
            raise UserError("eval.sample_prompt is empty: give the text that the sample continues.")
        if "text_file" in self.corpora and not self.text_file:
            raise UserError("eval.corpora=[text_file] needs a file: set eval.text_file=FILE.")
