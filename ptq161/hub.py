"""The Hugging Face hub where it cannot be reached: asked once and briefly, where its libraries retry for long."""

from __future__ import annotations

import contextlib
from collections.abc import Iterator
from unittest import mock

import datasets
import huggingface_hub

TIMEOUT = 5.0  # seconds


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
    with contextlib.ExitStack() as stack:
        if not reachable:
            stack.enter_context(mock.patch.object(huggingface_hub.constants, "HF_HUB_OFFLINE", True))
            stack.enter_context(mock.patch.object(datasets.config, "HF_HUB_OFFLINE", True))
        yield reachable
