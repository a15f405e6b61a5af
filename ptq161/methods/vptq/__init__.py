"""VPTQ (Liu et al. 2024, arXiv 2409.17066): vectors of weights as entries of learned codebooks.

``method`` quantizes a linear with its ``codebooks``, which ``kmeans`` makes and ``refit`` trains; ``weight`` does so
without a model. Other rooms import from here alone.
"""

from ptq161.methods.vptq.kmeans import kmeans
from ptq161.methods.vptq.method import VPTQ
from ptq161.methods.vptq.refit import refit
from ptq161.methods.vptq.weight import quantize_weight

__all__ = ["VPTQ", "kmeans", "quantize_weight", "refit"]
