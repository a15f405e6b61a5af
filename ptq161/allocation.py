"""How the process's memory is handed on: what one step of a training frees is there for the next one."""

from __future__ import annotations

import ctypes
import os

_MMAP_THRESHOLD, _TRIM_THRESHOLD = -3, -1
"""Parameters of glibc's ``mallopt``."""
_OWN_PAGES = 32 << 20
"""Bytes from which on an allocation is mapped by itself and given back at once: the most that glibc allows."""
_KEPT = 256 << 20
"""Bytes at the end of the heap that are kept when they are free."""


def keep_freed_memory() -> bool:
    """Let glibc keep up to 256 MB that are free, where it gives back all but 64 MB at the latest.

    A step of a block's training allocates and frees some hundred tensors of 2 to 13 MB. Given back, every page of them
    is mapped and cleared again in the next step: 3,000 to 20,000 page faults, a tenth of its time.

    Returns:
        whether this process's C library is glibc, the environment leaves it (no ``MALLOC_`` variable), and it has
        accepted both.
    """
    if any(name.startswith("MALLOC_") for name in os.environ) or not _is_glibc():
        return False
    mallopt = ctypes.CDLL(None).mallopt
    return all([mallopt(_MMAP_THRESHOLD, _OWN_PAGES), mallopt(_TRIM_THRESHOLD, _KEPT)])


def _is_glibc() -> bool:
    try:
        return bool(os.confstr("CS_GNU_LIBC_VERSION"))
    except (AttributeError, OSError, ValueError):
        return False
