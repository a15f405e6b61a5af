"""A run whose full-precision model is never in memory against the same run that loads it."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from omegaconf import OmegaConf
from transformers import PreTrainedModel, PreTrainedTokenizerFast

import ptq161
from ptq161.driver import quantization
from ptq161.errors import UserError
from ptq161.run import pipeline, streaming
from ptq161.run.preflight import checked_config
from ptq161.run.session import RunContext
from ptq161.tracking.read import read_run
from tests.run.test_preflight import composed

RTN = {"_target_": "ptq161.methods.rtn.RTN", "name": "rtn", "bits": 3, "group_size": 16}
PTQ161 = {"_target_": "ptq161.methods.ptq161.PTQ161", "name": "ptq161", "epochs": 2, "compute_dtype": "${dtype}"}
PLAN = {"_target_": "ptq161.methods.waterfill.Waterfill", "name": "waterfill", "level": "model"}
LORA = {"_target_": "ptq161.preprocess.Restoration", "name": "lora", "corpora": ["squad"]}
SCALES = {"_target_": "ptq161.finetune.distillation.Distillation", "name": "scales"}
Run = Callable[..., dict[str, Any]]


@pytest.fixture
def texts(tmp_path: Path) -> list[str]:
    """Texts of the calibration and of the evaluation."""
    for name in ("calib", "scored"):
        (tmp_path / name).write_text(f"Some {name} text that is the same in every run. " * 40)
    return [str(tmp_path / name) for name in ("calib", "scored")]


@pytest.fixture
def run(
    tiny_model: Callable[..., PreTrainedModel],
    tiny_tokenizer: PreTrainedTokenizerFast,
    texts: list[str],
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
) -> Run:
    """Run on a tiny Llama of three blocks, into ``tmp_path/NAME`` and with a store of that name."""
    tiny_model("llama", n_blocks=3).bfloat16().save_pretrained(tmp_path / "model", max_shard_size="60KB")
    tiny_tokenizer.save_pretrained(tmp_path / "model")

    def run(name: str, method: dict[str, Any] = RTN, *, store: str | None = None, **changes: Any) -> dict[str, Any]:
        monkeypatch.setenv("PTQ161_STORE", str(tmp_path / f"store_{store or name}"))
        fixed: dict[str, Any] = {
            "eval.full_precision": False,
            "eval.tasks": [],
            "eval.max_windows": 6,
            "eval.batch_size": 4,
        }
        cfg = composed(str(tmp_path / "model"), texts[0], texts[1], **fixed, **changes)
        cfg.method = method
        resolved: Any = OmegaConf.to_container(cfg, resolve=True)
        return pipeline.run(checked_config(cfg, []), RunContext(str(tmp_path / name), resolved, [], name))

    return run


def assert_same_runs(tmp_path: Path, one: str, other: str) -> None:
    """Assert that two runs have the same checkpoint, byte for byte in every file, the same scores and metrics."""
    folders = [tmp_path / name / "checkpoint" for name in (one, other)]
    files = [{path.name: path.read_bytes() for path in folder.iterdir()} for folder in folders]
    assert files[0] == files[1] and "packed.safetensors" in files[0]
    records = [read_run(tmp_path / name) for name in (one, other)]
    results = [record.results or {} for record in records]
    for key in ("metrics", "full_precision", "protocol"):
        assert results[0][key] == results[1][key]
    assert any("/" in name for name in results[0]["metrics"])
    for key in ("model_sha256", "n_blocks", "checkpoint_sha256", "calibration_sha256", "identity"):
        assert records[0].manifest[key] == records[1].manifest[key]
    lines = [[*record.samples, *record.metrics] for record in records]
    timeless = [[{**line, "time": 0} for line in found if line["name"] != "seconds"] for found in lines]
    assert timeless[0] == timeless[1]


@pytest.mark.parametrize(
    ("method", "changes"),
    [
        (RTN, {"dtype": "bfloat16", "model.embedding_bits": 4}),
        (PTQ161, {"dtype": "float32", "model.n_blocks": 2}),
    ],
)
def test_a_streamed_run_has_the_bytes_and_the_scores_of_one_in_memory(
    run: Run, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, method: dict[str, Any], changes: dict[str, Any]
) -> None:
    run("memory", method, **changes)
    monkeypatch.setattr(pipeline, "load_model", lambda session: pytest.fail("the dense model is loaded"))
    results = run("streamed", method, **changes, **{"model.stream": True})
    assert results["peak_memory_bytes"] > 0
    assert results["metrics"].get("embedding_bits", 16) == changes.get("model.embedding_bits", 16)
    assert_same_runs(tmp_path, "memory", "streamed")


def test_a_packed_checkpoint_is_scored_from_its_bytes(
    run: Run, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    results = run("made", dtype="bfloat16")
    monkeypatch.setattr("ptq161.run.stages.dense_cache", lambda *_: pytest.fail("a dense copy is made"))
    path = {"model.path": str(tmp_path / "made" / "checkpoint"), "model.stream": True}
    again = run("again", dtype="bfloat16", **path)
    assert again["metrics"] == results["metrics"]


def test_blocks_that_were_finished_before_a_kill_are_not_quantized_again(
    run: Run, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    stream = {"model.stream": True}
    run("undisturbed", **stream)
    quantize_window, worked_on = ptq161.RTN.quantize_window, []

    def counted(self: ptq161.RTN, window: Any) -> Any:
        worked_on.append(window.first_block)
        if len(worked_on) == 3:
            raise KeyboardInterrupt
        return quantize_window(self, window)

    monkeypatch.setattr(ptq161.RTN, "quantize_window", counted)
    with pytest.raises(KeyboardInterrupt):
        run("killed", **stream)
    assert not (tmp_path / "killed" / "checkpoint").exists()
    run("killed", **stream)
    assert worked_on == [0, 1, 2, 2]
    assert_same_runs(tmp_path, "undisturbed", "killed")


def test_an_identical_run_in_memory_is_reused(run: Run, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    run("first")
    monkeypatch.setattr(streaming, "quantize_stored", lambda *_, **__: pytest.fail("it is computed again"))
    run("second", store="first", **{"model.stream": True})
    assert read_run(tmp_path / "second").manifest["reused_from"]["run_dir"] == str(tmp_path / "first")


@pytest.mark.parametrize(
    ("changes", "sentence"),
    [
        ({"method": {"name": "none"}}, "method=none quantizes nothing: set model.stream=false."),
        (
            {"model.path": None, "model.repo": "a/b"},
            "it reads a folder: get a/b from the hub, and give its folder as model.path.",
        ),
        ({"method": PLAN}, "method=waterfill plans for the whole model: set method.level=linear."),
        ({"preprocess": LORA}, "preprocess=lora trains the whole model: set preprocess=none."),
        (
            {"finetune": SCALES},
            "finetuning needs the whole model: set finetune=none, and finetune the checkpoint.",
        ),
        (
            {"eval.full_precision": True},
            "there is no whole model to score: set eval.full_precision=false.",
        ),
    ],
)
def test_what_needs_the_whole_model_is_refused_before_the_work(
    texts: list[str], tiny_model_dir: Path, changes: dict[str, Any], sentence: str
) -> None:
    method = changes.pop("method", RTN)
    cfg = composed(str(tiny_model_dir), *texts, **{"model.stream": True, "eval.full_precision": False, **changes})
    cfg.method = method
    with pytest.raises(UserError) as caught:
        checked_config(cfg, [])
    assert str(caught.value) == f"model.stream=true: {sentence}"


def test_a_model_whose_checkpoint_could_not_be_loaded_is_refused_before_the_work(
    run: Run, monkeypatch: pytest.MonkeyPatch
) -> None:
    class Own:
        own_code = True

    monkeypatch.setattr(streaming, "architecture_of", lambda model: Own)
    monkeypatch.setattr(quantization, "capture_inputs", lambda *_: pytest.fail("the work has begun"))
    with pytest.raises(UserError, match=r"^model\.stream=true: the packed checkpoint of a llama model, .* cannot be "):
        run("own", **{"model.stream": True})
