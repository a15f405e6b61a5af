"""Post-training quantization of language models below 2 bits per weight: run it, compare it, run it again.

The library in four verbs::

    model = ptq161.quantize(model, tokens, PTQ161(mask_ratio=0.2))
    ptq161.save(model, tokenizer, "checkpoint")
    model, tokenizer = ptq161.load("checkpoint")
    ptq161.export("checkpoint", "dense_model")
"""

from typing import TYPE_CHECKING

from ptq161.errors import UserError
from ptq161.lazy import lazily

if TYPE_CHECKING:
    from ptq161.driver.quantization import quantize
    from ptq161.packed.checkpoint import export, load, save

__all__ = ["UserError", "export", "load", "quantize", "save"]
__version__ = "0.1.0"

# The model library takes seconds to import, an error in a setting should not.
__getattr__ = lazily(
    __name__,
    {
        "quantize": "ptq161.driver.quantization",
        "export": "ptq161.packed.checkpoint",
        "load": "ptq161.packed.checkpoint",
        "save": "ptq161.packed.checkpoint",
    },
)
