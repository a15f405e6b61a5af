"""sweep.yaml: what a W&B agent passes to run.py is a configuration that can run, and its metric is measured."""

from __future__ import annotations

import itertools
from pathlib import Path
from typing import Any

import pytest
import yaml
from hydra import compose, initialize_config_dir
from wandb.sdk.launch.sweeps.utils import create_sweep_command_args

from ptq161.run.config import RunConfig
from ptq161.run.preflight import checked_config
from ptq161.tracking.wandb_mirror import _plain_names

ROOT = Path(__file__).resolve().parents[2]


@pytest.fixture(scope="module")
def sweep() -> dict[str, Any]:
    config: dict[str, Any] = yaml.safe_load((ROOT / "sweep.yaml").read_text())
    return config


def ends(parameter: dict[str, Any]) -> list[Any]:
    return [parameter["value"]] if "value" in parameter else [parameter["min"], parameter["max"]]


def configured(overrides: list[str]) -> RunConfig:
    with initialize_config_dir(str(ROOT / "conf"), version_base="1.3"):
        return checked_config(compose("config", overrides), overrides)


def test_every_corner_is_a_configuration_that_can_run(sweep: dict[str, Any]) -> None:
    names = list(sweep["parameters"])
    corners = list(itertools.product(*(ends(parameter) for parameter in sweep["parameters"].values())))
    assert len(corners) == 8
    for corner in corners:
        arguments = {name: {"value": value} for name, value in zip(names, corner, strict=True)}
        method: Any = configured(create_sweep_command_args({"args": arguments})["args_no_hyphens"]).method
        assert (method.mask_ratio, method.epochs, method.scale_lr, method.angle_lr) == corner


def test_the_program_and_the_arguments_are_hydras(sweep: dict[str, Any]) -> None:
    assert (ROOT / sweep["program"]).is_file()
    assert "${args_no_hyphens}" in sweep["command"] and "${args}" not in sweep["command"]


def test_the_metric_is_one_that_a_default_run_puts_into_its_summary(sweep: dict[str, Any]) -> None:
    evaluation = configured([]).eval
    measured = [f"ppl/{corpus}@{evaluation.seq_len}" for corpus in evaluation.corpora]
    assert sweep["metric"] == {"name": _plain_names(measured)[measured[0]], "goal": "minimize"}
