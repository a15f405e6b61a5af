"""The schema: every value of its type and in its range, and one sentence that names the setting where it is not."""

from __future__ import annotations

import copy
import dataclasses
from typing import Any

import pytest
import torch
from omegaconf import OmegaConf

from ptq161.data.settings import CALIBRATION_SETS, CORPORA, CalibConfig
from ptq161.errors import UserError
from ptq161.evaluation.settings import EvalConfig
from ptq161.methods.ptq161 import PTQ161
from ptq161.models.settings import ModelConfig
from ptq161.numerics import resolve_device, resolve_dtype
from ptq161.run.config import RunConfig, build, load_run_config
from ptq161.seeding import stage_generator
from ptq161.tracking.settings import TrackerConfig

COMPLETE: dict[str, Any] = {
    "mask_ratio": 0.2,
    "block_size": 1,
    "seed": 0,
    "device": "cpu",
    "dtype": "float32",
    "on_error": "continue",
    "cache": True,
    "force": False,
    "model": {"name": "m", "path": "folder"},
    "method": {
        "_target_": "ptq161.methods.ptq161.PTQ161",
        "name": "ptq161",
        "mask_ratio": "${mask_ratio}",
        "compute_dtype": "${dtype}",
    },
    "calib": {"name": "squad", "n_samples": 4, "seq_len": 16},
    "preprocess": {"name": "none"},
    "finetune": {"name": "none"},
    "eval": {"name": "quick", "corpora": ["boolq"], "seq_len": 16, "tasks": []},
    "tracker": {"name": "none"},
}


def load(**overrides: Any) -> RunConfig:
    """Load the complete configuration with changes by dotted keys."""
    cfg = OmegaConf.create(copy.deepcopy(COMPLETE))
    for key, value in overrides.items():
        OmegaConf.update(cfg, key, value, force_add=True)
    return load_run_config(cfg)


def refused(**overrides: Any) -> str:
    with pytest.raises(UserError) as caught:
        load(**overrides)
    sentence = str(caught.value)
    assert "\n" not in sentence and sentence.endswith(".")
    return sentence


def test_a_complete_configuration() -> None:
    config = load()
    assert config.method == PTQ161(mask_ratio=0.2, compute_dtype="float32")
    assert config.model == ModelConfig(name="m", path="folder")
    assert (config.method_name, config.device, config.dtype) == ("ptq161", torch.device("cpu"), "float32")
    assert config.dtype_reason == "as configured"
    assert config.tracker.tags == []


def test_groups_follow_the_top_level() -> None:
    config = load(mask_ratio=0.1, dtype="bfloat16")
    assert isinstance(config.method, PTQ161)
    assert (config.method.mask_ratio, config.method.compute_dtype) == (0.1, "bfloat16")


def test_auto_is_resolved() -> None:
    config = load(device="auto", dtype="auto")
    assert config.device.type in ("cpu", "cuda")
    assert config.dtype in ("float32", "bfloat16", "float16") and "support" in config.dtype_reason
    assert isinstance(config.method, PTQ161) and config.method.compute_dtype == config.dtype


def test_no_method_is_full_precision() -> None:
    cfg = OmegaConf.create(COMPLETE | {"method": {"name": "none"}})
    config = load_run_config(cfg)
    assert config.method is None and config.method_name == "none"
    cfg.method.bits = 2
    with pytest.raises(UserError, match=r"unknown key method\.bits: method=none has no settings\."):
        load_run_config(cfg)


def test_hydras_own_node_is_no_key() -> None:
    assert load(hydra={"job": {}}) == load()


def test_integers_are_floats_where_a_float_is_expected() -> None:
    config = load(mask_ratio=0, **{"method.scale_lr": 1})
    assert isinstance(config.method, PTQ161)
    assert type(config.method.scale_lr) is float and type(config.method.mask_ratio) is float


@pytest.mark.parametrize("key", sorted(COMPLETE))
def test_every_key_is_needed(key: str) -> None:
    # The method's interpolations would be what fails first.
    values = COMPLETE | {"method": {"name": "none"}}
    del values[key]
    with pytest.raises(UserError, match=rf"^{key} is not set\.$"):
        load_run_config(OmegaConf.create(values))


