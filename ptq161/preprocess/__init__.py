"""Quantization preprocessing: change a model's weights so that quantizing them loses less.

::

    tokens = training_tokens(tokenizer, restoration, seed=0)
    restored, masks = restore(model, tokens, calibration, method, restoration, seed=0)
    packed = ptq161.quantize(restored, calibration, method, salient_masks=masks)

Imports ``driver/`` and below.
"""

from ptq161.lazy import lazy_attributes

__getattr__ = lazy_attributes(
    __name__,
    {
        "ptq161.preprocess.restoration": ["Restoration"],
        "ptq161.preprocess.rounds": ["restore"],
        "ptq161.preprocess.text": ["training_tokens"],
    },
)
