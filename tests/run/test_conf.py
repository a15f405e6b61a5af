"""Every file under conf/ composes into its dataclass."""

import csv
from pathlib import Path

import pytest
from hydra import compose, initialize_config_dir
from omegaconf import OmegaConf

from ptq161.errors import UserError
from ptq161.methods.layerwise import LayerwiseMethod
from ptq161.methods.ptq161 import PTQ161
from ptq161.models.settings import ModelConfig
from ptq161.preprocess.restoration import Restoration
from ptq161.run.config import RunConfig, build, load_run_config

CONF = Path(__file__).resolve().parents[2] / "conf"
MODELS = sorted(path.stem for path in (CONF / "model").glob("*.yaml"))
OPTIONS = sorted(
    (path.parent.relative_to(CONF).as_posix(), path.stem) for path in CONF.rglob("*.yaml") if path.parent != CONF
)
# What an option needs beside its name.
NEEDED = {("calib", "text_file"): ["calib.text_file=some_file"]}
"""What an option cannot be without."""


def run_config(*overrides: str) -> RunConfig:
    with initialize_config_dir(str(CONF), version_base="1.3"):
        return load_run_config(compose("config", list(overrides)))


def test_the_defaults():
    config = run_config()
    assert (config.model.name, config.model.asset) == ("smollm2_135m", "smollm2_135m")
    assert (config.method_name, config.calib.name, config.eval.name) == ("ptq161", "squad", "quick")
    assert (config.preprocess, config.tracker.name) == (None, "wandb")
    assert (config.method.mask_ratio, config.method.block_size, config.seed) == (0.2, 1, 0)


@pytest.mark.parametrize(("group", "option"), OPTIONS)
def test_every_option_of_every_group(group, option):
    in_defaults = any(group in entry for entry in OmegaConf.load(CONF / "config.yaml").defaults if entry != "_self_")
    plus = "" if in_defaults or group.startswith("hydra/") else "+"
    needed = ["+study=adapters"] if group == "study/adapters" else NEEDED.get((group, option), [])
    config = run_config(f"{plus}{group}={option}", *needed)
    if group == "method":
        assert config.method_name == option
        assert (config.method is None) is (option == "none")
    elif group in ("preprocess", "finetune"):
        assert getattr(config, f"{group}_name") == option
        assert (getattr(config, group) is None) is (option == "none")
    elif not group.startswith(("debug", "study", "recipe", "hydra")):
        assert getattr(config, group).name.replace(".", "_") == option


def test_groups_follow_the_top_level():
    config = run_config("mask_ratio=0.1", "block_size=2", "dtype=bfloat16")
    assert isinstance(config.method, PTQ161)
    assert (config.method.mask_ratio, config.method.block_size, config.method.compute_dtype) == (0.1, 2, "bfloat16")
    assert run_config("method=ptq161_paper", "mask_ratio=0.3").method.mask_ratio == 0.3


def test_the_papers_method_has_the_released_values():
    config = run_config("method=ptq161_paper", "dtype=float32")
    assert config.method == PTQ161()


def test_the_papers_command_line():
    config = run_config("model=llama2_7b", "calib=wikitext2", "eval=paper")
    assert config.model.repo == "meta-llama/Llama-2-7b-hf"
    assert (config.calib.n_samples, config.calib.seq_len, config.eval.seq_len) == (128, 2048, 2048)
    assert config.eval.limit is config.eval.max_windows is None


def test_a_local_text():
    config = run_config("eval=ppl", "eval.corpora=[text_file]", "eval.text_file=FILE", "eval.seq_len=512")
    assert (config.eval.corpora, config.eval.text_file) == (["text_file"], "FILE")


@pytest.mark.parametrize("method", [option for group, option in OPTIONS if group == "method"])
def test_methods_of_one_block_refuse_more(method):
    if isinstance(run_config(f"method={method}").method, LayerwiseMethod):
        with pytest.raises(UserError, match=r"^block_size=2: .* use block_size=1\.$"):
            run_config(f"method={method}", "block_size=2")


def test_the_papers_preprocessing_has_the_papers_values():
    config = run_config("preprocess=restorative_lora_paper", "dtype=float32")
    assert config.preprocess == Restoration(gradient_checkpointing=True)


@pytest.mark.parametrize("option", [option for group, option in OPTIONS if group == "method" and option != "none"])
def test_every_method_takes_the_default_preprocessing(option):
    assert run_config(f"method={option}", "preprocess=restorative_lora").preprocess is not None


@pytest.mark.parametrize(
    ("overrides", "sentence"),
    [
        (
            ["method=none", "finetune=scales"],
            "finetune=scales: method=none quantizes nothing; choose a method, or finetune=none.",
        ),
        (
            ["method=rtn", "finetune=codes"],
            "finetune.update=codes: the codes of method=rtn (format uniform) cannot be learned; use finetune=scales, "
            "or a method of another format, such as waterfill or ptq161.",
        ),
    ],
)
def test_a_finetuning_that_cannot_be(overrides, sentence):
    with pytest.raises(UserError) as caught:
        run_config(*overrides)
    assert str(caught.value) == sentence


def test_a_preprocessing_of_rounded_activations():
    with pytest.raises(UserError) as caught:
        run_config("method=qdrop", "method.activation_bits=8", "preprocess=restorative_lora")
    assert str(caught.value) == (
        "method.activation_bits=8: preprocessing trains a dense model, which does not round its activations; "
        "use method.activation_bits=null, or preprocess=none."
    )


def test_a_smoke_run_is_small():
    trained = run_config("debug=smoke", "preprocess=restorative_lora").preprocess
    assert trained is not None and trained.sequences * trained.seq_len <= 2048
    config = run_config("debug=smoke")
    assert config.model.n_blocks == 2
    assert config.calib.n_samples * config.calib.seq_len <= 1024
    assert config.eval.limit <= 10 and config.eval.max_windows <= 10


def test_every_top_level_key_is_explained():
    text = (CONF / "config.yaml").read_text()
    keys = set(OmegaConf.load(CONF / "config.yaml")) - {"defaults", "hydra"}
    groups = {path.name for path in CONF.iterdir() if path.is_dir()} - {"hydra", "study"}
    template = text[text.index("template:") :]
    for key in keys | groups:
        assert f"        {key} " in template, key


@pytest.mark.parametrize("model", MODELS)
def test_model_composes(model):
    with initialize_config_dir(str(CONF), version_base="1.3"):
        cfg = compose(f"model/{model}").model
    config = build(ModelConfig, OmegaConf.to_container(cfg, resolve=True), "model")
    assert config.name.replace(".", "_") == model
    assert (config.asset is None) != (config.repo is None)
    assert config.path is config.revision is config.n_blocks is None


def test_published_models_are_configured(golden_dir):
    with (golden_dir / "published" / "ptq161_paper.csv").open() as file:
        published = {row["model"] for row in csv.DictReader(file)}
    assert published
    assert published <= {OmegaConf.load(CONF / "model" / f"{model}.yaml").name for model in MODELS}