@pytest.mark.parametrize(
    ("overrides", "sentence"),
    [
        # the top level
        ({"mask_ratio": 1.0}, "mask_ratio=1.0: use a value in [0, 1), the share of salient input channels."),
        ({"mask_ratio": -0.1}, "mask_ratio=-0.1: use a value in [0, 1), the share of salient input channels."),
        ({"mask_ratio": float("nan")}, "mask_ratio=nan: use a finite number."),
        ({"mask_ratio": "a"}, "mask_ratio='a': use a value of type float."),
        ({"mask_ratio": True}, "mask_ratio=True: use a value of type float."),
        ({"mask_ratio": None}, "mask_ratio=None: use a value of type float."),
        ({"block_size": 0}, "block_size=0: use at least 1."),
        ({"block_size": 1.5}, "block_size=1.5: use a value of type int."),
        ({"block_size": False}, "block_size=False: use a value of type int."),
        ({"seed": -1}, "seed=-1: use at least 0."),
        ({"seed": "x"}, "seed='x': use a value of type int."),
        ({"dtype": "float64"}, "dtype=float64: use one of auto, float32, bfloat16, float16."),
        ({"dtype": None}, "dtype=None: use one of auto, float32, bfloat16, float16."),
        ({"on_error": "ignore"}, "on_error=ignore: use one of continue, stop."),
        ({"on_error": None}, "on_error=None: use one of continue, stop."),
        ({"cache": "yes"}, "cache='yes': use a value of type bool."),
        ({"force": 1}, "force=1: use a value of type bool."),
        ({"force": True, "cache": False}, "force=true cache=false: without the cache everything is computed anyway"),
        ({"device": "tpu"}, "device=tpu: use auto, cpu, cuda or cuda:N."),
        ({"device": "meta"}, "device=meta: use auto, cpu, cuda or cuda:N."),
        ({"device": None}, "device=None: use auto, cpu, cuda or cuda:N."),
        ({"device": ["cpu"]}, "device=['cpu']: use auto, cpu, cuda or cuda:N."),
        ({"device": "cuda:99"}, f"device=cuda:99: this machine has {torch.cuda.device_count()} GPUs that torch"),
        (
            {"color": 1},
            "unknown key 'color': known are model, method, calib, preprocess, finetune, eval, tracker, seed, device, "
            "dtype, cache, force, mask_ratio, block_size, on_error.",
        ),
        # what follows from others cannot be set
        ({"method_name": "x"}, "unknown key 'method_name': known are"),
        ({"dtype_reason": "x"}, "unknown key 'dtype_reason': known are"),
        # the groups
        ({"model.path": None}, "model=m has no source: set model.path, model.asset or model.repo."),
        ({"model.n_blocks": 0}, "model.n_blocks=0: use at least 1."),
        ({"model.embedding_bits": 5}, "model.embedding_bits=5: use one of 16, 8, 4."),
        ({"model.n_blocks": "two"}, "model.n_blocks='two': use a value of type int or null."),
        ({"model.name": "???"}, "the configuration cannot be resolved: "),
        ({"model.path": "${nowhere}"}, "the configuration cannot be resolved: "),
        (
            {"model.size": 7},
            "unknown key model.size: known are name, path, asset, repo, revision, n_blocks, trust_remote_code, stream, "
            "embedding_bits.",
        ),
        (
            {"calib.name": "enwik8"},
            "calib.name=enwik8: use one of squad, drop, coqa, passages, wikitext2, c4, ptb, redpajama, text_file.",
        ),
        ({"calib.name": "text_file"}, "calib=text_file needs a file: set calib.text_file=FILE."),
        ({"calib.n_samples": 0}, "calib.n_samples=0: use at least 1."),
        ({"calib.n_samples": None}, "calib.n_samples=None: use a value of type int."),
        ({"calib.seq_len": 1}, "calib.seq_len=1: use at least 2."),
        (
            {"calib.seqlen": 16},
            "unknown key calib.seqlen: known are name, n_samples, seq_len, text_file, masking, mask_token, "
            "masking_prefix.",
        ),
        ({"calib.masking": "cosine"}, "calib.masking=cosine: use one of none, linear."),
        (
            {"calib.masking": "linear"},
            "calib.masking=linear needs the id of the model's mask token: set calib.mask_token=ID.",
        ),
        ({"calib.masking": "linear", "calib.mask_token": -1}, "calib.mask_token=-1: use at least 0."),
        (
            {"calib.masking_prefix": 1.0},
            "calib.masking_prefix=1.0: use a value in [0, 1), the share that is never masked.",
        ),
        ({"preprocess.name": "lora"}, "preprocess.name=lora: use one of none."),
        ({"eval.corpora": ["enwik8"]}, "eval.corpora=enwik8: use one of boolq,"),
        ({"eval.corpora": "boolq"}, "eval.corpora='boolq': use a value of type list."),
        ({"eval.corpora": [1]}, "eval.corpora=1: use a value of type str."),
        ({"eval.corpora": ["text_file"]}, "eval.corpora=[text_file] needs a file: set eval.text_file=FILE."),
        ({"eval.seq_len": 1}, "eval.seq_len=1: use at least 2."),
        ({"eval.max_windows": 0}, "eval.max_windows=0: use at least 1."),
        ({"eval.limit": 0}, "eval.limit=0: use at least 1."),
        ({"eval.limit": 0.5}, "eval.limit=0.5: use a value of type int or null."),
        ({"eval.batch_size": 0}, "eval.batch_size=0: use at least 1."),
        ({"eval.sample_tokens": 0}, "eval.sample_tokens=0: use at least 1."),
        ({"eval.full_precision": "yes"}, "eval.full_precision='yes': use a value of type bool."),
        ({"eval.full_precision": 1}, "eval.full_precision=1: use a value of type bool."),
        ({"tracker.name": "mlflow"}, "tracker.name=mlflow: use one of wandb, none."),
        ({"tracker.mode": "dryrun"}, "tracker.mode=dryrun: use one of auto, online, offline."),
        ({"tracker.tags": "a"}, "tracker.tags='a': use a value of type list."),
        # the method
        ({"method.epochs": -1}, "method.epochs=-1: use at least 0."),
        ({"method.epochs": 1.0}, "method.epochs=1.0: use a value of type int."),
        ({"method.scale_lr": float("inf")}, "method.scale_lr=inf: use a finite number."),
        ({"method.learn_scale": "no"}, "method.learn_scale='no': use a value of type bool."),
        ({"method.salient_bits": 1}, "method.salient_bits=1: use one of 2, 3, 4, 8."),
        ({"method.saliency": "median"}, "method.saliency=median: use one of max, mean, hessian, magnitude, random."),
        ({"method.compute_dtype": "float64"}, "method.compute_dtype=float64: use one of float32, bfloat16, float16."),
        ({"method.lr": 0.1}, "unknown key method.lr: known are mask_ratio, epochs, scale_lr,"),
    ],
    ids=str,
)
def test_one_sentence_names_the_setting(overrides: dict[str, Any], sentence: str) -> None:
    refusal = refused(**overrides)
    assert refusal == sentence or (not sentence.endswith(".") and refusal.startswith(sentence))


