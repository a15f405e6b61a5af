"""The one exception for everything a user can put right."""

from __future__ import annotations


class UserError(Exception):
    """A bad value, file, model or environment.

    The message is one sentence that names the setting, the value and what would be right.
    """
