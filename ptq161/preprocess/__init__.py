"""Quantization preprocessing: change a model's weights so that quantizing them loses less.

::

    tokens = training_tokens(tokenizer, restoration, seed=0)
    restored = restore(model, tokens, calibration, method, restoration, seed=0)
    packed = ptq161.quantize(restored, calibration, method)
"""

from importlib import import_module
from typing import TYPE_CHECKING, Any

from ptq161.preprocess.restoration import Restoration

if TYPE_CHECKING:
    from ptq161.preprocess.rounds import restore
    from ptq161.preprocess.text import training_tokens

__all__ = ["Restoration", "restore", "training_tokens"]

_FUNCTIONS = {"restore": "ptq161.preprocess.rounds", "training_tokens": "ptq161.preprocess.text"}


def __getattr__(name: str) -> Any:
    """Import a function when it is first used: checking a configuration needs the hyperparameters alone."""
    if name in _FUNCTIONS:
        return getattr(import_module(_FUNCTIONS[name]), name)
    raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
