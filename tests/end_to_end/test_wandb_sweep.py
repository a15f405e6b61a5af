"""A W&B agent's own code starts run.py from sweep.yaml; no service is used."""

from __future__ import annotations

import os
import sys
from pathlib import Path
from typing import Any

import pytest
import yaml
from wandb.wandb_agent import Agent

from ptq161.tracking.read import read_run
from tests.end_to_end.conftest import RUN, SECONDS, SEQ_LEN, variables
from tests.tracking.wandb_file import read_wandb_file

pytestmark = pytest.mark.slow


def test_an_agent_runs_what_the_sweep_chose(tmp_path: Path, tiny: list[str], monkeypatch: pytest.MonkeyPatch) -> None:
    for name in ("run.py", "conf"):
        (tmp_path / name).symlink_to(RUN.parent / name)
    monkeypatch.chdir(tmp_path)
    environment = variables(tmp_path, WANDB_MODE="offline", WANDB_SWEEP_ID="sweep7", WANDB_DIR=str(tmp_path))
    for name in os.environ.keys() - environment.keys():
        monkeypatch.delenv(name)
    for name, value in environment.items():
        monkeypatch.setenv(name, value)
    # The agent starts the first `python` it finds; it sets the last two itself.
    monkeypatch.setenv("PATH", os.pathsep.join([str(Path(sys.executable).parent), os.environ["PATH"]]))
    monkeypatch.setenv("WANDB_RUN_ID", "")
    monkeypatch.setenv("WANDB_SWEEP_PARAM_PATH", "")
    config: Any = yaml.safe_load((RUN.parent / "sweep.yaml").read_text())

    agent = Agent(api=None, queue=None, sweep_id="sweep7")
    agent._sweep_command = config["command"]  # as the service would send it
    parameters = {"mask_ratio": 0.25, "method.epochs": 2, "method.scale_lr": 0.00012345, "method.angle_lr": 0.05}
    arguments = {**parameters, **dict(override.split("=", 1) for override in tiny)}
    values = {name: {"value": value} for name, value in arguments.items()}
    agent._command_run({"run_id": "run3", "program": config["program"], "args": values})
    assert agent._run_processes["run3"]._popen.wait(SECONDS) == 0

    run = read_run(tmp_path / "outputs" / "sweep7" / "run3")
    assert run.results is not None and run.manifest["exit_state"] == "finished"
    method = run.config["method"]
    recorded = {f"method.{key}": value for key, value in method.items()} | {"mask_ratio": method["mask_ratio"]}
    assert recorded.items() >= parameters.items()
    mirror = read_wandb_file(run.run_dir)
    assert mirror.run.run_id == "run3" and mirror.exit_code == 0
    assert mirror.summary[f"ppl_text_file_{SEQ_LEN}"] == run.results["metrics"][f"ppl/text_file@{SEQ_LEN}"]
