"""Packed weights: storage formats, bit packing, the packed linear layer, checkpoints.

Importing this package registers every storage format, so that any checkpoint loads in a fresh process.
"""

from ptq161.packed import awq, billm, pb_llm, quip, structured_binary, uniform
from ptq161.packed.linear import PackedLinear
from ptq161.packed.weight import PackedWeight

__all__ = ["PackedLinear", "PackedWeight", "awq", "billm", "pb_llm", "quip", "structured_binary", "uniform"]
