"""The settings of the model."""

from __future__ import annotations

import dataclasses

from ptq161.checks import check_at_least, check_choice
from ptq161.errors import UserError
from ptq161.files.paths import absolute_path

PACKED_FORMAT = "ptq161"
"""The ``quant_method`` of this project's own checkpoints."""
EMBEDDING_BITS = (16, 8, 4)


@dataclasses.dataclass(frozen=True)
class ModelConfig:
    """Which model, and where it comes from. Exactly one source is used: ``path``, else ``asset``, else ``repo``.

    Attributes:
        name: what tables and figures call it.
        path: a local Hugging Face folder, or a checkpoint that this project wrote; ``~`` is the home folder.
        asset: name of an embedded asset (:mod:`ptq161.data.assets`).
        repo: name on the Hugging Face hub.
        revision: commit or tag on the hub.
        n_blocks: keep only the first decoder blocks (for debugging).
        trust_remote_code: run the Python code that comes with the model, for architectures that are none of
            transformers' own (:attr:`ptq161.models.architectures.Architecture.own_code`).
        stream: never have the full-precision model in memory: quantize it out of its folder, a few blocks at a time,
            and score the packed weights without a dense copy. The results are the same.
        embedding_bits: of a code of the token embeddings at the model's input and output, rounded to nearest; 16 leaves
            them in the run's dtype.
    """

    name: str
    path: str | None = None
    asset: str | None = None
    repo: str | None = None
    revision: str | None = None
    n_blocks: int | None = None
    trust_remote_code: bool = False
    stream: bool = False
    embedding_bits: int = 16

    def __post_init__(self) -> None:
        """Reject a config without a source; the path becomes absolute."""
        if self.path:
            object.__setattr__(self, "path", str(absolute_path("model.path", self.path)))
        if not (self.path or self.asset or self.repo):
            raise UserError(f"model={self.name} has no source: set model.path, model.asset or model.repo.")
        check_at_least("model.n_blocks", self.n_blocks, 1)
        check_choice("model.embedding_bits", self.embedding_bits, EMBEDDING_BITS)
