"""Bad input: one sentence on stderr, a non-zero exit, no traceback, and a record where a run had begun."""

from __future__ import annotations

import json
import shutil
import signal
import time
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file

from ptq161.data.assets import ASSETS
from ptq161.tracking.read import read_run
from tests.end_to_end.conftest import SECONDS, Ended, Program, Recorded

pytestmark = pytest.mark.slow


def assert_sentence(ended: Ended, *parts: str) -> None:
    """One sentence with all ``parts``, and nothing else."""
    assert ended.status == 1
    assert "Traceback" not in ended.stderr
    (sentence,) = ended.sentences
    for part in parts:
        assert part in sentence


@pytest.mark.parametrize(
    ("overrides", "parts"),
    [
        ("mask_ratio=1", ("mask_ratio=1", "[0, 1)")),
        ("mask_ratio=-0.1", ("mask_ratio=-0.1", "[0, 1)")),
        ("+method.nonsense=1", ("method.nonsense", "mask_ratio, epochs")),
        ("eval.sample_prompt=''", ("eval.sample_prompt is empty",)),
        ("model.path=nowhere", ("model.path=", "/nowhere: ", "config.json")),
        ("eval.text_file=nowhere.txt", ("eval.text_file=", "/nowhere.txt: there is no such file")),
        ("hydra.run.dir=occupied/run", ("hydra.run.dir=", "/occupied/run cannot be written")),
        ("-m hydra.sweep.dir=occupied/run seed=0,1", ("hydra.sweep.dir=", "/occupied/run cannot be written")),
    ],
)
def test_what_is_known_beforehand_leaves_nothing_behind(
    program: Program, overrides: str, parts: tuple[str, ...]
) -> None:
    (program.folder / "occupied").write_text("a file")
    multirun, *rest = overrides.split() if overrides.startswith("-m") else ("", *overrides.split())
    ended = program(*filter(None, [multirun]), *program.tiny, *rest)
    assert_sentence(ended, *parts)
    assert [path.name for path in program.folder.iterdir()] == ["occupied"]


@pytest.mark.parametrize(
    ("overrides", "parts"),
    [
        (["method=nonsense"], ("method=nonsense: there is no such option; use one of awq, ", ", rtn, ")),
        (["nonsense=1"], ("unknown key nonsense: known are block_size, ",)),
        (["method.nonsense=1"], ("unknown key method.nonsense: known are ", "epochs")),
        (["model.path=~/x"], ("quote the value, \"model.path='~/x'\".",)),
        (["-m", "model.path=~/x", "seed=0,1"], ("quote the value, \"model.path='~/x'\".",)),
        (["seed=0,1"], ("seed=0,1: values with commas are a sweep, which needs -m;",)),
        (["-m", "mask_ratio=range(0.4,0.1,0.1)"], ("mask_ratio=range(0.4,0.1,0.1): the range has no values;",)),
        (["-m", "method=glob(zz*)"], ("this sweep has no jobs",)),
        (["-m", "seed=0,1", "nonsense=1"], ("unknown key nonsense: known are",)),
        (["hydra.run.dir='~nobody-here/x'"], ("hydra.run.dir=~nobody-here/x: no home folder is known",)),
    ],
)
def test_what_hydra_rejects_is_one_sentence_too(program: Program, overrides: list[str], parts: tuple[str, ...]) -> None:
    assert_sentence(program(*overrides), *parts)
    assert list(program.folder.iterdir()) == []


@pytest.mark.parametrize("overrides", [["method.nonsense=1"], ["mask_ratio=2"], ["seed=~"], ["-m", "mask_ratio=0.1,2"]])
def test_the_traceback_can_still_be_had(program: Program, overrides: list[str]) -> None:
    ended = program(*overrides, *program.tiny, HYDRA_FULL_ERROR="1")
    assert ended.status == 1 and ended.stderr.startswith("Traceback")


def test_a_packed_checkpoint_takes_no_method(program: Program, tiny_run: Recorded) -> None:
    ended = program(f"model.path={tiny_run[1] / 'checkpoint'}", "method=rtn")
    assert_sentence(ended, "method=rtn", "already quantized")
    assert list(program.folder.iterdir()) == []


