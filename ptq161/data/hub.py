"""Whether the Hugging Face hub can be reached: one short request, where its libraries would retry for minutes."""

from __future__ import annotations

import contextlib
import sys
from collections.abc import Iterator
from types import ModuleType

import huggingface_hub

_TIMEOUT = 5.0  # seconds
_SWITCH = "HF_HUB_OFFLINE"


def is_reachable() -> bool:
    """Send the hub one request; False without one where ``HF_HUB_OFFLINE`` is set."""
    if huggingface_hub.constants.HF_HUB_OFFLINE:
        return False
    try:
        huggingface_hub.get_session().head(huggingface_hub.constants.ENDPOINT, timeout=_TIMEOUT)
    except Exception:  # whatever the transport raises, the hub cannot be reached
        return False
    return True


@contextlib.contextmanager
def offline_unless_reachable() -> Iterator[bool]:
    """Switch the hub's libraries to their cache where the hub cannot be reached: no half minute of retries per file.

    Yields:
        whether the hub can be reached.
    """
    reachable = is_reachable()
    switches = [] if reachable else _switches()
    before = [getattr(module, _SWITCH) for module in switches]
    try:
        for module in switches:
            setattr(module, _SWITCH, True)
        yield reachable
    finally:
        for module, value in zip(switches, before, strict=True):
            setattr(module, _SWITCH, value)


def _switches() -> list[ModuleType]:
    """Return the modules that hold the libraries' copies of ``HF_HUB_OFFLINE``; ``datasets`` only if it is imported."""
    config = sys.modules.get("datasets.config")
    return [huggingface_hub.constants] if config is None else [huggingface_hub.constants, config]
