"""Imports when they are needed: a package's attributes on first use, and a module after another one."""

from __future__ import annotations

import sys
from collections.abc import Callable, Mapping, Sequence
from importlib import import_module
from importlib.abc import MetaPathFinder
from importlib.machinery import ModuleSpec, PathFinder
from types import ModuleType
from typing import Any


def lazy_attributes(package: str, exports: Mapping[str, Sequence[str]]) -> Callable[[str], Any]:
    """Return the ``__getattr__`` of a package (PEP 562).

    Args:
        package: its ``__name__``.
        exports: module -> the names that the package has from it.
    """
    modules = {name: module for module, names in exports.items() for name in names}

    def get(name: str) -> Any:
        if name in modules:
            return getattr(import_module(modules[name]), name)
        raise AttributeError(f"module {package!r} has no attribute {name!r}")

    return get


def import_after(name: str, then: str) -> None:
    """Import the module ``then`` as soon as the module ``name`` is imported: at once where it is already."""
    if name in sys.modules:
        import_module(then)
    else:
        sys.meta_path.insert(0, _After(name, then))


class _After(MetaPathFinder):
    """Finds one module, once, as Python would, and imports another one behind it."""

    def __init__(self, name: str, then: str) -> None:
        self.name, self.then = name, then

    def find_spec(
        self, fullname: str, path: Sequence[str] | None, target: ModuleType | None = None
    ) -> ModuleSpec | None:
        if fullname != self.name:
            return None
        sys.meta_path.remove(self)
        spec = PathFinder.find_spec(fullname, path, target)
        if spec is not None and spec.loader is not None:
            execute = spec.loader.exec_module

            def execute_both(module: ModuleType) -> None:
                execute(module)
                import_module(self.then)

            spec.loader.exec_module = execute_both  # type: ignore[method-assign]  # of this loader alone
        return spec
