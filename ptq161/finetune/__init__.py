"""Finetuning: what a quantized model stores, distilled from the full-precision one; or adapters on it, on a text.

It imports ``training`` and the rooms below it; ``tracking`` and every room above may import it, ``evaluation`` and
``preprocess`` may not.
"""

from ptq161.lazy import lazy_attributes

__getattr__ = lazy_attributes(
    __name__,
    {
        "ptq161.finetune.adapters": ["tune"],
        "ptq161.finetune.distillation": ["Distillation"],
        "ptq161.finetune.sampling": ["sample_text"],
        "ptq161.finetune.training": ["distil"],
        "ptq161.finetune.tuning": ["Tuning"],
        "ptq161.training.text": ["training_tokens"],
    },
)
