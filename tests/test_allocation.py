"""Memory that a step frees is there for the next one, unless the environment decides."""

from __future__ import annotations

import os
import platform
import subprocess
import sys

import pytest

from ptq161 import allocation

KEPT = """
import ctypes, sys, torch
from ptq161.allocation import keep_freed_memory
if sys.argv[1] == "keep":
    assert keep_freed_memory()
class Mallinfo(ctypes.Structure):
    _fields_ = [(name, ctypes.c_int) for name in (
        "arena", "ordblks", "smblks", "hblks", "hblkhd", "usmblks", "fsmblks", "uordblks", "fordblks", "keepcost")]
mallinfo = ctypes.CDLL(None).mallinfo
mallinfo.restype = Mallinfo
before = mallinfo()
torch.zeros(30 << 20, dtype=torch.uint8)
after = mallinfo()
print(after.arena + after.hblkhd - before.arena - before.hblkhd)
"""
"""Prints the allocator's own account of the bytes that it has not given back after a tensor of 30 MB is freed (page
faults, which these save, are not counted in every sandbox)."""


@pytest.mark.skipif(platform.libc_ver()[0] != "glibc", reason="the C library is not glibc")
def test_what_is_freed_is_kept_for_the_next_step() -> None:
    plain = {name: value for name, value in os.environ.items() if not name.startswith("MALLOC_")}
    kept, left = [
        int(subprocess.run([sys.executable, "-c", KEPT, how], capture_output=True, check=True, env=plain).stdout)
        for how in ("keep", "leave")
    ]
    assert kept > 25 << 20 > 5 << 20 > left, (kept, left)


def test_the_environment_and_other_libraries_are_left_alone(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(allocation.ctypes, "CDLL", lambda _: pytest.fail("nothing is to be set"))
    with monkeypatch.context() as patch:
        patch.setenv("MALLOC_ARENA_MAX", "1")
        assert not allocation.keep_freed_memory()
    for name in [name for name in os.environ if name.startswith("MALLOC_")]:
        monkeypatch.delenv(name)
    monkeypatch.setattr(allocation.os, "confstr", lambda _: None)
    assert not allocation.keep_freed_memory()
