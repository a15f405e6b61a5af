"""The settings of the mirror of a run's record."""

from __future__ import annotations

import dataclasses

from ptq161.checks import check_choice
from ptq161.errors import UserError

LONGEST_NAME = 128
"""Longest name of a project, group, run or id in W&B, in characters."""
LONGEST_TAG = 64
_NOT_IN_PROJECTS = "/\\#?%:"
_TRACKERS = ("wandb", "none")
_WANDB_MODES = ("auto", "online", "offline")


@dataclasses.dataclass(frozen=True)
class TrackerConfig:
    """Where the run's record is mirrored.

    Attributes:
        name: ``wandb`` or ``none``.
        project: W&B project.
        entity: W&B entity; None is the account's own.
        mode: ``online``, ``offline``, or ``auto``: as W&B's own settings say; without a login always offline.
        group: W&B group; None is the sweep's directory, or nothing for a single run.
        tags: W&B tags.
    """

    name: str
    project: str = "ptq161"
    entity: str | None = None
    mode: str = "auto"
    group: str | None = None
    tags: list[str] = dataclasses.field(default_factory=list)

    def __post_init__(self) -> None:
        """Reject unknown trackers and modes, and names that W&B would not take."""
        check_choice("tracker.name", self.name, _TRACKERS)
        check_choice("tracker.mode", self.mode, _WANDB_MODES)
        for tag in self.tags:
            if not 1 <= len(tag) <= LONGEST_TAG:
                raise UserError(f"tracker.tags: {tag!r} has {len(tag)} characters; W&B takes 1 to {LONGEST_TAG}.")
        if not 1 <= len(self.project) <= LONGEST_NAME or set(self.project) & set(_NOT_IN_PROJECTS):
            raise UserError(
                f"tracker.project={self.project}: W&B takes 1 to {LONGEST_NAME} characters, and none of "
                f"{' '.join(_NOT_IN_PROJECTS)}."
            )