@pytest.mark.parametrize(
    ("overrides", "parts"),
    [
        ("calib.seq_len=600", ("calib.seq_len=600", "512")),
        ("eval.seq_len=600", ("eval.seq_len=600", "512")),
        ("calib.text_file=short.txt", ("calib.seq_len=64", "20")),
        ("eval.text_file=short.txt", ("eval.seq_len=64", "20")),
        ("eval.sample_prompt='<s>'", ("eval.sample_prompt='<s>'", "no token of text")),
        ("eval.sample_tokens=600", ("eval.sample_tokens=600", "at most 512 tokens", "at most 489")),
        ("model.path=small_vocab", ("has the token", "only 100 rows")),
        ("model.path=gptq", ("already quantized", "gptq")),
        ("model.path=gpt2", ("'gpt2'", "llama")),
        ("model.path=damaged", ("NaN", "model.layers.1.mlp.up_proj.weight")),
    ],
)
def test_what_model_and_text_show_ends_the_run_before_it_computes(
    program: Program, tiny_model_dir: Path, overrides: str, parts: tuple[str, ...]
) -> None:
    (program.folder / "short.txt").write_text("Only twenty letters.")
    folder = program.folder / overrides.partition("=")[2]
    if folder.name == "gptq":
        _edit_config(tiny_model_dir, folder, quantization_config={"quant_method": "gptq", "bits": 4, "group_size": 64})
    if folder.name == "small_vocab":
        _edit_config(tiny_model_dir, folder, vocab_size=100)
    if folder.name == "gpt2":
        _edit_config(tiny_model_dir, folder, model_type="gpt2", architectures=["GPT2LMHeadModel"])
    if folder.name == "damaged":
        _put_nan(tiny_model_dir, folder)
    ended = program(*program.tiny, overrides, "tracker=none", "hydra.run.dir=run")
    assert_sentence(ended, *parts)
    assert_failed(program.folder / "run", *parts)


def test_a_damaged_asset_names_file_and_checksum(program: Program) -> None:
    asset = ASSETS["smollm2_135m"]
    wheel = program.folder / "cache" / "wheels" / asset.wheel
    wheel.parent.mkdir(parents=True)
    wheel.write_bytes(b"damaged")
    cache = str(program.folder / "cache")
    ended = program("debug=smoke", "tracker=none", "hydra.run.dir=run", PTQ161_CACHE=cache)
    assert_sentence(ended, str(wheel), asset.sha256)
    assert_failed(program.folder / "run", asset.sha256)


def test_an_asset_without_network_says_what_to_do(program: Program) -> None:
    ended = program(
        "debug=smoke",
        "tracker=none",
        "hydra.run.dir=run",
        PTQ161_CACHE=str(program.folder / "cache"),
        PIP_INDEX_URL="http://127.0.0.1:9/simple",
        PIP_CONFIG_FILE="/dev/null",
        PIP_EXTRA_INDEX_URL=None,
        PIP_FIND_LINKS=None,
    )
    assert_sentence(ended, "pip could not fetch it", "model.path")
    assert_failed(program.folder / "run", "pip could not fetch it")


def test_an_unreachable_hub_is_said_at_once(program: Program) -> None:
    ended = program(
        "model=llama2_7b",
        "calib=wikitext2",
        "eval=paper",
        "tracker=none",
        "hydra.run.dir=run",
        HF_HUB_OFFLINE=None,
        HF_ENDPOINT="http://127.0.0.1:9",
        HF_HOME=str(program.folder / "hf"),
    )
    assert_sentence(ended, "meta-llama/Llama-2-7b-hf", "hub", "model=smollm2_135m", "model.path=FOLDER")
    assert_failed(program.folder / "run", "hub")
    manifest = read_run(program.folder / "run").manifest
    assert manifest["duration_seconds"] < 15  # the libraries' own retries alone take longer


@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGTERM])
def test_a_signal_ends_a_run_as_interrupted(program: Program, number: signal.Signals) -> None:
    process = program.start(*program.tiny, "method.epochs=1000000", "tracker=none", "hydra.run.dir=run")
    metrics = program.folder / "run" / "metrics.jsonl"
    deadline = time.monotonic() + SECONDS
    while not (metrics.exists() and '"loss"' in metrics.read_text()):
        assert process.poll() is None and time.monotonic() < deadline
        time.sleep(0.05)
    process.send_signal(number)
    _, stderr = process.communicate(timeout=SECONDS)
    assert process.returncode == 128 + number
    assert "Traceback" not in stderr and stderr.endswith(f"Interrupted ({number.name}).\n")
    run = read_run(program.folder / "run")
    assert (run.manifest["exit_state"], run.results) == ("interrupted", None)
    assert run.manifest["end"] is not None
    assert any(m["name"] == "loss" for m in run.metrics)


def assert_failed(run_dir: Path, *parts: str) -> None:
    """The record tells the same, and its log has the traceback."""
    run = read_run(run_dir)
    assert (run.manifest["exit_state"], run.results) == ("failed", None)
    for part in parts:
        assert part in run.manifest["exception"]["message"]
    assert "Traceback" in (run_dir / "run.log").read_text()
    assert not [m for m in run.metrics if m["name"] in ("loss", "output_error")]
    assert not (run_dir / "checkpoint").exists()


def _edit_config(source: Path, folder: Path, **changes: object) -> None:
    shutil.copytree(source, folder)
    config = json.loads((folder / "config.json").read_text())
    (folder / "config.json").write_text(json.dumps(config | changes))


def _put_nan(source: Path, folder: Path) -> None:
    shutil.copytree(source, folder)
    weights = load_file(folder / "model.safetensors")
    weights["model.layers.1.mlp.up_proj.weight"][3, 4] = torch.nan
    save_file(weights, folder / "model.safetensors", metadata={"format": "pt"})
