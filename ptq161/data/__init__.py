"""Text and where it comes from: embedded assets, the hub, files; calibration tokens and perplexity corpora.

Imports ``files/`` and the ground floor.
"""
