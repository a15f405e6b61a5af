"""Runs of the pipeline in one process: nothing twice, killed runs go on, and whole records whatever was reused."""

from __future__ import annotations

import functools
import json
import multiprocessing
import os
import random
import shutil
import signal
import threading
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from hydra import compose, initialize_config_dir
from omegaconf import OmegaConf
from tqdm import tqdm
from transformers import PreTrainedModel

from ptq161.cache.store import Store, stored_entries
from ptq161.errors import UserError
from ptq161.files.hashing import sha256_of_file, sha256_of_tensors
from ptq161.models.loading import load_weights
from ptq161.run import pipeline, stages
from ptq161.run.config import load_run_config
from ptq161.run.contents import identity
from ptq161.run.session import RunContext
from ptq161.tracking.read import RunData, read_run
from ptq161.tracking.record import RunRecord
from tests.conftest import _tiny_tokenizer

CONF = str(Path(__file__).resolve().parents[2] / "conf")
FORK = multiprocessing.get_context("fork")
Run = Callable[..., RunData]


@pytest.fixture(scope="module")
def model_dir(tmp_path_factory: pytest.TempPathFactory) -> Path:
    from tests.conftest import _tiny_model

    folder = tmp_path_factory.mktemp("model")
    _tiny_model("llama", n_blocks=3).save_pretrained(folder)
    _tiny_tokenizer().save_pretrained(folder)
    return folder


@pytest.fixture
def settings(model_dir: Path, tmp_path: Path) -> list[str]:
    text = tmp_path / "text.txt"
    text.write_text("".join(f"Line {i}: {i**2} squares and {i**3} cubes. " for i in range(200)))
    return [
        f"model.path={model_dir}",
        "calib=text_file",
        f"calib.text_file={text}",
        "calib.n_samples=4",
        "calib.seq_len=32",
        "eval=ppl",
        "eval.corpora=[text_file]",
        f"eval.text_file={text}",
        "eval.seq_len=32",
        "eval.max_windows=4",
        "eval.sample_tokens=2",
        "method.epochs=1",
        "tracker=none",
        "device=cpu",
        "dtype=float32",
    ]


