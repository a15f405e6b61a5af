"""transformers opens a packed checkpoint by itself, once ptq161 is imported, and refuses it otherwise."""

from __future__ import annotations

import json
import math
import shutil
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch
from huggingface_hub import ModelCard
from safetensors.torch import load_file, save_file
from transformers import AutoModelForCausalLM, PreTrainedModel, PreTrainedTokenizerFast, pipeline
from transformers.utils import hub

import ptq161
from ptq161.errors import UserError
from ptq161.packed.layout import WEIGHTS_FILE
from ptq161.packed.linear import PackedLinear
from ptq161.packed.model import packed_linears
from tests.conftest import MIXTURES, TINY, every_method

TOKENS = torch.randint(3, 256, (2, 32), generator=torch.Generator().manual_seed(4))
METHODS = every_method(bits=2, epochs=1)


@pytest.fixture(scope="module")
def folder(
    tiny_model: Callable[..., PreTrainedModel],
    tiny_tokenizer: PreTrainedTokenizerFast,
    tmp_path_factory: pytest.TempPathFactory,
) -> Path:
    """A checkpoint; copy it before changing it."""
    place = tmp_path_factory.mktemp("pretrained") / "packed"
    model = ptq161.quantize(tiny_model("llama"), TOKENS, ptq161.RTN(bits=2))
    ptq161.save(model, tiny_tokenizer, place)
    return place


def assert_same(model: PreTrainedModel, other: PreTrainedModel) -> None:
    mine, others = model.state_dict(), other.state_dict()
    assert mine.keys() == others.keys()
    for name, tensor in mine.items():
        assert tensor.dtype == others[name].dtype and torch.equal(tensor, others[name]), name
    for name, layer in packed_linears(model).items():
        assert layer.packed.settings() == packed_linears(other)[name].packed.settings()
    with torch.no_grad():
        assert torch.equal(model(TOKENS).logits, other(TOKENS).logits)


def opened(place: Path, **settings: object) -> PreTrainedModel:
    model: PreTrainedModel = AutoModelForCausalLM.from_pretrained(place, **settings)
    return model


@pytest.mark.parametrize("name", METHODS)
def test_every_format_is_opened_as_stored(
    name: str, tiny_model: Callable[..., PreTrainedModel], tmp_path: Path
) -> None:
    model = ptq161.quantize(tiny_model("llama"), TOKENS, METHODS[name])
    ptq161.save(model, None, tmp_path / "packed")
    assert_same(opened(tmp_path / "packed"), model)


@pytest.mark.parametrize("architecture", TINY)
def test_every_architecture_is_opened_as_stored(
    architecture: str, tiny_model: Callable[..., PreTrainedModel], tmp_path: Path
) -> None:
    model = ptq161.quantize(tiny_model(architecture), TOKENS, ptq161.RTN(bits=2))
    ptq161.save(model, None, tmp_path / "packed")
    again = type(model).from_pretrained(tmp_path / "packed")
    assert_same(again, model)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
def test_a_dtype_is_that_of_everything_but_the_packed_tensors(dtype: torch.dtype, folder: Path) -> None:
    model = opened(folder, dtype=dtype)
    assert model.get_input_embeddings().weight.dtype == dtype
    stored = load_file(folder / WEIGHTS_FILE)
    for name, layer in packed_linears(model).items():
        for key, tensor in layer.packed.state_dict().items():
            assert tensor.dtype == stored[f"{name}.{key}"].dtype and torch.equal(tensor, stored[f"{name}.{key}"])
    assert model(TOKENS).logits.dtype == dtype


def test_it_saves_itself_as_it_was(folder: Path, tmp_path: Path) -> None:
    model = opened(folder)
    model.save_pretrained(tmp_path / "again")
    assert_same(opened(tmp_path / "again"), model)
    for file in (WEIGHTS_FILE, "config.json"):
        assert (tmp_path / "again" / file).read_bytes() == (folder / file).read_bytes()


