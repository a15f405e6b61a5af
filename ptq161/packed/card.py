"""The model card, ``README.md``, of every folder that this project writes: what it is, and how it is opened."""

from __future__ import annotations

from pathlib import Path

from huggingface_hub import ModelCard, ModelCardData

from ptq161.models.loading import is_packed_folder

CARD = "README.md"
_TAG = "ptq161"


def write_card(folder: Path, kind: str, text: str) -> None:
    """Write the card of a model's folder.

    Args:
        folder: exists.
        kind: ``packed`` or ``dense``.
        text: Markdown.

    Example:
        >>> import tempfile
        >>> with tempfile.TemporaryDirectory() as folder:
        ...     write_card(Path(folder), "dense", "Weights that packed bytes stand for.")
        ...     print((Path(folder) / CARD).read_text().splitlines()[1], is_ours(Path(folder)))
        library_name: transformers True
    """
    library = "ptq161" if kind == "packed" else "transformers"
    header = ModelCardData(library_name=library, tags=[_TAG, kind]).to_yaml()
    (folder / CARD).write_text(f"---\n{header}\n---\n\n{text}\n", encoding="utf-8")


def is_ours(folder: Path) -> bool:
    """Whether this project wrote a folder: a packed checkpoint, or a dense model with this project's card.

    Example:
        >>> import tempfile
        >>> with tempfile.TemporaryDirectory() as folder:
        ...     is_ours(Path(folder))
        False
    """
    if is_packed_folder(folder):
        return True
    try:
        card = ModelCard((folder / CARD).read_text(encoding="utf-8"), ignore_metadata_errors=True)
    except (OSError, ValueError):
        return False
    return _TAG in (getattr(card.data, "tags", None) or [])
