"""Checks of settings, for every room: the error names the setting, its value and what would be right."""

from __future__ import annotations

from collections.abc import Collection

from ptq161.errors import UserError


def check_choice(setting: str, value: object, choices: Collection[object]) -> None:
    """Check that a setting is one of its choices.

    Raises:
        UserError: the value is none of ``choices``.
    """
    if value not in choices:
        raise UserError(f"{setting}={value}: use one of {', '.join(map(str, choices))}.")


def check_at_least(setting: str, value: float | None, least: float) -> None:
    """Check that an optional number is not below ``least``.

    Raises:
        UserError: the value is below ``least``.
    """
    if value is not None and value < least:
        raise UserError(f"{setting}={value}: use at least {least}.")
