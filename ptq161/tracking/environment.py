"""The environment of a run: commit, package versions, hardware, threads."""

from __future__ import annotations

import os
import platform
import subprocess
import sys
from importlib import metadata
from pathlib import Path
from typing import Any

import torch

from ptq161.files.identity import SOURCES
from ptq161.kernels import native

_PACKAGES = ("ptq161", "torch", "transformers", "lm-eval", "datasets", "hydra-core", "wandb", "peft", "numpy")
THREAD_VARIABLES = ("OMP_", "MKL_", "KMP_", "GOMP_", "OPENBLAS_")


def describe_environment() -> dict[str, Any]:
    """Return the part of the manifest that does not depend on the run's configuration."""
    return {
        "git": _git_state(),
        "sources_sha256": SOURCES,
        "versions": _package_versions(),
        "hardware": _hardware(),
        "threads": _threads(),
        "command": [sys.executable, *sys.argv],
        "working_directory": os.getcwd(),
        "pid": os.getpid(),
    }


def _git_state(source: Path = Path(__file__)) -> dict[str, Any] | None:
    """Return ``{"commit": ..., "dirty": ...}`` of the checkout that ``source`` belongs to; None outside of one.

    A package installed into an environment that merely lies inside someone's repository does not belong to it.
    """
    tracked = _git(source.parent, "ls-files", "--error-unmatch", source.name)
    commit = _git(source.parent, "rev-parse", "HEAD")
    if tracked is None or commit is None:
        return None
    return {"commit": commit, "dirty": bool(_git(source.parent, "status", "--porcelain"))}


def _package_versions() -> dict[str, str | None]:
    """Return the versions of what a result may depend on; None for what is not installed."""
    versions: dict[str, str | None] = {"python": platform.python_version()}
    for package in _PACKAGES:
        try:
            versions[package] = metadata.version(package)
        except metadata.PackageNotFoundError:
            versions[package] = None
    try:
        versions["c++"] = native.compiler_version()
    except (OSError, subprocess.SubprocessError):
        versions["c++"] = None  # torch's own operators serve then
    return versions


def _hardware() -> dict[str, Any]:
    """Return processor, memory (bytes) and GPUs."""
    gpus = [torch.cuda.get_device_properties(i) for i in range(torch.cuda.device_count())]
    return {
        "host": platform.node(),
        "system": platform.platform(),
        "cpu": _cpu_model(),
        "cpu_capability": torch.backends.cpu.get_cpu_capability(),
        "cores": os.cpu_count(),
        "usable_cores": len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count(),
        "ram_bytes": os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES"),
        "gpus": [{"name": gpu.name, "memory_bytes": gpu.total_memory} for gpu in gpus],
        "cuda": torch.version.cuda,
    }


def _threads() -> dict[str, Any]:
    """Return the thread counts: the order of float sums, and so the bytes of a result, depend on them."""
    return {
        "torch": torch.get_num_threads(),
        "torch_interop": torch.get_num_interop_threads(),
        "environment": {k: v for k, v in sorted(os.environ.items()) if k.startswith(THREAD_VARIABLES)},
    }


def _git(folder: Path, *arguments: str) -> str | None:
    try:
        done = subprocess.run(
            ["git", "-C", str(folder), *arguments],
            stdin=subprocess.DEVNULL,
            capture_output=True,
            text=True,
            timeout=20,
            check=True,
        )
    except (OSError, subprocess.SubprocessError):
        return None
    return done.stdout.strip()


def _cpu_model() -> str:
    try:
        lines = Path("/proc/cpuinfo").read_text().splitlines()
    except OSError:
        return platform.processor()
    models = [line.partition(":")[2].strip() for line in lines if line.startswith("model name")]
    return models[0] if models else platform.machine()
