"""Nothing asks, and nothing reads stdin: a batch job may have it closed, empty, or full of somebody else's lines."""

from __future__ import annotations

import os
import pty
import subprocess
import sys
import threading

import pytest

from tests.end_to_end.conftest import RUN, SECONDS, Program, command, variables

pytestmark = pytest.mark.slow

LINES = b"y\n" * 1000


@pytest.mark.parametrize("stdin", ["closed", "terminal"])
def test_a_run_does_not_read_stdin(program: Program, stdin: str) -> None:
    run = command(*program.tiny, "method=rtn", "tracker.mode=online", "hydra.run.dir=run")
    report = [sys.executable, "-m", "ptq161", "report", "run", "--out", "report"]
    others = [[sys.executable, "-m", "ptq161", verb, *rest] for verb, *rest in (("watch", "run", "--once"), ("cache",))]
    reader, writer = pty.openpty() if stdin == "terminal" else os.pipe()
    source, keyboard = (writer, reader) if stdin == "terminal" else (reader, writer)
    os.write(keyboard, LINES)
    for arguments in (run, report, *others):
        shell = ["sh", "-c", 'exec "$0" "$@" <&-', *arguments] if stdin == "closed" else arguments
        ended = subprocess.run(
            shell,
            cwd=program.folder,
            env=variables(program.folder, PYTHONPATH=str(RUN.parent)),
            stdin=source,
            capture_output=True,
            text=True,
            timeout=SECONDS,
        )
        assert ended.returncode == 0 and "Traceback" not in ended.stderr, ended.stderr
        assert "[y/N]" not in ended.stdout + ended.stderr and "Enter your choice" not in ended.stdout + ended.stderr
    assert _unread(source) == len(LINES)
    os.close(reader)
    os.close(writer)


def _unread(handle: int) -> int:
    """Read what is left, as long as something is."""
    count = 0

    def read() -> None:
        nonlocal count
        while count < len(LINES):
            count += len(os.read(handle, 4096))

    thread = threading.Thread(target=read, daemon=True)
    thread.start()
    thread.join(5)
    return count
