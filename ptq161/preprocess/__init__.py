"""Quantization preprocessing: change a model's weights so that quantizing them loses less.

::

    tokens = training_tokens(tokenizer, restoration, seed=0)
    restored = restore(model, tokens, calibration, method, restoration, seed=0)
    packed = ptq161.quantize(restored, calibration, method)
"""

from typing import TYPE_CHECKING

from ptq161.lazy import lazily
from ptq161.preprocess.restoration import Restoration

if TYPE_CHECKING:
    from ptq161.preprocess.rounds import restore
    from ptq161.preprocess.text import training_tokens

__all__ = ["Restoration", "restore", "training_tokens"]

# Checking a configuration needs the hyperparameters alone.
__getattr__ = lazily(__name__, {"restore": "ptq161.preprocess.rounds", "training_tokens": "ptq161.preprocess.text"})
