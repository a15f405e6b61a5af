"""The Hugging Face hub where it cannot be reached: asked once and briefly, where its libraries retry for long."""

from __future__ import annotations

import contextlib
import sys
from collections.abc import Iterator
from types import ModuleType

import huggingface_hub

TIMEOUT = 5.0  # seconds
SWITCH = "HF_HUB_OFFLINE"


def answers() -> bool:
    """Whether the hub answers one short question; never when it is switched off (``HF_HUB_OFFLINE``)."""
    if huggingface_hub.constants.HF_HUB_OFFLINE:
        return False
    try:
        huggingface_hub.get_session().head(huggingface_hub.constants.ENDPOINT, timeout=TIMEOUT)
    except Exception:  # any failure of any transport means the same
        return False
    return True


@contextlib.contextmanager
def offline_unless_reachable() -> Iterator[bool]:
    """Ask the hub once; where it does not answer, let the cache be used without half a minute of retries per file.

    Yields:
        Whether the hub answered.
    """
    reachable = answers()
    switches = [] if reachable else _switches()
    before = [getattr(module, SWITCH) for module in switches]
    try:
        for module in switches:
            setattr(module, SWITCH, True)
        yield reachable
    finally:
        for module, value in zip(switches, before, strict=True):
            setattr(module, SWITCH, value)


def _switches() -> list[ModuleType]:
    """Return where the libraries keep what the environment variable said; ``datasets`` is not imported for it."""
    config = sys.modules.get("datasets.config")
    return [huggingface_hub.constants, *([] if config is None else [config])]