@pytest.fixture
def run(settings: list[str], tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Run:
    """Run the pipeline in ``tmp_path/NAME`` with further overrides, and read its record."""
    monkeypatch.setenv("PTQ161_STORE", str(tmp_path / "store"))

    def run(name: str, *overrides: str) -> RunData:
        return read_run(execute([*settings, *overrides], tmp_path / name))

    return run


def execute(overrides: list[str], run_dir: Path) -> Path:
    if any(override.startswith("method=") for override in overrides):
        overrides = [override for override in overrides if override != "method.epochs=1"]
    with initialize_config_dir(CONF, version_base="1.3"):
        cfg = compose("config", overrides)
    resolved: Any = OmegaConf.to_container(cfg, resolve=True)
    pipeline.run(load_run_config(cfg), RunContext(str(run_dir), resolved, overrides, run_dir.name))
    return run_dir


@pytest.fixture
def loaded(monkeypatch: pytest.MonkeyPatch) -> list[str]:
    """A line for every model that is loaded: whatever is computed needs one."""
    names: list[str] = []

    def watch(config: Any) -> PreTrainedModel:
        names.append(config.name)
        return load_weights(config)

    monkeypatch.setattr(stages, "load_weights", watch)
    return names


def plain(metrics: list[dict[str, Any]]) -> list[dict[str, Any]]:
    """Numbers without when they arose and how long they took."""
    return [{k: v for k, v in m.items() if k != "time"} for m in metrics if m["name"] != "seconds"]


def model_files(run: RunData) -> dict[str, str]:
    return {path.name: sha256_of_file(path) for path in (run.run_dir / "checkpoint").iterdir()}


def scores(run: RunData) -> dict[str, Any]:
    assert run.results is not None and run.problems == []
    assert run.manifest["exit_state"] == "finished"
    return {key: run.results[key] for key in ("metrics", "full_precision", "protocol")}


# nothing twice


def test_the_same_run_is_found_with_its_whole_record(run: Run, loaded: list[str]) -> None:
    first, again = run("first"), run("again", "model.name=other", "eval.name=mine")
    assert len(loaded) == 1
    assert again.results == first.results
    assert again.metrics == first.metrics and again.samples == first.samples
    assert model_files(again) == model_files(first)
    assert (again.config["model"]["name"], first.config["model"]["name"]) == ("other", first.config["model"]["name"])
    assert {p.name for p in again.run_dir.iterdir()} == {p.name for p in first.run_dir.iterdir()}
    origin = again.manifest["reused_from"]
    assert origin["run_dir"] == str(first.run_dir) and origin["start"] == first.manifest["start"]
    assert "reused_from" not in first.manifest
    assert again.manifest["identity"] == first.manifest["identity"] and set(first.manifest["text_files"]) == {"calib"}
    assert again.manifest["start"] > first.manifest["end"]
    for key in (
        "model_sha256",
        "calibration_sha256",
        "checkpoint_sha256",
        "text_files",
        "threads",
        "hardware",
        "device",
    ):
        assert again.manifest[key] == first.manifest[key]
    # The weights are on the disk once, for both records and the store.
    assert (again.run_dir / "checkpoint" / "packed.safetensors").stat().st_nlink in (1, 3)  # 1: cloned


def test_keys_that_a_method_does_not_read_do_not_count(run: Run, loaded: list[str]) -> None:
    first, second = run("1", "method=rtn", "mask_ratio=0.1"), run("2", "method=rtn", "mask_ratio=0.2")
    assert len(loaded) == 1 and scores(second) == scores(first)
    assert second.config["mask_ratio"] == 0.2
    none = run("3", "method=none"), run("4", "method=none", "seed=1", "calib.n_samples=3", "mask_ratio=0.3")
    assert len(loaded) == 2 and scores(none[0]) == scores(none[1])
    assert none[1].manifest["seeds"] == {"seed": 1}


def test_full_precision_is_scored_once_for_all_runs(
    run: Run, loaded: list[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    evaluated: list[str] = []
    import ptq161.evaluation.protocol as protocol

    original = protocol.perplexity

    def watch(*args: Any, **kwargs: Any) -> Any:
        evaluated.append(kwargs["progress"].partition(":")[0])
        return original(*args, **kwargs)

    monkeypatch.setattr(protocol, "perplexity", watch)
    runs = [run(str(ratio), f"mask_ratio={ratio}") for ratio in (0.1, 0.2, 0.3)]
    assert evaluated == ["full precision", "quantized", "quantized", "quantized"]
    full = [scores(found)["full_precision"] for found in runs]
    assert full[0] == full[1] == full[2]
    assert len({str(scores(found)["metrics"]) for found in runs}) == 3
    # The whole record holds what was found as well.
    assert len({json.dumps([m for m in plain(r.metrics) if m.get("model") == "full precision"]) for r in runs}) == 1
    fresh = run("fresh", "mask_ratio=0.1", "cache=false")
    assert scores(fresh) == scores(runs[0]) and plain(fresh.metrics) == plain(runs[0].metrics)


def test_another_evaluation_takes_the_quantized_blocks(run: Run, monkeypatch: pytest.MonkeyPatch) -> None:
    first = run("first")
    monkeypatch.setattr("ptq161.driver.quantization.capture_inputs", lambda *_: pytest.fail("quantized again"))
    second = run("second", "eval.max_windows=3")
    assert model_files(second) == model_files(first)
    assert plain([m for m in second.metrics if "model" not in m]) == plain(
        [m for m in first.metrics if "model" not in m]
    )


def test_weights_are_hashed_once(run: Run, monkeypatch: pytest.MonkeyPatch) -> None:
    """Those that are loaded and those that are restored: blocks and scores are known by these."""
    hashed: list[int] = []

    def count(tensors: dict[str, Any]) -> str:
        if "model.embed_tokens.weight" in tensors:
            hashed.append(len(tensors))
        return sha256_of_tensors(tensors)

    for module in ("ptq161.run.stages", "ptq161.driver.resume", "ptq161.preprocess.rounds"):
        monkeypatch.setattr(f"{module}.sha256_of_tensors", count)
    training = ["preprocess=restorative_lora", "preprocess.steps=1", "preprocess.seq_len=32", "preprocess.batch_size=2"]
    text = run("plain").config["calib"]["text_file"]
    assert len(hashed) == 1
    training_text = Path(text).with_name("training.txt")
    training_text.write_text(Path(text).read_text())
    run("restored", *training, "preprocess.corpora=[text_file]", f"preprocess.text_file={training_text}")
    assert len(hashed) == 3


def test_force_computes_everything_again(run: Run, loaded: list[str], tmp_path: Path) -> None:
    first = run("first")
    files = [entry.folder / "fingerprint.json" for entry in stored_entries(tmp_path / "store")]
    made = [file.stat().st_mtime_ns for file in files]
    forced = run("forced", "force=true")
    assert len(loaded) == 2 and "reused_from" not in forced.manifest
    assert scores(forced) == scores(first) and model_files(forced) == model_files(first)
    assert len(files) > 5 and all(file.stat().st_mtime_ns > before for file, before in zip(files, made, strict=True))
    assert run("third").manifest["reused_from"]["run_dir"] == str(forced.run_dir)


def test_without_the_cache_nothing_is_read_or_written(run: Run, loaded: list[str], tmp_path: Path) -> None:
    first = run("first", "cache=false")
    assert not (tmp_path / "store").exists()
    run("kept")
    before = {path: path.stat().st_mtime_ns for path in (tmp_path / "store").rglob("*")}
    second = run("second", "cache=false")
    assert len(loaded) == 3 and "reused_from" not in second.manifest
    assert {path: path.stat().st_mtime_ns for path in (tmp_path / "store").rglob("*")} == before
    assert scores(first) == scores(second) and model_files(first) == model_files(second)


def test_a_packed_checkpoint_is_scored_once(run: Run) -> None:
    checkpoint = run("first").run_dir / "checkpoint"
    found = [run(name, f"model.path={checkpoint}") for name in ("a", "b")]
    assert scores(found[0]) == scores(found[1])
    assert found[1].manifest["reused_from"]["run_dir"] == str(found[0].run_dir)
    assert "method" not in found[1].config and not (found[1].run_dir / "checkpoint").exists()


def test_a_failed_run_is_computed_again(run: Run, loaded: list[str], monkeypatch: pytest.MonkeyPatch) -> None:
    def fail(*_: Any, **__: Any) -> None:
        raise UserError("no checkpoint.")

    with monkeypatch.context() as patched, pytest.raises(UserError):
        patched.setattr(stages, "save", fail)
        run("failed")
    assert "reused_from" not in run("again").manifest and len(loaded) == 2


# what may go wrong


@pytest.mark.parametrize("damage", ["weights", "results.json", "metrics.jsonl"])
def test_a_damaged_result_is_computed_again(damage: str, run: Run, tmp_path: Path, loaded: list[str]) -> None:
    first = run("first")
    (folder,) = (entry.folder for entry in stored_entries(tmp_path / "store") if entry.kind == "results")
    if damage == "weights":
        file = first.run_dir / "checkpoint" / "packed.safetensors"
        content = bytearray(file.read_bytes())
        content[-1] ^= 1
        file.write_bytes(content)  # in place, as a careless editor would, which changes the store's file as well
    else:
        (folder / damage).write_text((folder / damage).read_text()[:-20])
    second = run("second")
    assert len(loaded) == 2 and "reused_from" not in second.manifest
    assert scores(second) == scores(first)
    assert run("third").manifest["reused_from"]["run_dir"] == str(second.run_dir)
    assert len(loaded) == 2


def test_a_directory_that_is_used_again_leaves_other_records_alone(run: Run) -> None:
    first, shared = run("first"), run("shared")
    before = model_files(first)
    assert model_files(shared) == before
    assert model_files(run("shared", "mask_ratio=0.4")) != before
    assert model_files(first) == before == model_files(run("third"))


def test_a_result_that_cannot_be_kept_is_complete(
    run: Run, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    def full(*_: Any) -> None:
        raise OSError(28, "No space left on device")

    with monkeypatch.context() as patched:
        patched.setattr("ptq161.cache.results.shutil.copyfile", full)
        first = run("first")
    scores(first)
    assert "not stored for later runs" in caplog.text and "disk is full" in caplog.text
    assert "reused_from" not in run("second").manifest


def test_a_store_that_cannot_be_written_is_one_sentence(
    run: Run, monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    (tmp_path / "file").write_text("")
    monkeypatch.setenv("PTQ161_STORE", str(tmp_path / "file" / "store"))
    with pytest.raises(
        UserError, match=r"cannot be written \(Not a directory\); set the .* PTQ161_STORE .* cache=false"
    ):
        run("first")
    assert read_run(tmp_path / "first").manifest["exit_state"] == "failed"


# several processes, and kills


def start(overrides: list[str], run_dir: Path, before: Callable[[], None] = lambda: None) -> Any:
    """Run in another process, which first calls ``before``."""

    def child() -> None:
        os.dup2(os.open(os.devnull, os.O_WRONLY), 1)
        os.dup2(os.open(os.devnull, os.O_WRONLY), 2)
        # Bars of forked processes share a lock, which a killed one would never give back (as in the sweep's workers).
        tqdm.set_lock(threading.RLock())
        before()
        execute(overrides, run_dir)

    process = FORK.Process(target=child)
    process.start()
    return process


def kill_at(operation: int) -> None:
    """Let this process kill itself just before so many operations on files and numbers that are recorded."""
    left = iter(range(operation, 0, -1))

    def counted(function: Callable[..., Any]) -> Callable[..., Any]:
        def call(*args: Any, **kwargs: Any) -> Any:
            if next(left) == 1:
                os.kill(os.getpid(), signal.SIGKILL)
            return function(*args, **kwargs)

        return call

    for owner, name in [(os, "fsync"), (os, "replace"), (os, "rename"), (os, "link"), (RunRecord, "metric")]:
        setattr(owner, name, counted(getattr(owner, name)))


def test_parallel_runs_compute_once(run: Run, settings: list[str], tmp_path: Path) -> None:
    processes = [start(settings, tmp_path / str(i)) for i in range(3)]
    for process in processes:
        process.join(120)
    assert [process.exitcode for process in processes] == [0, 0, 0]
    runs = [read_run(tmp_path / str(i)) for i in range(3)]
    assert [r.manifest.get("reused_from") is not None for r in runs].count(False) == 1
    assert len({json.dumps(scores(r)) for r in runs}) == len({str(model_files(r)) for r in runs}) == 1


def assert_never_interrupted(found: RunData, whole: RunData) -> None:
    """What ``found`` holds is what ``whole`` does, byte for byte but for times."""
    assert model_files(found) == model_files(whole)
    assert scores(found) == scores(whole)
    assert plain(found.metrics) == plain(whole.metrics)
    assert [s["text"] for s in found.samples] == [s["text"] for s in whole.samples]


def test_killed_at_random_operations_until_it_is_finished(run: Run, settings: list[str], tmp_path: Path) -> None:
    whole, moments, killed = run("whole", "cache=false"), random.Random(0), 0
    while True:
        # Later and later, so that it comes to an end.
        operation = moments.randint(1, 40 + 10 * killed)
        process = start(settings, tmp_path / f"attempt{killed}", functools.partial(kill_at, operation))
        process.join(120)
        if process.exitcode != -signal.SIGKILL:
            break
        killed += 1
    assert killed >= 10
    found = read_run(tmp_path / f"attempt{killed}")
    assert_never_interrupted(found, whole)
    assert all(entry.finished for entry in stored_entries(tmp_path / "store"))


def test_killed_at_random_times_until_it_is_finished(run: Run, settings: list[str], tmp_path: Path) -> None:
    whole, moments = run("whole", "cache=false"), random.Random(0)
    began = time.monotonic()
    start([*settings, "cache=false"], tmp_path / "timed").join(120)
    seconds = time.monotonic() - began
    for attempt in range(16):
        process = start(settings, tmp_path / f"attempt{attempt}")
        process.join(seconds * moments.uniform(0, 0.3 + attempt / 15) if attempt < 15 else 120)
        if process.exitcode is not None:
            break
        process.kill()
        process.join()
    assert process.exitcode == 0
    assert_never_interrupted(read_run(tmp_path / f"attempt{attempt}"), whole)
    assert all(entry.finished for entry in stored_entries(tmp_path / "store"))


# identities


def test_identity_is_content(settings: list[str], tmp_path: Path, model_dir: Path) -> None:
    def of(*overrides: str) -> dict[str, Any]:
        with initialize_config_dir(CONF, version_base="1.3"):
            return identity(load_run_config(compose("config", [*settings, *overrides])))

    base = of()
    copy, text = tmp_path / "copy", tmp_path / "other" / "text.txt"
    shutil.copytree(model_dir, copy)
    (copy / "README.md").write_text("no source")
    text.parent.mkdir()
    shutil.copy(tmp_path / "text.txt", text)
    same = [
        [f"model.path={copy}"],
        [f"calib.text_file={text}", f"eval.text_file={text}"],
        ["model.name=other", "eval.name=x", "on_error=stop", "force=true"],
        ["tracker=wandb", "tracker.project=x"],
        [
            "method=ptq161_paper",
            "method.epochs=1",
            "method.scale_lr=0.001",
            "method.angle_lr=0.01",
            "method.batch_size=4",
        ],
    ]
    for overrides in same:
        assert of(*overrides) == base, overrides
    different = [
        ["seed=1"],
        ["mask_ratio=0.3"],
        ["block_size=2"],
        ["method.epochs=2"],
        ["dtype=bfloat16"],
        ["calib.n_samples=3"],
        ["eval.max_windows=3"],
        ["eval.full_precision=false"],
        ["eval.tasks=[copa]"],
        ["model.n_blocks=1"],
        ["preprocess=restorative_lora"],
        ["preprocess=restorative_lora", "preprocess.steps=3"],
    ]
    found = [json.dumps(of(*overrides), sort_keys=True) for overrides in different]
    assert len({*found, json.dumps(base, sort_keys=True)}) == len(found) + 1
    json_file = copy / "config.json"
    json_file.write_text(json_file.read_text().replace("}", " }", 1))
    assert of(f"model.path={copy}") != base
    text.write_text(text.read_text() + "!")
    assert of(f"calib.text_file={text}")["calibration"] != base["calibration"]
    assert of(f"eval.text_file={text}")["evaluation"] != base["evaluation"]


def test_rtn_reads_no_mask_ratio_but_calibration_tokens() -> None:
    def of(*overrides: str) -> dict[str, Any]:
        with initialize_config_dir(CONF, version_base="1.3"):
            return identity(load_run_config(compose("config", ["device=cpu", "dtype=float32", *overrides])))

    assert of("method=rtn", "mask_ratio=0.1") == of("method=rtn", "mask_ratio=0.3")
    # The output errors in its record are measured on them.
    assert of("method=rtn", "calib.n_samples=3") != of("method=rtn")
    assert of("method=none", "calib.n_samples=3", "seed=4") == of("method=none")
    assert of("method=none", "eval.tasks=[piqa,copa]") == of("method=none", "eval.tasks=[copa,piqa]")
    assert of("method=none", "eval.full_precision=false") == of("method=none")


def test_a_model_of_the_hub_is_its_commit(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, model_dir: Path) -> None:
    import huggingface_hub

    cache = tmp_path / "hub"
    folder, commit = cache / "models--someone--tiny", "0123456789abcdef0123456789abcdef01234567"
    shutil.copytree(model_dir, folder / "snapshots" / commit)
    (folder / "refs").mkdir()
    (folder / "refs" / "main").write_text(commit)
    monkeypatch.setattr(huggingface_hub.constants, "HF_HUB_CACHE", str(cache))
    monkeypatch.setattr("transformers.utils.hub.constants.HF_HUB_CACHE", str(cache))
    from ptq161.models.settings import ModelConfig
    from ptq161.run.contents import _model_content

    assert _model_content(ModelConfig("tiny", repo="someone/tiny")) == {
        "repo": "someone/tiny",
        "commit": commit,
        "n_blocks": None,
    }
    with pytest.raises(UserError, match="cannot be loaded from the Hugging Face hub"):
        _model_content(ModelConfig("gone", repo="someone/gone"))


def test_large_files_are_hashed_once(
    settings: list[str], tmp_path: Path, monkeypatch: pytest.MonkeyPatch, model_dir: Path
) -> None:
    from ptq161.run import contents as module

    hashed: list[str] = []

    def watch(path: Path) -> str:
        hashed.append(path.name)
        return sha256_of_file(path)

    monkeypatch.setattr(module, "_REMEMBERED_BYTES", 10_000)
    monkeypatch.setattr(module, "sha256_of_file", watch)
    shutil.copytree(model_dir, tmp_path / "model")
    with initialize_config_dir(CONF, version_base="1.3"):
        config = load_run_config(compose("config", [*settings, f"model.path={tmp_path / 'model'}"]))
    store, found = Store(tmp_path / "store"), []
    for _ in range(2):
        found.append(identity(config, store))
    assert hashed.count("model.safetensors") == 1 and hashed.count("config.json") == 2
    assert found[0] == found[1] == identity(config)
    os.utime(tmp_path / "model" / "model.safetensors", ns=(0, 1))
    identity(config, store)
    assert hashed.count("model.safetensors") == 3
