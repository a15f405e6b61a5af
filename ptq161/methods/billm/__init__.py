"""BiLLM (Huang et al. 2024, arXiv 2402.04291): binarization of salient columns twice, of the others in two groups."""

from ptq161.methods.billm.method import BiLLM, binarize, quantize_weight, quantize_with_factor
from ptq161.methods.billm.search import best_split, salient_columns

__all__ = ["BiLLM", "best_split", "binarize", "quantize_weight", "quantize_with_factor", "salient_columns"]
