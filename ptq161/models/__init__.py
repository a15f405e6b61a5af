"""Models: loading them, and the table of supported architectures.

Imports ``data/`` (the embedded model is one of its assets), ``files/`` and the ground floor.
"""