@pytest.mark.parametrize(
    ("cls", "required"),
    [
        (ModelConfig, ["name"]),
        (CalibConfig, ["n_samples", "name", "seq_len"]),
        (EvalConfig, ["corpora", "name", "seq_len", "tasks"]),
        (TrackerConfig, ["name"]),
    ],
)
def test_what_has_no_default_must_be_set(cls: type[Any], required: list[str]) -> None:
    group = {ModelConfig: "model", CalibConfig: "calib", EvalConfig: "eval"}.get(cls, cls.__name__[:-6].lower())
    for key in required:
        values = {k: v for k, v in COMPLETE[group].items() if k != key}
        with pytest.raises(UserError, match=rf"^{group}\.{key} is not set\.$"):
            build(cls, values, group)
    build(cls, COMPLETE[group], group)


def test_the_choices_are_accepted() -> None:
    for name in CALIBRATION_SETS:
        assert load(**{"calib.name": name, "calib.text_file": "f"}).calib.name == name
    assert load(**{"eval.corpora": list(CORPORA), "eval.text_file": "f"}).eval.corpora == list(CORPORA)


def test_configurations_are_frozen() -> None:
    config = load()
    for part in (config, config.model, config.calib, config.eval, config.tracker):
        with pytest.raises(dataclasses.FrozenInstanceError):
            part.name = "x"


def test_an_empty_source_is_none() -> None:
    with pytest.raises(UserError, match="model=m has no source"):
        ModelConfig(name="m", path="", asset="", repo="")


# device, dtype, seeds


def test_devices() -> None:
    assert resolve_device("cpu") == torch.device("cpu")
    assert resolve_device("auto").type == ("cuda" if torch.cuda.is_available() else "cpu")


def test_dtypes(monkeypatch: pytest.MonkeyPatch) -> None:
    cpu, gpu = torch.device("cpu"), torch.device("cuda")
    assert resolve_dtype("float16", cpu) == ("float16", "as configured")
    for supported, name in ((True, "bfloat16"), (False, "float32")):
        monkeypatch.setattr(torch.ops.mkldnn, "_is_mkldnn_bf16_supported", lambda supported=supported: supported)
        assert resolve_dtype("auto", cpu)[0] == name
    for supported, name in ((True, "bfloat16"), (False, "float16")):
        monkeypatch.setattr(torch.cuda, "is_bf16_supported", lambda supported=supported, **_: supported)
        assert resolve_dtype("auto", gpu)[0] == name


def test_every_stage_has_a_stream_of_its_own() -> None:
    def drawn(seed: int, *stage: str | int) -> list[float]:
        return torch.rand(3, generator=stage_generator(seed, *stage)).tolist()

    assert drawn(0, "a", 1) == drawn(0, "a", 1)
    streams = [drawn(0, "a"), drawn(0, "b"), drawn(0, "a", 1), drawn(0, "a", 2), drawn(1, "a"), drawn(0, "a", "1")]
    assert len({tuple(stream) for stream in streams}) == len(streams)
    torch.manual_seed(7)
    assert drawn(0, "a") == streams[0]
    assert torch.initial_seed() == 7
