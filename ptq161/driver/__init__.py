"""The driver: a model's decoder blocks, window by window, through a method; resumable.

The library ends here: nothing at or below this room knows Hydra, W&B or lm-eval. Imports ``methods/`` and below.
"""

from ptq161.lazy import lazy_attributes

__getattr__ = lazy_attributes(
    __name__,
    {
        "ptq161.driver.quantization": ["quantize"],
        "ptq161.driver.capture": ["BlockArguments", "capture_inputs"],
    },
)
