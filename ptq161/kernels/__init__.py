"""Arithmetic on tensors that is faster here than in torch: attention, matrix products, sorting, selection.

Functions of tensors alone; imports nothing of this package but the ground floor.
"""
