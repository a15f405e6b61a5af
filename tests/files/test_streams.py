"""Commands whose output goes nowhere, or not everywhere, end as if it had gone to a terminal."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

import pytest

from ptq161.files.streams import never_fail_to_print

PROGRAM = """
import logging, sys
from ptq161.files.streams import never_fail_to_print
never_fail_to_print()
from pathlib import Path
from rich.console import Console
from rich.table import Table
from tqdm import tqdm
logging.basicConfig(level=logging.INFO, stream=sys.stdout)
out = open("out", "w")  # where the streams are closed, it must not get one of their numbers
assert out.fileno() > 2
for i in tqdm(range(3000), mininterval=0):
    print("± é \\u2501 \\udcff", i, flush=i % 2 == 0)
    logging.info("é %d", i)
table = Table("é")
table.add_row("\\u2501")
Console().print(table)
Console(stderr=True).print(table)
print("left in the buffer", end="")
out.write("done")
"""


@pytest.mark.parametrize(("locale", "encoding"), [("C.UTF-8", None), ("C", None), ("C", "ascii")])
@pytest.mark.parametrize(
    "redirection", ["| head -1", "2>&1 | head -1", ">/dev/full", "2>/dev/full", ">&-", "2>&-", ">&- 2>&- <&-", "| cat"]
)
def test_printing_never_fails(tmp_path: Path, redirection: str, encoding: str | None, locale: str) -> None:
    (tmp_path / "program.py").write_text(PROGRAM, encoding="utf-8")
    variables = {**os.environ, "LC_ALL": locale, "PYTHONPATH": str(Path(__file__).resolve().parents[2])}
    if encoding:
        variables["PYTHONIOENCODING"] = encoding
    script = f"'{sys.executable}' program.py {redirection}; echo ${{PIPESTATUS[0]}} > status"
    ended = subprocess.run(["bash", "-c", script], cwd=tmp_path, env=variables, capture_output=True, timeout=120)
    assert (tmp_path / "status").read_text().strip() == "0", ended.stderr
    assert (tmp_path / "out").read_text() == "done"
    assert b"Traceback" not in ended.stderr + ended.stdout and b"Exception ignored" not in ended.stderr
    if redirection == "| cat":
        assert len(ended.stdout.splitlines()) > 6000 and ended.stdout.endswith(b"left in the buffer")


def test_a_non_blocking_pipe_gets_everything(tmp_path: Path) -> None:
    (tmp_path / "program.py").write_text(
        "import os\nos.set_blocking(1, False)\n"
        "from ptq161.files.streams import never_fail_to_print\nnever_fail_to_print()\n"
        "for i in range(40000): print(f'line {i:06}')\n"
    )
    variables = {**os.environ, "PYTHONPATH": str(Path(__file__).resolve().parents[2])}
    script = f"'{sys.executable}' program.py | (sleep 1; cat)"
    ended = subprocess.run(["bash", "-c", script], cwd=tmp_path, env=variables, capture_output=True, timeout=120)
    assert ended.stdout.splitlines() == [f"line {i:06}".encode() for i in range(40000)]


def test_streams_of_somebody_else_are_left_alone() -> None:
    before = (sys.stdout, sys.stderr)  # pytest's
    never_fail_to_print()
    assert (sys.stdout, sys.stderr) == before
