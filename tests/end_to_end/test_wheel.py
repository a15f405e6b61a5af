"""The wheel in an environment of its own: every verb works in an empty folder, with the configuration files inside.

The environment sees the packages that are installed here, but not this checkout: resolving them anew could fetch a CUDA
build of torch of several GB.
"""

from __future__ import annotations

import os
import subprocess
import sys
import sysconfig
import venv
from pathlib import Path

import pytest

from tests.end_to_end.conftest import RUN, SECONDS, variables

pytestmark = pytest.mark.slow

ROOT = RUN.parent


@pytest.fixture(scope="module")
def scripts(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The folder of the commands of an environment in which the wheel is installed."""
    folder = tmp_path_factory.mktemp("wheel")
    pip = [sys.executable, "-m", "pip", "--disable-pip-version-check", "--quiet"]
    build = [*pip, "wheel", "--no-deps", "--no-build-isolation", "--wheel-dir", str(folder), str(ROOT)]
    subprocess.run(build, check=True, timeout=SECONDS)
    venv.create(folder / "venv", with_pip=False)
    python = folder / "venv" / "bin" / "python"
    (wheel,) = folder.glob("*-py3-none-any.whl")
    subprocess.run([*pip, "--python", str(python), "install", "--no-deps", str(wheel)], check=True, timeout=SECONDS)
    site = Path(sysconfig.get_path("purelib", vars={"base": str(folder / "venv"), "platbase": str(folder / "venv")}))
    # A folder that a .pth file adds brings its packages, but not the .pth files in it: this checkout stays unknown.
    (site / "installed_here.pth").write_text(sysconfig.get_path("purelib") + "\n")
    return python.parent


def start(scripts: Path, folder: Path, *command: str) -> subprocess.CompletedProcess[str]:
    environment = variables(folder, PYTHONPATH=None, PYTHONSAFEPATH="1")
    return subprocess.run(
        [str(scripts / command[0]), *command[1:]],
        cwd=folder,
        env=environment,
        capture_output=True,
        text=True,
        timeout=SECONDS,
    )


def test_it_is_the_wheel_that_is_imported(scripts: Path, tmp_path: Path) -> None:
    code = "import ptq161, hydra_plugins.ptq161_launcher as l; print(ptq161.__file__, l.__file__)"
    done = start(scripts, tmp_path, "python", "-c", code)
    assert done.returncode == 0, done.stderr
    assert all(place.startswith(str(scripts.parent)) for place in done.stdout.split())


def test_the_default_model_in_an_empty_folder(scripts: Path, tmp_path: Path) -> None:
    done = start(scripts, tmp_path, "ptq161", "run", "debug=smoke", "tracker=none", "eval.tasks=[copa]")
    assert done.returncode == 0, done.stderr
    (run_dir,) = tmp_path.glob("outputs/*/*")
    assert (run_dir / "checkpoint" / "packed.safetensors").is_file()
    for verb, output in (
        (["report", str(run_dir), "--out", "page"], "page"),
        (["watch", "outputs", "--once"], "1 finished"),
        (["cache"], "results"),
    ):
        done = start(scripts, tmp_path, "ptq161", *verb)
        assert done.returncode == 0 and output in done.stdout, done.stdout + done.stderr
    assert (tmp_path / "page" / "index.html").is_file()


def test_a_sweep_a_search_and_a_replay(scripts: Path, tmp_path: Path, tiny: list[str]) -> None:
    quick = [*tiny, "method=rtn", "tracker=none", "eval.full_precision=false"]
    local = ["hydra/launcher=local", "hydra.launcher.slots=2"]
    sweep = start(scripts, tmp_path, "ptq161", "sweep", *quick, *local, "method.bits=2,3", "hydra.sweep.dir=sweep")
    assert sweep.returncode == 0 and "2 computed" in sweep.stdout, sweep.stdout + sweep.stderr
    replay = start(scripts, tmp_path, "ptq161", "replay", "sweep/0")
    assert replay.returncode == 0 and "Reproduced" in replay.stdout, replay.stdout + replay.stderr
    (tmp_path / "space.yaml").write_text("method.bits: {choices: [2, 3]}")
    search = ["ptq161", "search", "--trials", "1", "--out", "found", "--space", "space.yaml", *quick]
    done = start(scripts, tmp_path, *search)
    assert done.returncode == 0 and "1 of 1 trials finished" in done.stdout, done.stdout + done.stderr


def test_a_verb_that_nothing_else_starts_explains_itself(scripts: Path, tmp_path: Path) -> None:
    done = start(scripts, tmp_path, "ptq161", "estimate", "--help")
    assert done.returncode == 0 and "usage" in done.stdout, done.stderr


def test_without_the_packages_of_a_verb_one_sentence(scripts: Path, tmp_path: Path) -> None:
    code = "import sys; sys.modules['hydra'] = None; from ptq161.__main__ import main; sys.exit(main(['run']))"
    done = start(scripts, tmp_path, "python", "-c", code)
    assert (done.returncode, done.stdout) == (1, "")
    assert done.stderr == "ptq161 run needs hydra, which is not installed: pip install 'ptq161[run]'.\n"


def test_no_verb_and_a_wrong_one(scripts: Path, tmp_path: Path) -> None:
    assert start(scripts, tmp_path, "ptq161").returncode == 2
    done = start(scripts, tmp_path, "ptq161", "quantify")
    assert done.returncode == 2 and done.stderr.startswith("'quantify' is not a verb of ptq161.")
    assert os.listdir(tmp_path) == []
