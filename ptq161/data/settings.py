"""The names of all texts, and the settings of the calibration tokens."""

from __future__ import annotations

import dataclasses

from ptq161.checks import check_at_least, check_choice
from ptq161.errors import UserError

CALIBRATION_SETS = ("squad", "drop", "coqa", "passages", "wikitext2", "c4", "ptb", "redpajama", "text_file")
"""Texts that a model can be calibrated or trained on."""
UNIONS = {"passages": ("squad", "drop", "coqa")}
"""Sets that are several others together."""
CORPORA = ("boolq", "lambada", "wikitext2", "c4", "ptb", "text_file")
"""Texts that perplexity is measured on."""


@dataclasses.dataclass(frozen=True)
class CalibConfig:
    """The calibration tokens ``[n_samples, seq_len]``.

    Attributes:
        name: one of ``CALIBRATION_SETS``.
        n_samples: windows drawn at random starts; overlap is allowed.
        seq_len: tokens per window.
        text_file: the file of ``name=text_file``.
    """

    name: str
    n_samples: int
    seq_len: int
    text_file: str | None = None

    def __post_init__(self) -> None:
        """Reject unknown sets and empty windows."""
        check_choice("calib.name", self.name, CALIBRATION_SETS)
        check_at_least("calib.n_samples", self.n_samples, 1)
        check_at_least("calib.seq_len", self.seq_len, 2)
        if self.name == "text_file" and not self.text_file:
            raise UserError("calib=text_file needs a file: set calib.text_file=FILE.")
