"""Identities of stages: what decides whether a stored result may be used."""

from __future__ import annotations

import json
import os
import shutil
from pathlib import Path
from typing import Any

import pytest
from hydra import compose, initialize_config_dir

from ptq161.cache.store import Store
from ptq161.errors import UserError
from ptq161.files.hashing import sha256_of_file
from ptq161.run.config import load_run_config
from ptq161.run.contents import identity
from tests.cache.runs import CONF


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
