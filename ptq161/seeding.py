"""Random numbers: every stage of a run draws from its own generator, and none from the global state."""

from __future__ import annotations

import hashlib

import torch


def stage_generator(seed: int, *stage: str | int) -> torch.Generator:
    """Return a fresh CPU generator that belongs to a run's seed and a stage, such as ``("calibration",)``.

    Stages differ in their whole stream, and adding one changes no other.
    """
    digest = hashlib.sha256(repr((seed, *stage)).encode()).digest()
    return torch.Generator().manual_seed(int.from_bytes(digest[:8], "big", signed=True))
