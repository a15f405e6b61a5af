"""Quantization preprocessing: training text, the training of a quantized model, and its checkpoints.

It imports ``driver`` and the rooms below it; ``tracking`` and every room above may import it, ``evaluation`` may not.
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
