"""VPTQ (Liu et al. 2024, arXiv 2409.17066): vectors of weights as entries of learned codebooks.

``method`` quantizes a linear with its ``codebooks``, which ``kmeans`` makes and ``refit`` trains. Other rooms import
from here alone.
"""

from ptq161.methods.vptq.kmeans import kmeans, nearest
from ptq161.methods.vptq.method import VPTQ, quantize_weight
from ptq161.methods.vptq.refit import refit

__all__ = ["VPTQ", "kmeans", "nearest", "quantize_weight", "refit"]
