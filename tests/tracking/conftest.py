"""A W&B without a login, and short cuts to open records."""

from __future__ import annotations

import contextlib
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from ptq161.tracking.record import RunRecord
from ptq161.tracking.settings import TrackerConfig

OpenRecord = Callable[..., contextlib.AbstractContextManager[RunRecord]]


@pytest.fixture(autouse=True)
def no_login(monkeypatch: pytest.MonkeyPatch, tmp_path_factory: pytest.TempPathFactory) -> None:
    """Hide the login and settings of whoever runs the tests."""
    home = tmp_path_factory.mktemp("home")
    for name in ("WANDB_API_KEY", "WANDB_MODE", "WANDB_BASE_URL", "WANDB_IDENTITY_TOKEN_FILE", "WANDB_DIR"):
        monkeypatch.delenv(name, raising=False)
    monkeypatch.setenv("HOME", str(home))
    monkeypatch.setenv("NETRC", str(home / ".netrc"))
    monkeypatch.setenv("WANDB_CONFIG_DIR", str(home / "wandb"))


@pytest.fixture
def open_record(tmp_path: Path) -> OpenRecord:
    """Open a record in ``tmp_path/run`` without a tracker; every argument can be replaced."""

    def opened(run_dir: Path | None = None, **changes: Any) -> contextlib.AbstractContextManager[RunRecord]:
        arguments: dict[str, Any] = {
            "config": {"mask_ratio": 0.2, "eval": {"corpora": ["boolq"]}},
            "tracker": TrackerConfig("none"),
            "seeds": {"run": 7},
            "job_name": "demo",
        }
        return RunRecord.open(run_dir or tmp_path / "run", **(arguments | changes))

    return opened
