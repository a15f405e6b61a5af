"""Quantization preprocessing: the rounds of a restoration, its student, and its settings.

It imports ``training`` and the rooms below it; ``tracking`` and every room above may import it, ``evaluation`` may not.
"""

from ptq161.lazy import lazy_attributes

__getattr__ = lazy_attributes(
    __name__,
    {
        "ptq161.preprocess.restoration": ["Restoration"],
        "ptq161.preprocess.rounds": ["restore"],
        "ptq161.training.text": ["training_tokens"],
    },
)
