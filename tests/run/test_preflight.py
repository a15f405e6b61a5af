"""What is known of a run before anything is loaded: its paths, and the files that they name."""

from __future__ import annotations

import os
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from omegaconf import DictConfig, OmegaConf
from transformers import PreTrainedTokenizerFast

import ptq161
from ptq161.errors import UserError
from ptq161.run.contents import identity
from ptq161.run.preflight import checked_config, make_paths_absolute, name_local_model
from tests.conftest import _tiny_model
from tests.run.test_config import COMPLETE


@pytest.fixture
def typed_in(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, tiny_model_dir: Path) -> Path:
    """A folder with a model and texts; it is home, and the folder in which commands are typed."""
    (tmp_path / "model").symlink_to(tiny_model_dir)
    for name in ("calib", "eval", "train"):
        (tmp_path / f"{name}.txt").write_text(f"Text for {name}.")
    monkeypatch.setenv("HOME", str(tmp_path))
    monkeypatch.chdir(tmp_path)
    return tmp_path


def composed(model: str = "model", calib: str = "calib.txt", scored: str = "eval.txt", **more: Any) -> DictConfig:
    changes = {
        "model.path": model,
        "calib": {"name": "text_file", "text_file": calib, "n_samples": 4, "seq_len": 16},
        "eval.corpora": ["text_file"],
        "eval.text_file": scored,
        **more,
    }
    cfg = OmegaConf.create(COMPLETE)
    for key, value in changes.items():
        OmegaConf.update(cfg, key, value, force_add=True)
    return cfg


@pytest.mark.parametrize(
    "spell", [lambda name: name, lambda name: f"~/{name}", os.path.abspath, lambda n: f"./x/../{n}"]
)
def test_every_spelling_is_one_absolute_path_and_one_identity(typed_in: Path, spell: Callable[[str], str]) -> None:
    (typed_in / "x").mkdir()
    plain, spelled = composed(), composed(spell("model"), spell("calib.txt"), spell("eval.txt"))
    make_paths_absolute(plain, typed_in)
    make_paths_absolute(spelled, typed_in)
    wanted = identity(checked_config(plain, []))
    os.chdir("/")  # as a job with hydra.job.chdir=true
    for path in (spelled.model.path, spelled.calib.text_file, spelled.eval.text_file):
        assert os.path.isabs(path) and os.path.exists(path)
    assert identity(checked_config(spelled, [])) == wanted
    name_local_model(spelled, [])
    assert spelled.model.name == "model"


@pytest.mark.parametrize(
    ("group", "settings", "sentence"),
    [
        ("method", {"name": "none"}, "method=none quantizes nothing: choose a method, or 16."),
        (
            "finetune",
            {"_target_": "ptq161.finetune.distillation.Distillation", "name": "scales"},
            "finetuning trains with embeddings as they are: set finetune=none, or 16.",
        ),
    ],
)
def test_embeddings_are_quantized_with_the_linears_alone(
    typed_in: Path, group: str, settings: dict[str, Any], sentence: str
) -> None:
    cfg = composed(**{"model.embedding_bits": 8})
    one, other = (identity(checked_config(found, [])) for found in (cfg, composed()))
    assert one != other and one["model"] == other["model"]
    cfg[group] = settings
    with pytest.raises(UserError) as caught:
        checked_config(cfg, [])
    assert str(caught.value) == f"model.embedding_bits=8: {sentence}"


@pytest.mark.parametrize(("path", "name"), [(".", "model"), ("..", "typed"), ("x/..", "model")])
def test_a_model_is_named_after_its_folder(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, path: str, name: str
) -> None:
    folder = tmp_path / "typed" / "model"
    folder.mkdir(parents=True)
    monkeypatch.chdir(folder)
    cfg = composed(path)
    make_paths_absolute(cfg)
    name_local_model(cfg, [])
    assert cfg.model.name == name


