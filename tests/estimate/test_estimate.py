"""The command, the benchmark of seconds, and the run that cannot fit."""

import dataclasses
import json
from pathlib import Path

import pytest
import torch
from transformers import LlamaConfig

import ptq161
from ptq161.data.settings import CalibConfig
from ptq161.errors import UserError
from ptq161.estimate import predict, timing
from ptq161.estimate.__main__ import composed, main
from ptq161.estimate.predict import MEMORY_VARIABLE, available_memory, check_fits
from ptq161.estimate.shapes import empty_model, shape_of
from ptq161.evaluation.settings import EvalConfig
from ptq161.sweep import app

CPU = torch.device("cpu")
TINY = ["method=rtn", "tracker=none", "dtype=float32", "device=cpu", "eval.tasks=[]", "calib.seq_len=64"]


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    """A folder that holds the config of a model, and no weights."""
    sizes = {"hidden_size": 64, "intermediate_size": 96, "num_attention_heads": 4, "vocab_size": 64}
    LlamaConfig(num_hidden_layers=2, max_position_embeddings=512, dtype="float32", **sizes).save_pretrained(tmp_path)
    return tmp_path


def test_the_command_prints_json(folder, capsys):
    assert main([*TINY, f"model.path={folder}", "--json", "--no-time"]) == 0
    found = json.loads(capsys.readouterr().out)
    assert found["predicted"] is True
    assert found["method"] == "rtn"
    assert found["seconds"] is None
    assert list(found["phases"]) == ["load", "full precision", "quantize", "save", "quantized"]
    assert found["host_bytes"] == found["process_bytes"] + max(phase["host"] for phase in found["phases"].values())
    assert found["device_bytes"] == 0
    sizes = found["sizes"]
    assert found["disk_bytes"] == sizes["checkpoint_bytes"] + sizes["linear_bytes"]
    assert sizes["bits_per_weight"] > sizes["nominal_bits_per_weight"] == 2


def test_the_command_prints_a_table(folder, capsys):
    assert main([*TINY, f"model.path={folder}", "--no-time", "eval.tasks=[piqa]", "finetune=scales"]) == 0
    printed = capsys.readouterr().out
    for part in (
        "Predicted: rtn on",
        "peak memory",
        "quantized",
        "2 nominal",
        "eval.tasks:",
        "finetune: memory and time",
    ):
        assert part in printed


def test_memory_as_on_a_gpu(folder, capsys):
    assert main([*TINY, f"model.path={folder}", "--json", "--gpu"]) == 0
    found = json.loads(capsys.readouterr().out)
    assert (found["device"], found["seconds"]) == ("cuda", None)
    assert 0 < found["device_bytes"] < found["host_bytes"]


def test_a_run_without_a_method_has_no_sizes(folder):
    found = predict.estimate(composed([*TINY, f"model.path={folder}", "method=none"]), measure_time=False)
    assert (found.sizes, list(found.memory)) == (None, ["load", "full precision"])


@pytest.mark.parametrize(
    ("settings", "sentence"),
    [
        (["method=rtm"], "method=rtm: there is no such option"),
        (["method.bits=5"], "method.bits=5: use one of 2, 3, 4, 8."),
        (["model.path=absent"], "no config.json is there"),
        (["model=llama2_7b", "model.repo=nobody/nothing"], "cannot be loaded from the Hugging Face hub"),
    ],
)
def test_bad_settings_take_one_sentence(settings, sentence, capsys):
    assert main(["method=rtn", "--no-time", *settings]) == 1
    error = capsys.readouterr().err
    assert sentence in error
    assert len(error.splitlines()) == 1


def test_a_packed_model_is_not_estimated(tiny_model, tiny_tokenizer, tmp_path, capsys):
    model = ptq161.quantize(tiny_model("llama"), torch.arange(8).view(2, 4), ptq161.RTN(bits=2))
    ptq161.save(model, tiny_tokenizer, tmp_path / "packed")
    assert main([f"model.path={tmp_path / 'packed'}", "--no-time"]) == 1
    assert "the model is quantized already" in capsys.readouterr().err


