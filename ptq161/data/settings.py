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


MASKINGS = ("none", "linear")
"""What may become of the calibration tokens: nothing, or masks over a share that rises from window to window."""


@dataclasses.dataclass(frozen=True)
class CalibConfig:
    """The calibration tokens ``[n_samples, seq_len]``.

    Attributes:
        name: one of ``CALIBRATION_SETS``.
        n_samples: windows drawn at random starts; overlap is allowed.
        seq_len: tokens per window.
        text_file: the file of ``name=text_file``.
        masking: one of ``MASKINGS``; ``linear`` is for masked-diffusion language models.
        mask_token: id of the model's mask token, which ``masking`` needs.
        masking_prefix: share of each window, from its beginning, that ``masking`` leaves visible, in [0, 1).
    """

    name: str
    n_samples: int
    seq_len: int
    text_file: str | None = None
    masking: str = "none"
    mask_token: int | None = None
    masking_prefix: float = 0.25

    def __post_init__(self) -> None:
        """Reject unknown sets, empty windows, and masks that are no token or leave no place."""
        check_choice("calib.name", self.name, CALIBRATION_SETS)
        check_at_least("calib.n_samples", self.n_samples, 1)
        check_at_least("calib.seq_len", self.seq_len, 2)
        if self.name == "text_file" and not self.text_file:
            raise UserError("calib=text_file needs a file: set calib.text_file=FILE.")
        check_choice("calib.masking", self.masking, MASKINGS)
        if self.masking != "none" and self.mask_token is None:
            raise UserError(
                f"calib.masking={self.masking} needs the id of the model's mask token: set calib.mask_token=ID."
            )
        check_at_least("calib.mask_token", self.mask_token, 0)
        if not 0 <= self.masking_prefix < 1:
            raise UserError(
                f"calib.masking_prefix={self.masking_prefix}: use a value in [0, 1), the share that is never masked."
            )

    def masking_identity(self) -> dict[str, str | int | float | None]:
        """Return what the masks follow from, beside tokens and seed; empty without masks."""
        if self.masking == "none":
            return {}
        return {"masking": self.masking, "mask_token": self.mask_token, "masking_prefix": self.masking_prefix}
