"""A masked-diffusion model that comes with code of its own: refused, allowed, quantized and scored by a run."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import transformers.dynamic_module_utils
from omegaconf import OmegaConf

from ptq161.errors import UserError
from ptq161.evaluation import denoising_loss
from ptq161.models.loading import load_model
from ptq161.models.settings import ModelConfig
from ptq161.packed.checkpoint import load
from ptq161.run import pipeline
from ptq161.run.contents import identity
from ptq161.run.preflight import checked_config
from ptq161.run.session import RunContext
from tests.diffusion_models import MASK, SEQ_LEN, progressions, tiny_llada
from tests.evaluation.test_denoising import tokenizer, words
from tests.run.test_preflight import composed

CODE = """
from tests.diffusion_models import Llada, LladaConfig

class LLaDAConfig(LladaConfig):
    pass

class LLaDAModelLM(Llada):
    config_class = LLaDAConfig
"""
RTN = {"_target_": "ptq161.methods.rtn.RTN", "name": "rtn", "bits": 4}
QUANT_DLLM = {
    "_target_": "ptq161.methods.quant_dllm.QuantDLLM",
    "name": "quant_dllm",
    "column_block": 16,
    "mixed_ratio": 0.0,
}

LORA = {"_target_": "ptq161.preprocess.Restoration", "name": "lora", "corpora": ["squad"]}
SCALES = {"_target_": "ptq161.finetune.distillation.Distillation", "name": "scales"}


@pytest.fixture
def folder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """The stand-in for LLaDA as its authors' folders are: a config that names classes of a file beside it."""
    modules = tmp_path / "modules"
    monkeypatch.setattr(transformers.dynamic_module_utils, "HF_MODULES_CACHE", str(modules))
    monkeypatch.syspath_prepend(str(modules))
    monkeypatch.setenv("PTQ161_STORE", str(tmp_path / "store"))
    folder = tmp_path / "llada"
    tiny_llada().save_pretrained(folder)
    tokenizer().save_pretrained(folder)
    (folder / "modeling_llada.py").write_text(CODE)
    config = json.loads((folder / "config.json").read_text())
    classes = {"AutoConfig": "modeling_llada.LLaDAConfig", "AutoModel": "modeling_llada.LLaDAModelLM"}
    (folder / "config.json").write_text(json.dumps(config | {"auto_map": classes}))
    (tmp_path / "text").write_text(words(progressions(40, seed=7)))
    return folder


def config_of(folder: Path, method: dict[str, Any] = QUANT_DLLM, **more: Any) -> Any:
    text = str(folder.parent / "text")
    cfg = composed(str(folder), text, text, **{"model.trust_remote_code": True, "eval.seq_len": 16, **more})
    cfg.method = method
    return cfg


def test_without_the_setting_one_sentence_says_what_to_set(folder: Path) -> None:
    with pytest.raises(UserError) as caught:
        load_model(ModelConfig("llada", path=str(folder)))
    sentence = str(caught.value)
    assert "comes with code of its own (auto_map), and none of it is run" in sentence
    assert sentence.endswith("set model.trust_remote_code=true if you trust it.") and "\n" not in sentence


def test_with_the_setting_the_code_is_run(folder: Path) -> None:
    model, _ = load_model(ModelConfig("llada", path=str(folder), trust_remote_code=True, n_blocks=1))
    assert type(model).__name__ == "LLaDAModelLM" and len(model.model.transformer.blocks) == 1
    text = progressions(2, seed=7).flatten()
    whole, _ = load_model(ModelConfig("llada", path=str(folder), trust_remote_code=True))
    assert denoising_loss(whole, text, SEQ_LEN).value == denoising_loss(tiny_llada(), text, SEQ_LEN).value


def test_the_code_is_part_of_what_a_run_is_known_by(folder: Path) -> None:
    def described(trusted: bool) -> object:
        return identity(checked_config(config_of(folder, **{"model.trust_remote_code": trusted}), []))["model"]

    before = [described(trusted) for trusted in (False, True)]
    (folder / "modeling_llada.py").write_text(CODE + "\n# changed\n")
    after = [described(trusted) for trusted in (False, True)]
    assert before[0] == after[0] and before[1] != after[1]


def test_a_run_quantizes_under_masks_and_records_the_denoising_loss(folder: Path, tmp_path: Path) -> None:
    masks = {"calib.masking": "linear", "calib.mask_token": MASK}
    cfg = config_of(folder, **masks)
    resolved: Any = OmegaConf.to_container(cfg, resolve=True)
    results = pipeline.run(checked_config(cfg, []), RunContext(str(tmp_path / "run"), resolved, [], "run"))
    name = "denoising_loss/text_file@16"
    for scores in (results["metrics"], results["full_precision"]):
        assert [metric for metric in scores if "/" in metric] == [name] and 2 < scores[name] < 6
    assert results["metrics"][name] != results["full_precision"][name]
    assert results["protocol"][name]["mask_shares"] == 8
    recorded = json.loads((tmp_path / "run" / "results.json").read_text())
    assert recorded["metrics"][name] == results["metrics"][name]
    with pytest.raises(UserError, match=r"holds a llada model, which is none of transformers' own"):
        load(tmp_path / "run" / "checkpoint")


@pytest.mark.parametrize(
    ("changes", "sentence"),
    [
        ({"eval.tasks": ["copa"]}, r"but eval\.tasks scores .*: set eval\.tasks=\[\]\.$"),
        ({"preprocess": LORA}, r"but preprocess trains .*: set preprocess=none\.$"),
        ({"finetune": SCALES}, r"but finetune distils .*: set finetune=none\.$"),
    ],
)
def test_what_only_a_causal_model_can_do_is_refused(
    folder: Path, tmp_path: Path, changes: dict[str, Any], sentence: str
) -> None:
    cfg = config_of(folder, RTN, **changes)
    resolved: Any = OmegaConf.to_container(cfg, resolve=True)
    with pytest.raises(UserError, match=sentence):
        pipeline.run(checked_config(cfg, []), RunContext(str(tmp_path / "run"), resolved, [], "run"))
