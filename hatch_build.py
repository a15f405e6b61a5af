"""Compiled operators inside a wheel: ``PTQ161_BUILD_KERNELS=1 pip wheel --no-deps --no-build-isolation .``.

That needs a C++ compiler and an environment with torch, whose headers are read, on x86-64; the wheel is then one of
this platform. Without the variable nothing is compiled, and the wheel is the same everywhere. In place of 1 the
variable can name some of the sources, separated by commas.
"""

from __future__ import annotations

import os
import sys
import sysconfig
import tempfile
from pathlib import Path
from typing import Any

from hatchling.builders.hooks.plugin.interface import BuildHookInterface


class KernelHook(BuildHookInterface[Any]):
    """Compile the operators of ``ptq161/kernels`` before a wheel is put together."""

    def initialize(self, version: str, build_data: dict[str, Any]) -> None:
        """Put the libraries among the files of the wheel, and name its platform."""
        chosen = os.environ.get("PTQ161_BUILD_KERNELS", "")
        if not chosen or version == "editable":
            return
        sys.path.insert(0, self.root)
        from ptq161.kernels import native

        self._folder = tempfile.TemporaryDirectory()
        native.build(Path(self._folder.name), () if chosen == "1" else chosen.split(","))
        build_data["force_include"][self._folder.name] = "ptq161/kernels/_prebuilt"
        build_data["pure_python"] = False
        platform = sysconfig.get_platform().replace("-", "_").replace(".", "_")
        build_data["tag"] = f"py3-none-{platform}"
