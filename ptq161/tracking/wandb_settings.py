"""What W&B is asked for: the mode that its user set, names within its limits, and an id for each job."""

from __future__ import annotations

import hashlib
import logging
import os
from collections.abc import Iterable
from typing import Literal

from ptq161.tracking.settings import LONGEST_NAME, LONGEST_TAG, TrackerConfig

log = logging.getLogger(__name__)

Mode = Literal["online", "offline", "disabled"]
_RUN_ID = "WANDB_RUN_ID"


def wandb_mode(tracker: TrackerConfig) -> Mode:
    """Return the mode in which W&B starts, and log why it is not online, unless ``tracker.mode`` says so.

    ``tracker.mode`` decides; ``auto`` is what W&B's own settings say (``WANDB_MODE``, and the files that ``wandb
    disabled`` and ``wandb offline`` write). Without a login a run is offline: W&B would ask for a key.
    """
    import wandb

    # Internal, but what W&B itself starts from; its public `setup` starts the service, which can hang.
    from wandb.sdk import wandb_setup

    if tracker.mode == "offline":
        return "offline"
    wanted = wandb_setup.singleton().settings.mode if tracker.mode == "auto" else "online"
    if wanted == "disabled":
        log.info("W&B is switched off by %s: the run is not mirrored.", _source_of_mode())
        return "disabled"
    if wanted in ("offline", "dryrun"):
        log.info("W&B is offline by %s: the run is mirrored below wandb/; `wandb sync` uploads it.", _source_of_mode())
        return "offline"
    # Without a prompt or a request. Where its own settings say offline, the first finds no login.
    if wandb.login(prompt=False, verify=False) or (tracker.mode == "online" and wandb.api.api_key):
        return "online"
    log.info("No W&B login was found: the run is mirrored offline, below wandb/; `wandb sync` uploads it.")
    return "offline"


def own_run_id(job: int) -> dict[str, str]:
    """Return ``WANDB_RUN_ID`` for one of several jobs, derived from the one that is set for all; empty without one.

    With one id for all, each job would replace the one before it.

    Args:
        job: its number.

    Returns:
        the variable and its value, for the job's environment.
    """
    shared = os.environ.get(_RUN_ID)
    if not shared:
        return {}
    own = shortened(f"{shared}-{job}", LONGEST_NAME)
    log.info("%s=%s is set for several jobs: job %d is mirrored as %s.", _RUN_ID, shared, job, own)
    return {_RUN_ID: own}


def shortened(text: str, longest: int) -> str:
    """Cut a text that is too long; its hash at the end keeps different texts different."""
    if len(text) <= longest:
        return text
    return f"{text[: longest - 9]}-{hashlib.sha256(text.encode()).hexdigest()[:8]}"


def valid_tags(tags: Iterable[str]) -> list[str]:
    """Return tags that W&B takes: none is empty, too long or there twice."""
    return list(dict.fromkeys(shortened(tag, LONGEST_TAG) for tag in tags if tag))


def _source_of_mode() -> str:
    return f"WANDB_MODE={mode}" if (mode := os.environ.get("WANDB_MODE")) else "its own settings file"