def test_an_interpolated_path(typed_in: Path) -> None:
    cfg = composed(scored="${calib.text_file}")
    make_paths_absolute(cfg, typed_in)
    assert cfg.eval.text_file == cfg.calib.text_file == str(typed_in / "calib.txt")


def test_what_is_no_path_is_left_to_the_schema(typed_in: Path) -> None:
    cfg = composed(scored="${nothing}", model=7)
    make_paths_absolute(cfg, typed_in)
    assert cfg.model.path == 7
    with pytest.raises(UserError, match=r"cannot be resolved"):
        checked_config(cfg, [])


@pytest.mark.parametrize("key", ["model", "calib", "scored"])
def test_an_unknown_home(typed_in: Path, key: str) -> None:
    with pytest.raises(UserError, match=r"=~nobody-here/x: no home folder is known for ~nobody-here"):
        make_paths_absolute(composed(**{key: "~nobody-here/x"}), typed_in)


def test_a_missing_text_is_said_with_the_path_that_was_looked_at(typed_in: Path) -> None:
    cfg = composed(calib="nowhere.txt")
    make_paths_absolute(cfg, typed_in)
    with pytest.raises(UserError, match=rf"^calib\.text_file={typed_in}/nowhere\.txt: there is no such file; .*\.$"):
        checked_config(cfg, [])


def test_a_training_text_is_not_the_scored_one(typed_in: Path) -> None:
    (typed_in / "link.txt").symlink_to("eval.txt")
    preprocess = {
        "_target_": "ptq161.preprocess.restoration.Restoration",
        "name": "restorative_lora",
        "corpora": ["text_file"],
        "compute_dtype": "float32",
    }
    for text, refused in (("train.txt", False), ("link.txt", True), ("~/eval.txt", True)):
        cfg = composed(preprocess={**preprocess, "text_file": text})
        make_paths_absolute(cfg, typed_in)
        if refused:
            with pytest.raises(UserError, match=r"is the file of eval\.text_file as well"):
                checked_config(cfg, [])
        else:
            assert checked_config(cfg, []).preprocess is not None


def test_adapters_need_a_quantized_model(typed_in: Path, tiny_tokenizer: PreTrainedTokenizerFast) -> None:
    """A method, or a packed checkpoint, to which no other part of the quantization may be given."""
    tuning = {
        "_target_": "ptq161.finetune.tuning.Tuning",
        "name": "gsq_tuning",
        "text_file": "train.txt",
        "compute_dtype": "float32",
    }
    cfg = composed(finetune=tuning)
    assert checked_config(cfg, ["finetune=gsq_tuning"]).finetune is not None
    none = OmegaConf.merge(cfg, {"method": {"name": "none"}})
    none.method = {"name": "none"}
    with pytest.raises(UserError, match=r"^finetune=gsq_tuning: method=none quantizes nothing; choose a method"):
        checked_config(none, [])
    packed = ptq161.quantize(_tiny_model("llama"), torch.zeros(1, 8, dtype=torch.int64), ptq161.RTN())
    ptq161.save(packed, tiny_tokenizer, "packed")
    for stored in (composed("packed", finetune=tuning), OmegaConf.merge(none, {"model": {"path": "packed"}})):
        config = checked_config(stored, ["finetune=gsq_tuning", "finetune.rank=4"])
        assert config.finetune is not None and config.finetune.corpora_read == ["text_file"]
        found = identity(config)
        assert found["method"] is None and found["finetune"]["rank"] == 64 and found["seed"] == 0
    with pytest.raises(UserError, match=r"^method=rtn: the model .* is already quantized"):
        checked_config(composed("packed", finetune=tuning), ["finetune=gsq_tuning", "method=rtn"])
    with pytest.raises(UserError, match=r"^finetune=scales: the model .* is already quantized"):
        checked_config(composed("packed"), ["finetune=scales"])
    assert identity(checked_config(composed("packed"), []))["seed"] is None
