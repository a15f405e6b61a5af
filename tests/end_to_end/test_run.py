"""One run on the tiny model: what it records, and how its checkpoint comes back."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

from ptq161.files.hashing import sha256_of_file
from ptq161.tracking.read import read_run
from tests.end_to_end.conftest import SEQ_LEN, Program, Recorded
from tests.tracking.wandb_file import read_wandb_file

pytestmark = pytest.mark.slow

PPL = f"ppl/text_file@{SEQ_LEN}"
SIZES = {"bits_per_weight", "nominal_bits_per_weight", "checkpoint_bytes"}
BLOCKS, EPOCHS = 2, 4
LINEARS = ("q_proj", "k_proj", "v_proj", "o_proj", "gate_proj", "up_proj", "down_proj")


def test_the_default_directory_is_below_the_working_directory_and_holds_the_whole_record(tiny_run: Recorded) -> None:
    ended, run_dir = tiny_run
    assert {path.name for path in run_dir.iterdir()} == {
        ".hydra",
        ".lock",
        "SHA256SUMS",
        "checkpoint",
        "config.yaml",
        "manifest.json",
        "metrics.jsonl",
        "results.json",
        "run.log",
        "samples.jsonl",
        "wandb",
    }
    assert not set("=,") & set(str(run_dir.relative_to(run_dir.parents[2])))
    assert str(run_dir) in ended.stdout
    assert "Traceback" not in ended.stderr + (run_dir / "run.log").read_text()


def test_the_manifest_says_what_ran(tiny_run: Recorded) -> None:
    run = read_run(tiny_run[1])
    manifest = run.manifest
    assert run.problems == []
    assert (manifest["exit_state"], manifest["exception"], manifest["schema_version"]) == ("finished", None, 1)
    assert manifest["seeds"] == {"seed": 0}
    assert manifest["device"] == "cpu" and manifest["dtype"] in ("float32", "bfloat16")
    for key in ("model_sha256", "calibration_sha256", "checkpoint_sha256", "sources_sha256"):
        assert len(manifest[key]) == 64
    assert manifest["checkpoint_sha256"] == sha256_of_file(tiny_run[1] / "checkpoint" / "packed.safetensors")
    assert {"git", "versions", "hardware", "threads", "start", "end", "command"} <= set(manifest)


def test_the_config_is_resolved_and_names_the_model_by_its_folder(tiny_run: Recorded, tiny_model_dir: Path) -> None:
    config = read_run(tiny_run[1]).config
    assert "${" not in json.dumps(config)
    assert config["method"]["mask_ratio"] == config["mask_ratio"] == 0.2
    assert config["model"]["name"] == tiny_model_dir.name
    assert "hydra" not in config


def test_every_number_is_recorded_as_it_arises(tiny_run: Recorded) -> None:
    metrics = read_run(tiny_run[1]).metrics
    losses = [m for m in metrics if m["name"].endswith("loss")]
    assert [(m["block"], m["epoch"]) for m in losses] == [(b, e) for b in range(BLOCKS) for e in range(EPOCHS)]
    assert losses[EPOCHS - 1]["value"] < losses[0]["value"]
    for name in ("output_error", "salient_channels", "nbytes"):
        linears = [m["linear"] for m in metrics if m["name"] == name]
        assert sorted(linears) == sorted(set(linears)) and len(linears) == BLOCKS * len(LINEARS)
        assert {linear.rpartition(".")[2] for linear in linears} == set(LINEARS)
    assert all(m["value"] > 0 for m in metrics)
    seconds = [m for m in metrics if m["name"] == "seconds"]
    assert len(seconds) == BLOCKS
    assert [m["model"] for m in metrics if m["name"] == PPL] == ["full precision", "quantized"]
    times = [m["time"] for m in metrics]
    assert times == sorted(times)


def test_results_hold_scores_sizes_and_protocol_of_both_models(tiny_run: Recorded) -> None:
    results = json.loads((tiny_run[1] / "results.json").read_text())
    assert results["schema_version"] == 1
    assert set(results["metrics"]) >= {PPL, *SIZES}
    assert set(results["full_precision"]) == {PPL, *SIZES}
    assert set(results["protocol"]) == {PPL}
    protocol = results["protocol"][PPL]
    assert (protocol["seq_len"], protocol["n_windows"], protocol["n_tokens"]) == (SEQ_LEN, 8, 8 * SEQ_LEN)
    assert protocol["standard_error"] > 0 and protocol["bos_rule"] and protocol["split"] == "all"
    checkpoint = tiny_run[1] / "checkpoint" / "packed.safetensors"
    assert results["metrics"]["checkpoint_bytes"] == checkpoint.stat().st_size
    assert results["metrics"]["nominal_bits_per_weight"] == pytest.approx(1.6)
    linear_bytes = sum(m["value"] for m in read_run(tiny_run[1]).metrics if m["name"] == "nbytes")
    assert results["metrics"]["linear_bytes"] == linear_bytes
    hidden, mlp, kv = 64, 96, 32
    weights = BLOCKS * (2 * hidden * hidden + 2 * hidden * kv + 3 * hidden * mlp)
    assert results["metrics"]["bits_per_weight"] == pytest.approx(8 * linear_bytes / weights)


def test_the_table_and_the_samples_are_printed(tiny_run: Recorded) -> None:
    ended, run_dir = tiny_run
    results = json.loads((run_dir / "results.json").read_text())
    (row,) = [line for line in ended.stdout.splitlines() if PPL in line]
    assert f"{results['full_precision'][PPL]:.2f}" in row and f"{results['metrics'][PPL]:.2f}" in row
    samples = read_run(run_dir).samples
    assert [sample["name"] for sample in samples] == ["full precision", "quantized"]
    assert all(sample["text"].startswith("The capital of France is") for sample in samples)
    assert ended.stdout.count("No W&B login was found") == 1


def test_wandb_mirrors_the_run(tiny_run: Recorded) -> None:
    run = read_run(tiny_run[1])
    mirror = read_wandb_file(tiny_run[1])
    assert run.results is not None
    assert {key: mirror.config[key] for key in run.config} == run.config
    assert mirror.run.project == "ptq161" and not mirror.run.run_group
    assert list(mirror.run.tags) == [run.config["model"]["name"], "ptq161"]
    for name, value in run.results["metrics"].items():
        assert mirror.summary[name] == value
    assert mirror.summary[f"ppl_text_file_{SEQ_LEN}"] == run.results["metrics"][PPL]
    assert mirror.summary[f"full_precision_ppl_text_file_{SEQ_LEN}"] == run.results["full_precision"][PPL]
    assert len([row for row in mirror.history if any("loss" in key for key in row)]) == BLOCKS * EPOCHS
    assert mirror.summary["exit_state"] == "finished" and mirror.exit_code == 0


def test_the_checkpoint_is_evaluated_as_it_is_to_the_last_digit(
    program: Program, tiny_run: Recorded, text_file: Path
) -> None:
    checkpoint = tiny_run[1] / "checkpoint"
    evaluation = [override for override in program.tiny if override.startswith(("eval", "device"))]
    ended = program(f"model.path={checkpoint}", *evaluation, "tracker=none", "hydra.run.dir=again")
    assert ended.status == 0, ended.stderr
    assert len([line for line in ended.stdout.splitlines() if "nothing is quantized" in line]) == 1
    before, again = read_run(tiny_run[1]), read_run(program.folder / "again")
    assert before.results is not None and again.results is not None
    for name in (PPL, *SIZES):
        assert again.results["metrics"][name] == before.results["metrics"][name]
    assert again.manifest["checkpoint_sha256"] == before.manifest["checkpoint_sha256"]
    # The default method of the configuration is not what made the checkpoint, so the record does not claim it.
    assert not {"method", "mask_ratio", "calib"} & set(again.config)
    assert not (program.folder / "again" / "checkpoint").exists()


def test_the_same_seed_gives_the_same_bytes(program: Program, tiny_run: Recorded) -> None:
    ended = program(*program.tiny, "tracker=none", "hydra.run.dir=again")
    assert ended.status == 0, ended.stderr
    for file in (tiny_run[1] / "checkpoint").iterdir():
        assert (program.folder / "again" / "checkpoint" / file.name).read_bytes() == file.read_bytes()
    assert not (program.folder / "again" / "wandb").exists()


def test_samples_windows_and_a_long_protocol_are_set_on_the_command_line(
    program: Program, tiny_model_dir: Path, text_file: Path
) -> None:
    ended = program(
        f"model.path={tiny_model_dir}",
        "calib=text_file",
        f"calib.text_file={text_file}",
        "calib.seq_len=64",
        "calib.n_samples=16",
        "block_size=2",
        "eval=ppl",
        "eval.corpora=[text_file]",
        f"eval.text_file={text_file}",
        "eval.seq_len=512",
        "eval.max_windows=40",
        "device=cpu",
        "tracker=none",
        "hydra.run.dir=run",
        "seed=1",
    )
    assert ended.status == 0, ended.stderr
    run = read_run(program.folder / "run")
    assert run.results is not None
    assert run.results["protocol"]["ppl/text_file@512"]["n_windows"] == 40
    assert run.manifest["seeds"] == {"seed": 1}
    assert len([m for m in run.metrics if m["name"] == "loss"]) == EPOCHS  # both blocks are one window
    assert run.config["calib"]["n_samples"] == 16


def test_full_precision_alone(program: Program, tiny_run: Recorded) -> None:
    ended = program(*program.tiny, "method=none", "tracker=none", "hydra.run.dir=run")
    assert ended.status == 0, ended.stderr
    run, quantized = read_run(program.folder / "run"), read_run(tiny_run[1])
    assert run.results is not None and quantized.results is not None
    assert run.results["metrics"] == run.results["full_precision"] == quantized.results["full_precision"]
    assert not (program.folder / "run" / "checkpoint").exists()
    assert run.manifest["model_sha256"] == quantized.manifest["model_sha256"]
