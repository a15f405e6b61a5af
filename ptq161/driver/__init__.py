"""The driver: it takes a model's decoder blocks through a method, window by window, and can be resumed.

The library ends here: no room up to this one knows Hydra, W&B or lm-eval. The driver imports ``methods`` and the rooms
below it; ``training``, ``evaluation`` and every room above may import it.
"""

from ptq161.lazy import lazy_attributes

__getattr__ = lazy_attributes(
    __name__,
    {
        "ptq161.driver.folders": ["quantize_folder"],
        "ptq161.driver.quantization": ["quantize"],
        "ptq161.driver.capture": ["BlockArguments", "capture_inputs"],
    },
)
