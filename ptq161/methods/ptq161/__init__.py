"""PTQ1.61 (Zhao et al., ACL 2025, arXiv 2502.13179): one-dimensional mask, binarization, block-wise optimization.

``saliency`` selects the salient channels, ``binarization`` has the formulas on one weight matrix, ``trainable`` the
layer whose scales are learned, ``method`` the whole on a window of decoder blocks. Other rooms import from here alone.
"""

from ptq161.methods.ptq161.binarization import (
    block_loss,
    dequantized_weight,
    initial_scales,
    pack_weight,
    quantize_salient,
)
from ptq161.methods.ptq161.method import PTQ161
from ptq161.methods.ptq161.saliency import channel_saliency, salient_mask

__all__ = [
    "PTQ161",
    "block_loss",
    "channel_saliency",
    "dequantized_weight",
    "initial_scales",
    "pack_weight",
    "quantize_salient",
    "salient_mask",
]
