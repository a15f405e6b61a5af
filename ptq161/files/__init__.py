"""Bytes on disk and their names: atomic writes, strict JSON, hashes, fingerprints.

Knows nothing of what the files hold; imports the ground floor alone.
"""
