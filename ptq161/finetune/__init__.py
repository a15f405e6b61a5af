"""Finetuning: a quantized model distilled from the full-precision one, by what its packed weights store.

It imports ``training`` and the rooms below it; ``tracking`` and every room above may import it, ``evaluation`` and
``preprocess`` may not.
"""

from ptq161.lazy import lazy_attributes

__getattr__ = lazy_attributes(
    __name__,
    {
        "ptq161.finetune.distillation": ["Distillation"],
        "ptq161.finetune.sampling": ["sample_text"],
        "ptq161.finetune.training": ["distil"],
        "ptq161.training.text": ["training_tokens"],
    },
)
