"""The one exception for everything a user can put right."""

from __future__ import annotations


class UserError(Exception):
    """A bad value, file, model or environment.

    The message is one sentence that names the setting, the value and what would be right. It stays on one line,
    whatever a value or another library's message has in it.
    """

    def __init__(self, sentence: str) -> None:
        super().__init__(" ".join(line.strip() for line in sentence.splitlines()))
