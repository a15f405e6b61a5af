"""The order of the rooms: pyproject.toml holds the layers (import-linter); here is what follows from the imports."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path

import grimp
import pytest

from ptq161.files.hashing import _NOT_HASHED, PACKAGE

ROOT = PACKAGE.parent
LIBRARY = ("blockwise", "checks", "data", "driver", "errors", "files", "kernels", "lazy", "methods", "models")
LIBRARY += ("numerics", "packed", "seeding")
SHELL = ("hydra", "omegaconf", "wandb", "datasets", "lm_eval", "optuna", "plotly", "pandas", "matplotlib", "pydantic")


@pytest.fixture(scope="module")
def graph() -> grimp.ImportGraph:
    return grimp.build_graph("ptq161", cache_dir=None)


def room(module: str) -> str:
    return module.split(".")[1]


def rooms() -> set[str]:
    """All rooms: what lies at the top of the package."""
    found = {path.stem for path in PACKAGE.glob("*.py")} | {path.parent.name for path in PACKAGE.glob("*/__init__.py")}
    return found - {"__init__"}


def test_no_arrow_runs_up_and_there_is_no_circle() -> None:
    program = Path(sys.executable).with_name("lint-imports")
    done = subprocess.run([str(program), "--no-cache"], cwd=ROOT, capture_output=True, text=True)
    assert done.returncode == 0, done.stdout + done.stderr


def test_what_the_pipeline_imports_is_what_is_hashed(graph: grimp.ImportGraph) -> None:
    """The hash of sources leaves out whole rooms: those, and only those, that nothing which computes imports."""
    computes = {room(m) for m in graph.find_upstream_modules("ptq161.run.pipeline") if m != "ptq161"} | {"run"}
    not_hashed = {name.removesuffix(".py") for name in _NOT_HASHED}
    faces = {"blockwise", "lazy"}  # names of the library under which nothing is computed
    assert computes - faces == rooms() - not_hashed - faces


def test_the_library_loads_nothing_of_the_shell() -> None:
    script = "import sys, ptq161; ptq161.quantize; ptq161.save; print(*sys.modules)"
    loaded = subprocess.run([sys.executable, "-c", script], capture_output=True, text=True, check=True).stdout.split()
    assert not {name for name in loaded if name.partition(".")[0] in SHELL}
    assert {room(name) for name in loaded if name.startswith("ptq161.")} <= set(LIBRARY)
