"""A wheel with the operators inside: they are used where there is no compiler, and nothing is put into the cache."""

from __future__ import annotations

import os
import subprocess
import sys
import zipfile
from pathlib import Path

import pytest
import torch

ROOT = Path(__file__).parents[2]
PROGRAM = """
import sys, torch
from ptq161.kernels import divergence, native
assert native.__file__.startswith(sys.argv[1])
print(native.load("divergence"), native.load("latent"))
print(round(float(divergence.divergence(torch.zeros(1, 2), torch.tensor([[0.0, 50.0]]))[0]), 4))
print(native.compiler_version())
"""


@pytest.mark.slow
@pytest.mark.skipif(torch.backends.cpu.get_cpu_capability() not in ("AVX2", "AVX512"), reason="no AVX2 here")
def test_a_wheel_with_operators_needs_no_compiler(tmp_path: Path) -> None:
    pip = [sys.executable, "-m", "pip", "--disable-pip-version-check", "--quiet"]
    build = [*pip, "wheel", "--no-deps", "--no-build-isolation", "--no-index", "--wheel-dir", str(tmp_path), str(ROOT)]
    subprocess.run(build, check=True, env=os.environ | {"PTQ161_BUILD_KERNELS": "divergence"})
    (wheel,) = tmp_path.glob("*.whl")
    assert "-py3-none-" in wheel.name and not wheel.name.endswith("-any.whl")
    site = tmp_path / "site"
    zipfile.ZipFile(wheel).extractall(site)
    cache = tmp_path / "cache"
    alone = {"PATH": "/nowhere", "CXX": "", "PTQ161_CACHE": str(cache), "PYTHONPATH": str(site)}
    command = [sys.executable, "-c", PROGRAM, str(site)]
    done = subprocess.run(command, cwd=tmp_path, env=os.environ | alone, capture_output=True, text=True, check=True)
    inside, value, compiler = done.stdout.splitlines()
    assert (inside, value) == ("True False", "0.6931") and compiler
    assert "latent.cpp is not compiled" in done.stderr and "divergence.cpp" not in done.stderr
    assert not list(cache.rglob("*.so"))
