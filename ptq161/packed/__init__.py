"""Packed weights: storage formats, bit packing, the packed linear layer, checkpoints.

Importing this package registers every storage format.
"""

from ptq161.packed import structured_binary, uniform  # registers the formats
from ptq161.packed.linear import PackedLinear
from ptq161.packed.weight import PackedWeight

__all__ = ["PackedLinear", "PackedWeight", "structured_binary", "uniform"]
