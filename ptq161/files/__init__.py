"""Bytes on disk: atomic writes, strict JSON, hashes, fingerprints, and what each result's fingerprint consists of.

These modules import nothing of this package but the ground floor, and every room from ``data`` up may import them.
"""
