"""`python run.py` as users start it: processes in a folder of their own, on the tiny Llama and a small text."""

from __future__ import annotations

import atexit
import dataclasses
import functools
import json
import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest

from ptq161.files.paths import cache_dir
from ptq161.tracking.read import RunData, read_run

RUN = Path(__file__).resolve().parents[2] / "run.py"
SECONDS = 300  # after which a run hangs
SEQ_LEN = 64


@dataclasses.dataclass(frozen=True)
class Ended:
    """A process that has ended."""

    status: int
    stdout: str
    stderr: str
    seconds: float

    @property
    def sentences(self) -> list[str]:
        """The lines of stderr without progress bars."""
        lines = [line.rpartition("\r")[2].strip() for line in self.stderr.splitlines()]
        return [line for line in lines if line and "it/s]" not in line]


class Program:
    """Starts ``run.py`` in ``folder``."""

    def __init__(self, folder: Path, tiny: list[str]) -> None:
        self.folder = folder
        self.tiny = tiny
        """Overrides that make a run take little more than its imports."""

    def __call__(self, *arguments: str, **environment: str | None) -> Ended:
        """Run to the end, in a fork of a process that has imported everything. A variable that is None is unset."""
        began = time.monotonic()
        status = fork(list(arguments), self.folder, variables(self.folder, **environment))
        output, errors = (self.folder.with_name(f"{self.folder.name}.{end}") for end in ("out", "err"))
        return Ended(status, output.read_text(), errors.read_text(), time.monotonic() - began)

    def cold(self, *arguments: str, **environment: str | None) -> Ended:
        """Run to the end, in a Python of its own."""
        began = time.monotonic()
        done = subprocess.run(
            command(*arguments),
            cwd=self.folder,
            env=variables(self.folder, **environment),
            capture_output=True,
            text=True,
            timeout=SECONDS,
        )
        return Ended(done.returncode, done.stdout, done.stderr, time.monotonic() - began)

    def start(self, *arguments: str) -> subprocess.Popen[str]:
        """Start without waiting."""
        return subprocess.Popen(
            command(*arguments),
            cwd=self.folder,
            env=variables(self.folder),
            stdout=subprocess.PIPE,
            stderr=subprocess.PIPE,
            text=True,
        )


def fork(arguments: list[str], folder: Path, environment: dict[str, str]) -> int:
    """Run the program in a fork of the warm server, and return its exit status."""
    server = warm_server()
    assert server.stdin is not None and server.stdout is not None
    request = {"arguments": arguments, "folder": str(folder), "environment": environment, "seconds": SECONDS}
    server.stdin.write(json.dumps(request) + "\n")
    server.stdin.flush()
    status = json.loads(server.stdout.readline())
    assert isinstance(status, int), f"run.py hangs: {arguments}"
    return status


@functools.cache
def warm_server() -> subprocess.Popen[str]:
    """The server of this process of tests; it ends with it."""
    program = [sys.executable, "-m", "tests.end_to_end.warm_server"]
    server = subprocess.Popen(program, cwd=RUN.parent, stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True)
    atexit.register(server.communicate)  # the end of its stdin ends it
    return server


def killed_and_typed_again(program: Program, command: list[str], *marks: str) -> tuple[RunData, RunData]:
    """Kill a run when its metrics have all ``marks``, type it again, and run it undisturbed: the records of both."""
    process = program.start(*command, "hydra.run.dir=killed")
    metrics = program.folder / "killed" / "metrics.jsonl"
    deadline = time.monotonic() + SECONDS
    while not (metrics.exists() and all(mark in metrics.read_text() for mark in marks)):
        assert time.monotonic() < deadline and process.poll() is None
        time.sleep(0.02)
    process.send_signal(signal.SIGKILL)
    process.communicate()
    ended = program(*command, "hydra.run.dir=resumed")
    assert ended.status == 0, ended.stderr
    whole = program(*command, "cache=false", "hydra.run.dir=whole")
    assert whole.status == 0, whole.stderr
    return read_run(program.folder / "resumed"), read_run(program.folder / "whole")


def command(*arguments: str) -> list[str]:
    return [sys.executable, str(RUN), *arguments]


def variables(folder: Path, **changes: str | None) -> dict[str, str]:
    """The environment without the W&B login and settings of whoever runs the tests, but with the cache of assets.

    Results are kept beside ``folder``, so that each test finds its own and nobody else's.
    """
    plain = {k: v for k, v in os.environ.items() if not k.startswith("WANDB_") and k != "HYDRA_FULL_ERROR"}
    plain |= {
        "PTQ161_CACHE": str(cache_dir()),
        "PTQ161_STORE": str(store_of(folder)),
        "NETRC": str(folder / ".netrc"),
        "WANDB_CONFIG_DIR": str(folder),
    }
    plain |= {k: v for k, v in changes.items() if v is not None}
    return {k: v for k, v in plain.items() if changes.get(k, v) is not None}


def store_of(folder: Path) -> Path:
    """Where a program that is started in ``folder`` keeps what it computes."""
    return folder.with_name(f"{folder.name}.store")


@pytest.fixture(scope="session")
def text_file(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """About 26,000 characters, which are as many tokens of the tiny tokenizer."""
    file = tmp_path_factory.mktemp("text") / "text.txt"
    file.write_text("".join(f"Line {i}: {i**2} squares and {i**3} cubes. " for i in range(600)))
    return file


@pytest.fixture(scope="session")
def tiny(tiny_model_dir: Path, text_file: Path) -> list[str]:
    return [
        f"model.path={tiny_model_dir}",
        "calib=text_file",
        f"calib.text_file={text_file}",
        "calib.n_samples=4",
        f"calib.seq_len={SEQ_LEN}",
        "eval=ppl",
        "eval.corpora=[text_file]",
        f"eval.text_file={text_file}",
        f"eval.seq_len={SEQ_LEN}",
        "eval.max_windows=8",
        "eval.sample_tokens=3",
        "device=cpu",
    ]


@pytest.fixture
def program(tmp_path: Path, tiny: list[str]) -> Program:
    return Program(tmp_path, tiny)


Recorded = tuple[Ended, Path]


@pytest.fixture(scope="session")
def tiny_run(tmp_path_factory: pytest.TempPathFactory, tiny: list[str]) -> Recorded:
    """A default run of PTQ1.61 on the tiny model, mirrored offline, in the default run directory."""
    program = Program(tmp_path_factory.mktemp("tiny_run"), tiny)
    ended = program(*tiny)
    assert ended.status == 0, ended.stderr
    (run_dir,) = program.folder.glob("outputs/*/*")
    return ended, run_dir
