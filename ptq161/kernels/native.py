"""Operators in C++, compiled where they run: one file each, against LibTorch's stable ABI.

``load("latent")`` compiles ``latent.cpp`` on first use, in some seconds, into ``<cache>/kernels/`` under the hash of
source, compiler and options, and registers its operators as ``torch.ops.ptq161``. Every operator has a torch function
beside it with the same result up to the order of sums, which takes its place on other devices and where nothing can be
compiled; a warning says so once. A wheel that was built with ``PTQ161_BUILD_KERNELS`` (``hatch_build.py``) has the
operators inside, for each of ``_INSTRUCTIONS``, and no compiler is asked for.
"""

from __future__ import annotations

import functools
import hashlib
import logging
import os
import platform
import shutil
import subprocess
import tempfile
from collections.abc import Collection, Sequence
from pathlib import Path

import torch
from torch import Tensor

from ptq161.files.paths import cache_dir

log = logging.getLogger(__name__)

_COMPILERS = ("c++", "g++", "clang++")
"""Tried in turn where the environment has no ``CXX``."""
_OPTIONS = (
    "-std=c++20",
    "-O3",
    "-fPIC",
    "-shared",
    "-fopenmp-simd",
    # Products and sums are rounded one by one, as torch's are; nothing here reads the floating-point flags.
    "-ffp-contract=off",
    "-fno-math-errno",
    "-fno-trapping-math",
    # The stable ABI of torch 2.10 and later.
    "-DTORCH_TARGET_VERSION=0x020a000000000000",
)
_INSTRUCTIONS = {"AVX2": ("-march=x86-64-v3",), "AVX512": ("-march=x86-64-v4", "-mprefer-vector-width=512")}
"""Options by what torch finds of the processor; the compiler's own choice elsewhere."""
_COMPILER_FILE = "compiler.txt"


def usable(name: str, *tensors: Tensor) -> bool:
    """Whether the operators of a source serve these tensors: on the CPU, and compiled."""
    return all(tensor.device.type == "cpu" for tensor in tensors) and load(name)


@functools.cache
def load(name: str) -> bool:
    """Register the operators of ``<name>.cpp``, compiled if they are not yet; False if they cannot be had.

    Example:
        >>> load("latent")
        True
    """
    source = Path(__file__).with_name(f"{name}.cpp")
    try:
        library = _prebuilt() / _prebuilt_name(source, torch.backends.cpu.get_cpu_capability())
        if not library.exists():
            library = _library(source)
        if not library.exists():
            _compile(source, library, _options())
        torch.ops.load_library(str(library))
    except (OSError, subprocess.SubprocessError) as error:
        log.warning("%s is not compiled, so that torch's slower operators are used (%s).", source.name, _reason(error))
        return False
    return True


def build(folder: Path, names: Collection[str] = ()) -> None:
    """Compile operators for every instruction set of ``_INSTRUCTIONS``, as a wheel has them inside.

    Args:
        folder: into which the libraries go, and a file that names the compiler.
        names: of the sources; none are all.

    Raises:
        OSError, SubprocessError: there is no compiler or source, or a source does not compile.
    """
    here = Path(__file__).parent
    for source in [here / f"{name}.cpp" for name in names] or sorted(here.glob("*.cpp")):
        for capability, options in _INSTRUCTIONS.items():
            _compile(source, folder / _prebuilt_name(source, capability), (*_OPTIONS, *options))
    (folder / _COMPILER_FILE).write_text(compiler_version() + "\n", encoding="utf-8")


def compiler_version() -> str:
    """Return the line by which the operators' compiler names itself, on which the order of sums may depend.

    Raises:
        OSError, SubprocessError: there is none that runs.
    """
    named = _prebuilt() / _COMPILER_FILE
    if named.exists():
        return named.read_text(encoding="utf-8").strip()
    command = [_compiler(), "--version"]
    return subprocess.run(command, capture_output=True, text=True, check=True).stdout.strip().partition("\n")[0]


def _library(source: Path) -> Path:
    """Return the path of a compiled source: another one for whatever changes its instructions."""
    facts = [torch.__version__, compiler_version(), _compiler(), *_options()]
    return cache_dir() / "kernels" / f"{source.stem}-{_digest(source, facts)}.so"


def _prebuilt() -> Path:
    return Path(__file__).with_name("_prebuilt")


def _prebuilt_name(source: Path, capability: str) -> str:
    """Return the name of a library inside a wheel; the stable ABI is that of any torch."""
    options = (*_OPTIONS, *_INSTRUCTIONS.get(capability, ()))
    return f"{source.stem}-{capability}-{_digest(source, [platform.machine(), *options])}.so"


def _digest(source: Path, facts: Sequence[str]) -> str:
    code = b"".join(path.read_bytes() for path in [source, *sorted(source.parent.glob("*.h"))])
    return hashlib.sha256(code + "\0".join(facts).encode()).hexdigest()[:16]


def _compile(source: Path, library: Path, options: tuple[str, ...]) -> None:
    include, libraries = (Path(torch.__file__).parent / folder for folder in ("include", "lib"))
    library.parent.mkdir(parents=True, exist_ok=True)
    # Another process may compile the same file: whoever is last puts the same content there.
    with tempfile.TemporaryDirectory(dir=library.parent) as folder:
        made = Path(folder, library.name)
        command = [_compiler(), *options, f"-I{include}", str(source), "-o", str(made), f"-L{libraries}"]
        plain = os.environ | {"LC_ALL": "C"}  # errors in English, as all of this program's
        subprocess.run([*command, "-ltorch_cpu"], capture_output=True, text=True, check=True, env=plain)
        os.replace(made, library)


def _compiler() -> str:
    candidates = (os.environ.get("CXX", ""), *_COMPILERS)
    found = next((path for path in map(shutil.which, candidates) if path), None)
    if found is None:
        raise FileNotFoundError("no C++ compiler is on the path")
    return found


def _options() -> tuple[str, ...]:
    is_x86 = platform.machine() in ("x86_64", "AMD64")
    return (*_OPTIONS, *(_INSTRUCTIONS.get(torch.backends.cpu.get_cpu_capability(), ()) if is_x86 else ()))


def _reason(error: Exception) -> str:
    if isinstance(error, subprocess.CalledProcessError):
        lines = str(error.stderr).strip().splitlines()
        return next((line for line in lines if "error" in line), f"the compiler ends with {error.returncode}")
    return str(error)
