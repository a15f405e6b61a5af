"""BiLLM (Huang et al. 2024, arXiv 2402.04291): salient columns binarized twice, the others once in two groups.

``method`` quantizes a linear, ``search`` finds its salient columns and the split of the others. Other rooms import from
here alone.
"""

from ptq161.methods.billm.method import BiLLM, binarize, quantize_weight
from ptq161.methods.billm.search import best_split, salient_columns

__all__ = ["BiLLM", "best_split", "binarize", "quantize_weight", "salient_columns"]
