"""The help and the composed configuration that the program prints."""

from __future__ import annotations

import re
from pathlib import Path

import pytest
import yaml

from tests.end_to_end.conftest import Program

pytestmark = pytest.mark.slow

CONF = Path(__file__).resolve().parents[2] / "conf"


def test_help_explains_every_top_level_key(program: Program) -> None:
    ended = program("--help")
    assert (ended.status, ended.stderr) == (0, "")
    config = yaml.safe_load((CONF / "config.yaml").read_text())
    selected = [next(iter(entry)) for entry in config["defaults"] if entry != "_self_"]
    groups = [name for name in selected if not name.startswith("override ")]
    keys = [*groups, *(key for key in config if key not in ("defaults", "hydra"))]
    assert {"model", "method", "mask_ratio", "block_size", "seed", "device", "dtype"} <= set(keys)
    for key in keys:
        assert re.search(rf"^ +{key} +\w.{{20}}", ended.stdout, re.MULTILINE), f"--help does not explain {key}"
    for group in groups:
        options = next(line for line in ended.stdout.splitlines() if line.startswith(f"{group}: ")).split(": ")[1]
        assert set(options.split(", ")) == {path.stem for path in (CONF / group).glob("*.yaml")}


def test_the_config_of_a_job_can_be_shown(program: Program) -> None:
    ended = program("--cfg", "job", "--resolve", "mask_ratio=0.3", "method=ptq161_paper")
    assert (ended.status, ended.stderr) == (0, "")
    config = yaml.safe_load(ended.stdout)
    assert config["method"]["mask_ratio"] == 0.3
    assert (config["method"]["name"], config["method"]["epochs"]) == ("ptq161_paper", 20)
    assert list(program.folder.iterdir()) == []
