"""Arithmetic that is faster here than in torch: attention, products, packed weights, sorting, divergences.

Functions of tensors, some of them compiled from C++ (``native``), and contexts in which models take them. They import
nothing of this package but ``files`` and the ground floor, and every room from ``data`` up may import them.
"""

__all__ = ["attention", "block", "divergence", "latent", "matmul", "native", "packed_rows", "sorting", "where"]
