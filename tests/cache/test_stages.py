"""Runs of the pipeline in one process: nothing twice, and whole records whatever was reused."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
from transformers import PreTrainedModel

from ptq161.cache.store import stored_entries
from ptq161.errors import UserError
from ptq161.files.hashing import sha256_of_tensors
from ptq161.models.loading import load_weights
from ptq161.run import stages
from ptq161.tracking.read import read_run
from tests.cache.runs import Run, model_files, plain, scores


@pytest.fixture
def loaded(monkeypatch: pytest.MonkeyPatch) -> list[str]:
    """A line for every model that is loaded: whatever is computed needs one."""
    names: list[str] = []

    def watch(config: Any) -> PreTrainedModel:
        names.append(config.name)
        return load_weights(config)

    monkeypatch.setattr(stages, "load_weights", watch)
    return names


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
