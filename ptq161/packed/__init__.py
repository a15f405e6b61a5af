"""Packed weights: one storage format per module, the bits in bytes, the packed linear layer, masks and checkpoints.

Importing this package registers every storage format, so that any checkpoint loads in a fresh process. It imports
``models``, ``kernels``, ``files`` and the ground floor; ``methods``, the driver and every room above may import it.
"""

from ptq161.packed import (
    adapted,
    allotted,
    awq,
    billm,
    fp4,
    fp8,
    gse,
    nf4,
    pb_llm,
    quip,
    row_column_binary,
    structured_binary,
    uniform,
    vector,
)
from ptq161.packed.linear import PackedLinear
from ptq161.packed.weight import PackedWeight

__all__ = [
    "PackedLinear",
    "PackedWeight",
    "adapted",
    "allotted",
    "awq",
    "billm",
    "fp4",
    "fp8",
    "gse",
    "nf4",
    "pb_llm",
    "quip",
    "row_column_binary",
    "structured_binary",
    "uniform",
    "vector",
]
