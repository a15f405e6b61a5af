"""The settings of the mirror of a run's record."""

from __future__ import annotations

import dataclasses

from ptq161.checks import check_choice

_TRACKERS = ("wandb", "none")
_WANDB_MODES = ("auto", "online", "offline")


@dataclasses.dataclass(frozen=True)
class TrackerConfig:
    """Where the run's record is mirrored.

    Attributes:
        name: ``wandb`` or ``none``.
        project: W&B project.
        entity: W&B entity; None is the account's own.
        mode: ``online``, ``offline``, or ``auto``: online where a login exists.
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
        """Reject unknown trackers and modes."""
        check_choice("tracker.name", self.name, _TRACKERS)
        check_choice("tracker.mode", self.mode, _WANDB_MODES)
