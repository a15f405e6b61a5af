"""A skipped test fails the session in CI, except for the reasons that are allowed."""

import os
import subprocess
import sys
from pathlib import Path

import pytest

ALLOWED = """
import pytest
def test_passes(): pass
def test_cuda(): pytest.skip("no GPU")
@pytest.mark.skip(reason="no GPU")
def test_gpu(): pass
@pytest.mark.xfail
def test_known_defect(): assert False
"""
IN_A_TEST = """
import pytest
def test_passes(): pass
def test_lazy(): pytest.skip("no time")
"""
OF_A_MODULE = """
import pytest
pytest.importorskip("no_such_library")
"""


def run_pytest(folder: Path, *arguments: str, ci: str = "1") -> subprocess.CompletedProcess[str]:
    root = str(Path(__file__).resolve().parents[1])
    command = [
        sys.executable,
        "-m",
        "pytest",
        "-p",
        "tests.skips",
        "-p",
        "no:cacheprovider",
        "-p",
        "no:hypothesispytest",
        *arguments,
    ]
    return subprocess.run(
        command, cwd=folder, env=os.environ | {"CI": ci, "PYTHONPATH": root}, capture_output=True, text=True
    )


def test_allowed_skips_pass(tmp_path):
    (tmp_path / "test_it.py").write_text(ALLOWED)
    run = run_pytest(tmp_path, "-n", "2")
    assert run.returncode == 0, run.stdout + run.stderr
    assert "1 passed, 2 skipped, 1 xfailed" in run.stdout


@pytest.mark.parametrize("workers", ["0", "2"])
def test_other_skips_fail(tmp_path, workers):
    (tmp_path / "test_it.py").write_text(IN_A_TEST)
    (tmp_path / "test_module.py").write_text(OF_A_MODULE)
    run = run_pytest(tmp_path, "-n", workers)
    assert run.returncode == 1, run.stdout + run.stderr
    assert "test_it.py::test_lazy: Skipped: no time" in run.stdout
    assert "test_module.py: Skipped: could not import 'no_such_library'" in run.stdout


def test_skips_are_free_elsewhere(tmp_path):
    (tmp_path / "test_it.py").write_text(IN_A_TEST)
    assert run_pytest(tmp_path, ci="").returncode == 0
