"""The examples in the docstrings of packed/ and methods/: every public function and class has one, and all of them run.

An example sees the names of its module, as with ``python -m doctest``, and imports what else it needs.
"""

from __future__ import annotations

import doctest
import importlib
import inspect
import io
import pkgutil
from types import ModuleType

import pytest

import ptq161.methods
import ptq161.packed

MODULES = sorted(
    found.name
    for package in (ptq161.packed, ptq161.methods)
    for found in pkgutil.walk_packages(package.__path__, f"{package.__name__}.")
)


def public(module: ModuleType) -> list[str]:
    """The names of the public functions and classes that a module defines."""
    return [
        name
        for name, value in vars(module).items()
        if not name.startswith("_")
        and (inspect.isfunction(value) or inspect.isclass(value))
        and value.__module__ == module.__name__
    ]


@pytest.mark.parametrize("name", MODULES)
def test_examples(name: str) -> None:
    module = importlib.import_module(name)
    tests = doctest.DocTestFinder().find(module, name)
    with_examples = {test.name for test in tests if test.examples}
    without = [member for member in public(module) if f"{name}.{member}" not in with_examples]
    assert not without, f"no example in the docstring of {', '.join(without)}"
    report = io.StringIO()
    for test in tests:
        doctest.DocTestRunner().run(test, out=report.write)
    assert not report.getvalue(), report.getvalue()