def test_dequantize_makes_it_a_plain_model(folder: Path, tmp_path: Path) -> None:
    packed, dense = opened(folder), opened(folder).dequantize()
    assert not packed_linears(dense) and not hasattr(dense.config, "quantization_config")
    with torch.no_grad():
        assert torch.equal(dense(TOKENS).logits, packed(TOKENS).logits)
    dense.save_pretrained(tmp_path / "dense")
    assert torch.equal(opened(tmp_path / "dense")(TOKENS).logits, packed(TOKENS).logits)


@pytest.mark.parametrize("architecture", MIXTURES)
def test_a_mixture_made_dense_is_one_of_transformers(
    architecture: str, tiny_model: Callable[..., PreTrainedModel], tmp_path: Path
) -> None:
    model = ptq161.quantize(tiny_model(architecture), TOKENS, ptq161.RTN(bits=2))
    with torch.no_grad():
        expected = model(TOKENS).logits
        model.dequantize().save_pretrained(tmp_path / "dense")
        found = opened(tmp_path / "dense")(TOKENS).logits
    torch.testing.assert_close(found, expected, rtol=0, atol=1e-5 * float(expected.abs().max()))


def test_a_pipeline_generates(folder: Path) -> None:
    generate = pipeline("text-generation", str(folder))
    assert isinstance(generate.model.model.layers[0].mlp.up_proj, PackedLinear)
    (answer,) = generate("Some text", max_new_tokens=3, do_sample=False)
    assert answer["generated_text"].startswith("Some text")


OPEN = """
import sys
{first}
from transformers import AutoModelForCausalLM
from transformers.utils import hub
{second}
model = AutoModelForCausalLM.from_pretrained(sys.argv[1])
print(type(model.model.layers[0].mlp.up_proj).__name__)
"""


@pytest.mark.parametrize(
    ("first", "second"),
    [
        ("import ptq161\nassert 'transformers' not in sys.modules", ""),
        ("import transformers.quantizers", "import ptq161"),
    ],
)
def test_the_order_of_imports_is_free(first: str, second: str, folder: Path) -> None:
    program = OPEN.format(first=first, second=second)
    done = subprocess.run([sys.executable, "-c", program, str(folder)], capture_output=True, text=True, timeout=300)
    assert done.returncode == 0, done.stderr
    assert done.stdout.split() == ["PackedLinear"]


def test_without_ptq161_no_model_is_made(folder: Path) -> None:
    program = OPEN.format(first="", second="")
    done = subprocess.run([sys.executable, "-c", program, str(folder)], capture_output=True, text=True, timeout=300)
    assert done.returncode == 1 and done.stdout == ""
    assert "no file named model.safetensors" in done.stderr


def damaged(folder: Path, place: Path, change: Callable[[dict[str, torch.Tensor]], object]) -> Path:
    place.mkdir()
    for file in folder.iterdir():
        if file.name != "SHA256SUMS":  # which tells it first
            (place / file.name).write_bytes(file.read_bytes())
    tensors = load_file(place / WEIGHTS_FILE)
    change(tensors)
    save_file(tensors, place / WEIGHTS_FILE, metadata={"format": "pt"})
    return place


@pytest.mark.parametrize("name", ["model.layers.0.mlp.up_proj.codes", "model.norm.weight", "model.embed_tokens.weight"])
def test_a_tensor_that_is_missing_is_named(name: str, folder: Path, tmp_path: Path) -> None:
    with pytest.raises(ptq161.UserError, match=r"lacks|is missing") as raised:
        opened(damaged(folder, tmp_path / "damaged", lambda tensors: tensors.pop(name)))
    assert name.rpartition(".")[2] in str(raised.value)


def test_a_tensor_too_many_is_named(folder: Path, tmp_path: Path) -> None:
    with pytest.raises(ptq161.UserError, match=r"tensor model\.extra is missing or not of this model"):
        opened(damaged(folder, tmp_path / "damaged", lambda tensors: tensors.update({"model.extra": torch.ones(1)})))


def test_a_changed_byte_is_seen(folder: Path, tmp_path: Path) -> None:
    place = tmp_path / "damaged"
    place.mkdir()
    for file in folder.iterdir():
        (place / file.name).write_bytes(file.read_bytes())
    content = bytearray((place / WEIGHTS_FILE).read_bytes())
    content[-1] ^= 1
    (place / WEIGHTS_FILE).write_bytes(content)
    with pytest.raises(ptq161.UserError, match=r"packed\.safetensors"):
        opened(place)