def test_a_run_that_cannot_fit_says_so_first(folder, monkeypatch, capsys):
    config = composed([*TINY, f"model.path={folder}"])
    check_fits(config)
    monkeypatch.setenv(MEMORY_VARIABLE, "1e5")
    with pytest.raises(UserError, match=r"does not fit: its phase '[a-z ]*' is predicted to take .* GB of host memory"):
        check_fits(config)
    # The folder has neither weights nor a tokenizer: nothing of it was loaded.
    monkeypatch.chdir(folder)
    assert app.main([*TINY, f"model.path={folder}"]) == 1
    assert "the run does not fit" in capsys.readouterr().err


def test_a_model_that_cannot_be_read_is_left_to_the_run(folder):
    config = composed([*TINY, f"model.path={folder}"])
    (folder / "config.json").write_text("{}")
    check_fits(config)


def test_available_memory(monkeypatch, tmp_path):
    assert 0 < available_memory(CPU).host < 1e15
    monkeypatch.setenv(MEMORY_VARIABLE, "2e9")
    assert available_memory(CPU).host == 2e9
    monkeypatch.setenv(MEMORY_VARIABLE, "much")
    with pytest.raises(UserError, match=r"PTQ161_MEMORY=much: use a number of bytes"):
        available_memory(CPU)
    assert predict._left_in_cgroup(tmp_path) == float("inf")
    for name, content in (("max", "1000"), ("current", "700"), ("stat", "anon 5\ninactive_file 200")):
        (tmp_path / f"memory.{name}").write_text(content)
    assert predict._left_in_cgroup(tmp_path) == 500
    (tmp_path / "memory.max").write_text("max\n")
    assert predict._left_in_cgroup(tmp_path) == float("inf")


def seconds(folder: Path, method, **calib: int) -> timing.Seconds:
    model = empty_model(composed([*TINY, f"model.path={folder}"]).model)
    evaluation = EvalConfig(name="x", corpora=["boolq"], seq_len=16, tasks=[], max_windows=3)
    settings = CalibConfig("squad", **{"n_samples": 4, "seq_len": 16, **calib})
    return timing.run_seconds(
        model.config, shape_of(model), method, settings, evaluation, dtype=torch.float32, device=CPU
    )


def test_seconds_of_a_small_model(folder):
    found = seconds(folder, ptq161.Waterfill(epochs=2, batch_size=1))
    assert 0 < found.quantize < 60
    assert 0 < found.evaluate < 60


def test_a_large_block_is_measured_at_smaller_widths(folder, monkeypatch):
    monkeypatch.setattr(timing, "_LARGEST_BLOCK", 1e4)  # of 35,000 weights
    assert 0 < seconds(folder, ptq161.RTN(bits=2)).quantize < 60
    monkeypatch.setattr(timing, "_LARGEST_BLOCK", 1e2)
    with pytest.raises(UserError, match="cannot be measured in seconds: it is no multiple of 64"):
        seconds(folder, ptq161.RTN(bits=2))


def test_steps_are_counted_by_epochs_and_by_batches():
    method = ptq161.PTQ161(epochs=3, batch_size=4)
    assert timing._steps(method, 10) == 9
    assert timing._steps(dataclasses.replace(method, epochs=0), 10) == 0
    assert timing._steps(ptq161.QDrop(steps=50), 10) == 50
    assert timing._steps(ptq161.RTN(), 10) == 0
    # Of 32 windows two batches of one are held out: scored before the first epoch, and after each.
    assert timing._steps(ptq161.Waterfill(epochs=2, batch_size=1), 32) == pytest.approx(2 * 30 + 3 * 2 / 3)


def test_a_method_of_the_users_own_is_left_to_the_run(folder, monkeypatch):
    class Own:
        compute_dtype, batch_size, block_size, needs_full_chain = "float32", 1, 1, False

    config = dataclasses.replace(composed([*TINY, f"model.path={folder}"]), method=Own())
    monkeypatch.setenv(MEMORY_VARIABLE, "1")
    check_fits(config)
    with pytest.raises(UserError, match="the sizes of Own are not known before it is run"):
        predict.estimate(config, measure_time=False)
