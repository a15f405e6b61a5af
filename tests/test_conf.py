"""Every file under conf/ composes into its dataclass."""

import csv
from pathlib import Path

import pytest
from hydra import compose, initialize_config_dir
from omegaconf import OmegaConf

from ptq161.config import ModelConfig, build

CONF = Path(__file__).resolve().parents[1] / "conf"
MODELS = sorted(path.stem for path in (CONF / "model").glob("*.yaml"))


@pytest.mark.parametrize("model", MODELS)
def test_model_composes(model):
    with initialize_config_dir(str(CONF), version_base="1.3"):
        cfg = compose(f"model/{model}").model
    config = build(ModelConfig, OmegaConf.to_container(cfg, resolve=True), "model")
    assert config.name.replace(".", "_") == model
    assert (config.asset is None) != (config.repo is None)
    assert config.path is config.revision is config.n_blocks is None


def test_published_models_are_configured(shared_dir):
    with (shared_dir / "data" / "published" / "ptq161_paper.csv").open() as file:
        published = {row["model"] for row in csv.DictReader(file)}
    assert published
    assert published <= {OmegaConf.load(CONF / "model" / f"{model}.yaml").name for model in MODELS}
