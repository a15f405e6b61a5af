"""Runs of the pipeline in this process, and what of their records is compared."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

from hydra import compose, initialize_config_dir
from omegaconf import OmegaConf

from ptq161.files.hashing import sha256_of_file
from ptq161.run import pipeline
from ptq161.run.config import load_run_config
from ptq161.run.session import RunContext
from ptq161.tracking.read import RunData

CONF = str(Path(__file__).resolve().parents[2] / "conf")
Run = Callable[..., RunData]


def execute(overrides: list[str], run_dir: Path) -> Path:
    if any(override.startswith("method=") for override in overrides):
        overrides = [override for override in overrides if override != "method.epochs=1"]
    with initialize_config_dir(CONF, version_base="1.3"):
        cfg = compose("config", overrides)
    resolved: Any = OmegaConf.to_container(cfg, resolve=True)
    pipeline.run(load_run_config(cfg), RunContext(str(run_dir), resolved, overrides, run_dir.name))
    return run_dir


def plain(metrics: list[dict[str, Any]]) -> list[dict[str, Any]]:
    """Numbers without when they arose and how long they took."""
    return [{k: v for k, v in m.items() if k != "time"} for m in metrics if m["name"] != "seconds"]


def model_files(run: RunData) -> dict[str, str]:
    return {path.name: sha256_of_file(path) for path in (run.run_dir / "checkpoint").iterdir()}


def scores(run: RunData) -> dict[str, Any]:
    assert run.results is not None and run.problems == []
    assert run.manifest["exit_state"] == "finished"
    return {key: run.results[key] for key in ("metrics", "full_precision", "protocol")}
