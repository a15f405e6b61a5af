"""Random numbers: every stage of a run has its own generator; none uses torch's global one."""

from __future__ import annotations

import hashlib

import torch


def stage_generator(seed: int, *stage: str | int) -> torch.Generator:
    """Return a fresh CPU generator for a run's seed and a stage, such as ``("calibration",)``.

    Different stages have unrelated streams, and adding a stage changes no other.
    """
    digest = hashlib.sha256(repr((seed, *stage)).encode()).digest()
    return torch.Generator().manual_seed(int.from_bytes(digest[:8], "big", signed=True))
