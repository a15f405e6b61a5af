"""`python run.py debug=smoke`: every stage of the default run on the embedded model and the embedded data."""

from __future__ import annotations

from pathlib import Path

import pytest

from ptq161.tracking.read import read_run
from tests.end_to_end.conftest import Ended, Program
from tests.tracking.wandb_file import read_wandb_file

pytestmark = pytest.mark.slow

TASKS = ("piqa", "arc_easy_val", "hellaswag", "winogrande", "lambada")
CORPORA = ("boolq", "lambada")


@pytest.fixture(scope="module")
def smoke(tmp_path_factory: pytest.TempPathFactory) -> tuple[Ended, Path]:
    program = Program(tmp_path_factory.mktemp("smoke"), [])
    ended = program("debug=smoke", "hydra.run.dir=run")
    assert ended.status == 0, ended.stderr
    return ended, program.folder / "run"


def test_everything_of_the_default_run_is_scored(smoke: tuple[Ended, Path]) -> None:
    run = read_run(smoke[1])
    assert run.problems == [] and run.results is not None
    metrics, full = run.results["metrics"], run.results["full_precision"]
    for name in [f"ppl/{corpus}@128" for corpus in CORPORA] + [f"zero_shot/{task}/acc" for task in TASKS]:
        assert name in metrics and name in full, name
        protocol = run.results["protocol"][name]
        if name.startswith("zero_shot"):
            assert (protocol["n_documents"], protocol["limit"]) == (4, 4)
            assert protocol["embedded"] and protocol["split"] and 0 <= metrics[name] <= 1
        else:
            assert (protocol["n_windows"], protocol["seq_len"]) == (2, 128)
            assert metrics[name] != full[name]
    assert set(full) <= set(metrics)
    assert set(run.results["protocol"]) == {name for name in metrics if "/" in name}
    assert 1.6 < metrics["bits_per_weight"] < 2.1
    assert metrics["nominal_bits_per_weight"] == pytest.approx(1.6)
    assert metrics["checkpoint_bytes"] < full["checkpoint_bytes"]


def test_every_block_is_optimised_and_every_stage_timed(smoke: tuple[Ended, Path]) -> None:
    run = read_run(smoke[1])
    assert run.results is not None
    assert {m["block"] for m in run.metrics if m["name"] == "loss"} == {0, 1}
    assert len([m for m in run.metrics if m["name"] == "output_error"]) == 2 * 7
    assert set(run.results["seconds"]) == {"load", "full_precision", "quantize", "evaluate"}
    assert run.manifest["duration_seconds"] < 60
    for stage in ("full precision: perplexity", "full precision: zero-shot", "quantize:", "quantized: zero-shot"):
        assert stage in smoke[0].stderr  # progress bars


def test_wandb_has_a_plain_name_for_every_result(smoke: tuple[Ended, Path]) -> None:
    mirror = read_wandb_file(smoke[1])
    run = read_run(smoke[1])
    assert run.results is not None
    for name, value in run.results["metrics"].items():
        plain = name.replace("/", "_").replace("@", "_")
        assert mirror.summary[name] == mirror.summary[plain] == value
    assert mirror.exit_code == 0
