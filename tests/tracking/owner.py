"""Another process that owns a directory."""

from __future__ import annotations

import contextlib
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

PROGRAM = """
import pathlib, sys
from ptq161.tracking.ownership import own_until_exit
own_until_exit(pathlib.Path(sys.argv[1]), sys.argv[2])
print("mine", flush=True)
sys.stdin.read()
"""


@contextlib.contextmanager
def in_another_process(folder: Path, owner: str = "run") -> Iterator[subprocess.Popen[str]]:
    """Have a directory owned by another process inside the context."""
    process = subprocess.Popen(
        [sys.executable, "-c", PROGRAM, str(folder), owner],
        cwd=Path(__file__).resolve().parents[2],
        stdin=subprocess.PIPE,
        stdout=subprocess.PIPE,
        text=True,
    )
    assert process.stdin is not None and process.stdout is not None
    with process:
        assert process.stdout.readline() == "mine\n"
        try:
            yield process
        finally:
            process.kill()
