"""PTQ1.61 (Zhao et al., ACL 2025): one-dimensional mask, binarization, block-wise optimization."""

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
