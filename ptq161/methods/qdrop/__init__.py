"""QDrop (Wei et al. 2022, arXiv 2203.05740): block reconstruction that randomly leaves activations unquantized.

``ranges`` searches grids, ``rounding`` is the arithmetic of learned rounding, ``layers`` has what is trained,
``reconstruction`` the training of a block and ``method`` the whole. Other rooms import from here alone.
"""

from ptq161.methods.qdrop.layers import ActivationQuantizer, RoundedLinear, lsq_quantize, searched_grid
from ptq161.methods.qdrop.method import QDrop
from ptq161.methods.qdrop.ranges import search_range
from ptq161.methods.qdrop.reconstruction import reconstruct
from ptq161.methods.qdrop.rounding import (
    hard_weight,
    initial_alpha,
    rectified_sigmoid,
    round_loss,
    soft_weight,
    temperature,
)

__all__ = [
    "ActivationQuantizer",
    "QDrop",
    "RoundedLinear",
    "hard_weight",
    "initial_alpha",
    "lsq_quantize",
    "reconstruct",
    "rectified_sigmoid",
    "round_loss",
    "search_range",
    "searched_grid",
    "soft_weight",
    "temperature",
]
