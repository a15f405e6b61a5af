"""A hook of MkDocs: studies, changelog and contribution guide are pages of the site, at their own paths.

Pages link to each other as the files of the repository do, so that the links work there as well. Here they are turned
into the site's: ``docs/`` is its root, and what is not on the site keeps its text and loses its link.
"""

from __future__ import annotations

import posixpath
import re
from pathlib import Path
from typing import Any

from mkdocs.structure.files import File, Files

ROOT = Path(__file__).resolve().parents[2]
OUTSIDE_OF_DOCS = ("CHANGELOG.md", "CONTRIBUTING.md", "experiments/**/*.md", "experiments/**/*.csv")
FIGURES = "experiments/**/figure.svg"
LINK = re.compile(r"(!?)\[((?:[^\[\]]|\[[^\]]*\])*)\]\(([^()\s]+)\)")


def on_files(files: Files, config: Any) -> Files:
    """Add the files that lie outside of ``docs/``."""
    for pattern in (*OUTSIDE_OF_DOCS, FIGURES):
        for path in sorted(ROOT.glob(pattern)):
            name = path.relative_to(ROOT).as_posix()
            files.append(File.generated(config, name, abs_src_path=str(path)))
    return files


def on_page_markdown(markdown: str, page: Any, config: Any, files: Files) -> str:
    """Turn the repository's links into the site's."""
    here = page.file.src_uri
    in_repository = here if page.file.generated_by else f"docs/{here}"

    def turned(match: re.Match[str]) -> str:
        kind, text, link = match.groups()
        path, mark, anchor = link.partition("#")
        if not path or "://" in path or path.startswith("mailto:"):
            return match[0]
        target = posixpath.normpath(posixpath.join(posixpath.dirname(in_repository), path)).removeprefix("docs/")
        if files.get_file_from_path(target) is None:
            return match[0] if target in ("", ".") or not (ROOT / target).exists() else text
        relative = posixpath.relpath(target, posixpath.dirname(here) or ".")
        return f"{kind}[{text}]({relative}{mark}{anchor})"

    return LINK.sub(turned, markdown)
