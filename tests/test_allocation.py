"""Memory that a step frees is there for the next one, unless the environment decides."""

from __future__ import annotations

import os
import platform
import subprocess
import sys

import pytest

from ptq161 import allocation

FAULTS = """
import resource, sys, torch
from ptq161.allocation import keep_freed_memory
if sys.argv[1] == "keep":
    assert keep_freed_memory()
def step():
    tensors = [torch.zeros(4 << 20, dtype=torch.uint8) for _ in range(30)]
for _ in range(3):
    step()
before = resource.getrusage(resource.RUSAGE_SELF).ru_minflt
for _ in range(10):
    step()
print(resource.getrusage(resource.RUSAGE_SELF).ru_minflt - before)
"""


@pytest.mark.skipif(platform.libc_ver()[0] != "glibc", reason="the C library is not glibc")
def test_steps_fault_less_where_memory_is_kept() -> None:
    plain = {name: value for name, value in os.environ.items() if not name.startswith("MALLOC_")}
    found = [
        int(subprocess.run([sys.executable, "-c", FAULTS, how], capture_output=True, check=True, env=plain).stdout)
        for how in ("keep", "leave")
    ]
    assert found[0] < found[1] / 20, found


def test_the_environment_and_other_libraries_are_left_alone(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(allocation.ctypes, "CDLL", lambda _: pytest.fail("nothing is to be set"))
    with monkeypatch.context() as patch:
        patch.setenv("MALLOC_ARENA_MAX", "1")
        assert not allocation.keep_freed_memory()
    for name in [name for name in os.environ if name.startswith("MALLOC_")]:
        monkeypatch.delenv(name)
    monkeypatch.setattr(allocation.os, "confstr", lambda _: None)
    assert not allocation.keep_freed_memory()
