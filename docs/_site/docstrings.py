"""An extension of Griffe: what docstrings say in reStructuredText becomes Markdown, which the site is written in."""

from __future__ import annotations

import re
from typing import Any

import griffe

ROLE = re.compile(r":(?:class|func|meth|mod|data|attr|exc):`~?([\w.]+)`")
LITERAL = re.compile(r"``(.+?)``", re.DOTALL)
BLOCK = re.compile(r"::$", re.MULTILINE)
EXAMPLE = re.compile(r"^(\s*)Example:$", re.MULTILINE)


class Docstrings(griffe.Extension):
    """Changes docstrings as they are read."""

    def on_instance(self, *, obj: griffe.Object, **kwargs: Any) -> None:
        """Change the docstring of one module, class, function or attribute."""
        if obj.docstring is None:
            return
        text = LITERAL.sub(r"`\1`", obj.docstring.value)
        # Links where the site documents the name, plain text elsewhere.
        text = ROLE.sub(r'<autoref identifier="\1" optional><code>\1</code></autoref>', text)
        text = EXAMPLE.sub(r"\1Examples:", text)
        obj.docstring.value = BLOCK.sub(":", text)