def test_another_layout_is_refused(folder: Path, tmp_path: Path) -> None:
    place = damaged(folder, tmp_path / "other", lambda tensors: None)
    config = json.loads((place / "config.json").read_text())
    config["quantization_config"]["schema_version"] = 99
    (place / "config.json").write_text(json.dumps(config))
    with pytest.raises(ptq161.UserError, match="has checkpoint layout 99; this version reads"):
        opened(place)


def test_a_float_model_is_not_packed_while_it_is_loaded(tiny_model_dir: Path, folder: Path) -> None:
    config = json.loads((folder / "config.json").read_text())["quantization_config"]
    with pytest.raises(ValueError, match="require the model to be pre-quantized"):
        opened(tiny_model_dir, quantization_config=config)


def test_lm_eval_scores_it_by_its_own_command(folder: Path, tmp_path: Path) -> None:
    """The numbers are those of the model as ``ptq161.load`` has it, which the command does not know."""
    (tmp_path / "data.jsonl").write_text(json.dumps({"text": "the cat sat on the mat"}) + "\n")
    task = {
        "task": "one_line",
        "dataset_path": "json",
        "dataset_kwargs": {"data_files": {"test": str(tmp_path / "data.jsonl")}},
        "output_type": "loglikelihood_rolling",
        "test_split": "test",
        "doc_to_text": "",
        "doc_to_target": "{{text}}",
        "metric_list": [{"metric": "bits_per_byte"}],
    }
    (tmp_path / "one_line.yaml").write_text(json.dumps(task))  # JSON is YAML
    program = "import ptq161; from lm_eval.__main__ import cli_evaluate; cli_evaluate()"
    options = ["--model", "hf", "--model_args", f"pretrained={folder},dtype=float32", "--tasks", "one_line"]
    options += ["--device", "cpu", "--include_path", str(tmp_path), "--output_path", str(tmp_path / "scores")]
    done = subprocess.run([sys.executable, "-c", program, *options], capture_output=True, text=True, timeout=300)
    assert done.returncode == 0, done.stderr
    (found,) = (tmp_path / "scores").rglob("results*.json")
    score = json.loads(found.read_text())["results"]["one_line"]["bits_per_byte,none"]
    assert score == pytest.approx(bits_per_byte(folder, "the cat sat on the mat"), rel=1e-4)


def bits_per_byte(folder: Path, text: str) -> float:
    """By the definition: every token given those before it, the first given the one that begins a text."""
    model, tokenizer = ptq161.load(folder)
    assert tokenizer is not None
    ids = tokenizer(text, add_special_tokens=False)["input_ids"]
    first = tokenizer.bos_token_id if tokenizer.bos_token_id is not None else tokenizer.eos_token_id
    with torch.no_grad():
        logs = model(torch.tensor([[first, *ids]])).logits[0].log_softmax(-1)
    return -sum(float(logs[i, token]) for i, token in enumerate(ids)) / math.log(2) / len(text.encode())


def test_what_is_pushed_to_a_hub_is_opened_again(
    folder: Path, tiny_tokenizer: PreTrainedTokenizerFast, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    model, uploaded = opened(folder), tmp_path / "uploaded"
    monkeypatch.setattr(
        hub, "hf_api", lambda: SimpleNamespace(create_repo=lambda *_, **__: SimpleNamespace(repo_id="x"))
    )
    monkeypatch.setattr(hub, "create_and_tag_model_card", lambda *_, **__: ModelCard("---\ntags: [mine]\n---\n"))
    monkeypatch.setattr(model, "_upload_modified_files", lambda place, *_, **__: shutil.copytree(place, uploaded))
    model.push_to_hub("x")
    assert_same(opened(uploaded), model)
    tiny_tokenizer.save_pretrained(uploaded)  # its own push_to_hub
    assert_same(ptq161.load(uploaded)[0], model)
    with pytest.raises(UserError, match="one file"):
        model.save_pretrained(tmp_path / "shards", max_shard_size="1KB")
