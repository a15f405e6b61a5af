"""Arithmetic that is faster here than in torch: causal attention, matrix products, sorting, selection by a mask.

Functions of tensors alone. They import nothing of this package but the ground floor, and every room from ``data`` up
may import them.
"""

__all__ = ["attention", "matmul", "sorting", "where"]
