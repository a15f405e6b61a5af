"""Checkpoints: the same logits to the last bit after every way there and back, and refusals of what is damaged."""

from __future__ import annotations

import json
import math
import shutil
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from safetensors import safe_open
from safetensors.torch import load_file, save_file
from torch import Tensor, nn
from transformers import AutoTokenizer, PreTrainedModel, PreTrainedTokenizerFast

import ptq161
from ptq161.errors import UserError
from ptq161.files.checksums import SUMS
from ptq161.methods.ptq161 import PTQ161
from ptq161.methods.rtn import RTN
from ptq161.packed.layout import WEIGHTS_FILE, stored_nominal_bits
from ptq161.packed.model import cast_rest, densify, measure, packed_linears
from tests.conftest import MIXTURES, TINY

TinyModel = Callable[..., PreTrainedModel]
TOKENS = torch.randint(3, 256, (2, 40), generator=torch.Generator().manual_seed(1))
QUICK = PTQ161(epochs=0, batch_size=2)


def logits(model: PreTrainedModel) -> Tensor:
    with torch.no_grad():
        result: Tensor = model(TOKENS, use_cache=False).logits
    return result


def quantized(tiny_model: TinyModel, architecture: str = "llama", method: PTQ161 | RTN = QUICK) -> PreTrainedModel:
    return ptq161.quantize(tiny_model(architecture), TOKENS, method)


@pytest.fixture(scope="module")
def stored(tmp_path_factory: pytest.TempPathFactory, tiny_tokenizer: PreTrainedTokenizerFast) -> Path:
    """The checkpoint of a tiny OPT, which has biases and tied embeddings. Copy it before changing it."""
    from tests.conftest import _tiny_model

    folder = tmp_path_factory.mktemp("checkpoint")
    ptq161.save(quantized(_tiny_model, "opt"), tiny_tokenizer, folder)
    return folder


@pytest.fixture
def damaged(stored: Path, tmp_path: Path) -> Path:
    """A copy of the checkpoint to be damaged, without the checksums, which would find it before anything is read."""
    return Path(shutil.copytree(stored, tmp_path / "copy", ignore=shutil.ignore_patterns(SUMS)))


def rewrite(folder: Path, change: Callable[[dict[str, Tensor]], object]) -> None:
    tensors = load_file(folder / WEIGHTS_FILE)
    change(tensors)
    save_file(tensors, folder / WEIGHTS_FILE)


@pytest.mark.parametrize("architecture", TINY)
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
def test_loaded_and_exported_models_give_the_same_logits(
    architecture: str,
    dtype: torch.dtype,
    tiny_model: TinyModel,
    tiny_tokenizer: PreTrainedTokenizerFast,
    tmp_path: Path,
) -> None:
    model = quantized(tiny_model, architecture)
    cast_rest(model, dtype)
    expected = logits(model)
    assert expected.dtype == dtype and torch.isfinite(expected).all()

    ptq161.save(model, tiny_tokenizer, tmp_path / "packed")
    loaded, tokenizer = ptq161.load(tmp_path / "packed")
    assert torch.equal(logits(loaded), expected)
    assert not loaded.training
    assert tokenizer("a b")["input_ids"] == tiny_tokenizer("a b")["input_ids"]
    assert packed_linears(loaded).keys() == packed_linears(model).keys()

    assert ptq161.export(tmp_path / "packed", tmp_path / "dense") == tmp_path / "dense"
    plain = type(model).from_pretrained(tmp_path / "dense", dtype="auto")
    assert plain.dtype == dtype
    assert not packed_linears(plain)
    if architecture in MIXTURES:  # fused experts multiply in another order
        torch.testing.assert_close(logits(plain.eval()), expected, rtol=0.1, atol=100 * torch.finfo(dtype).eps)
    else:
        assert torch.equal(logits(plain.eval()), expected)
    assert AutoTokenizer.from_pretrained(tmp_path / "dense")("a b")["input_ids"] == tokenizer("a b")["input_ids"]


@pytest.mark.parametrize(
    "method",
    [
        PTQ161(epochs=0, mask_ratio=0.0),
        PTQ161(epochs=0, mask_ratio=0.0, scale_dtype="float32"),
        PTQ161(epochs=0, mask_ratio=0.99, salient_bits=3),
        RTN(bits=4),
        RTN(bits=3, symmetric=True, group_size=32),
    ],
)
def test_every_setting_comes_back(
    method: PTQ161 | RTN, tiny_model: TinyModel, tiny_tokenizer: PreTrainedTokenizerFast, tmp_path: Path
) -> None:
    model = quantized(tiny_model, "qwen3", method)
    ptq161.save(model, tiny_tokenizer, tmp_path)
    assert torch.equal(logits(ptq161.load(tmp_path)[0]), logits(model))


@pytest.mark.parametrize("tied", [False, True])
def test_tied_embeddings_are_stored_once_and_stay_tied(
    tied: bool, tiny_model: TinyModel, tiny_tokenizer: PreTrainedTokenizerFast, tmp_path: Path
) -> None:
    model = quantized(tiny_model)
    if tied:
        model.config.tie_word_embeddings = True
        model.tie_weights()
    expected = logits(model)
    file = ptq161.save(model, tiny_tokenizer, tmp_path)
    assert ("lm_head.weight" in load_file(file)) is not tied
    loaded, _ = ptq161.load(tmp_path)
    assert torch.equal(logits(loaded), expected)
    assert (loaded.lm_head.weight is loaded.model.embed_tokens.weight) is tied


def test_a_file_saved_twice_has_the_same_bytes(
    tiny_model: TinyModel, tiny_tokenizer: PreTrainedTokenizerFast, tmp_path: Path
) -> None:
    model = quantized(tiny_model)
    first = ptq161.save(model, tiny_tokenizer, tmp_path / "a")
    second = ptq161.save(model, tiny_tokenizer, tmp_path / "b")
    loaded, tokenizer = ptq161.load(tmp_path / "a")
    third = ptq161.save(loaded, tokenizer, tmp_path / "c")
    assert first.read_bytes() == second.read_bytes() == third.read_bytes()
    configs = [(tmp_path / folder / "config.json").read_bytes() for folder in "abc"]
    assert configs[0] == configs[1] == configs[2]
    with safe_open(first, "pt") as file:
        assert len(file.metadata() or {}) <= 1


@pytest.mark.parametrize("architecture", ["llama", "opt", "gemma3_text"])
def test_measure_counts_what_is_in_the_file(
    architecture: str, tiny_model: TinyModel, tiny_tokenizer: PreTrainedTokenizerFast, tmp_path: Path
) -> None:
    model = quantized(tiny_model, architecture)
    cast_rest(model, torch.bfloat16)
    tensors = load_file(ptq161.save(model, tiny_tokenizer, tmp_path))
    linears = json.loads((tmp_path / "config.json").read_text())["quantization_config"]["linears"]
    of_linears = [
        t.nbytes for name, t in tensors.items() if name.rpartition(".")[0] in linears and not name.endswith(".bias")
    ]
    size = measure(model)
    assert size.linear_bytes == sum(of_linears) == sum(layer.packed.nbytes for layer in packed_linears(model).values())
    assert size.other_bytes == sum(t.nbytes for t in tensors.values()) - size.linear_bytes
    assert size.linear_weights == sum(row["out_features"] * row["in_features"] for row in linears.values())
    assert size.bits_per_weight == 8 * size.linear_bytes / size.linear_weights
    assert size == measure(ptq161.load(tmp_path)[0])


def test_nominal_bits_are_stored_where_they_are_known(stored: Path, tiny_model: TinyModel, tmp_path: Path) -> None:
    ptq161.save(quantized(tiny_model), None, tmp_path, nominal_bits=1.6)
    assert stored_nominal_bits(tmp_path) == 1.6
    assert stored_nominal_bits(stored) is None


def test_the_file_holds_no_dense_linear(stored: Path, tiny_model: TinyModel) -> None:
    blocks = tiny_model("opt").model.decoder.layers
    shapes = {tuple(module.weight.shape) for module in blocks.modules() if isinstance(module, nn.Linear)}
    stored_floats = {name: t for name, t in load_file(stored / WEIGHTS_FILE).items() if t.is_floating_point()}
    assert not [name for name, t in stored_floats.items() if ".layers." in name and tuple(t.shape) in shapes]


@pytest.mark.parametrize("field", ["sign", "codes", "scale", "mean", "column_angle", "salient_scale"])
def test_a_bit_flipped_in_the_file_changes_the_logits(field: str, stored: Path, damaged: Path) -> None:
    def flip(tensors: dict[str, Tensor]) -> None:
        tensor = tensors[f"model.decoder.layers.0.fc1.{field}"].view(-1)
        tensor.view(torch.uint8)[1 if tensor.dtype == torch.float16 else 0] ^= 64

    rewrite(damaged, flip)
    assert not torch.equal(logits(ptq161.load(damaged)[0]), logits(ptq161.load(stored)[0]))


def test_every_bit_of_the_file_belongs_to_a_tensor_that_is_read(stored: Path) -> None:
    """Header and tensors are all there is: the file's size follows from them."""
    raw = (stored / WEIGHTS_FILE).read_bytes()
    header = int.from_bytes(raw[:8], "little")
    tensors = {k: v for k, v in json.loads(raw[8 : 8 + header]).items() if k != "__metadata__"}
    assert len(raw) == 8 + header + sum(end - start for start, end in (t["data_offsets"] for t in tensors.values()))
    loaded, _ = ptq161.load(stored)
    assert set(tensors) <= set(loaded.state_dict())


def test_casting_leaves_packed_tensors_and_rotary_frequencies(tiny_model: TinyModel) -> None:
    model = quantized(tiny_model)
    frequencies = model.model.rotary_emb.inv_freq.clone()
    stored = {name: layer.packed.state_dict() for name, layer in packed_linears(model).items()}
    cast_rest(model, torch.bfloat16)
    assert torch.equal(model.model.rotary_emb.inv_freq, frequencies)
    assert {p.dtype for p in model.parameters()} == {torch.bfloat16} == {model.dtype, model.config.dtype}
    for name, layer in packed_linears(model).items():
        assert all(layer.packed.state_dict()[k] is tensor for k, tensor in stored[name].items())


def test_densify_keeps_the_function(stored: Path) -> None:
    model, _ = ptq161.load(stored)
    expected = logits(model)
    densify(model)
    assert not packed_linears(model)
    assert torch.equal(logits(model), expected)


def test_an_unpacked_model_is_not_saved(
    tiny_model: TinyModel, tiny_tokenizer: PreTrainedTokenizerFast, tmp_path: Path
) -> None:
    with pytest.raises(UserError, match="no packed linears to save; quantize it first"):
        ptq161.save(tiny_model("llama"), tiny_tokenizer, tmp_path / "x")
    assert not (tmp_path / "x").exists()


def test_an_unwritable_folder_is_named(stored: Path, tmp_path: Path) -> None:
    (tmp_path / "file").write_text("")
    model, tokenizer = ptq161.load(stored)
    with pytest.raises(UserError, match=r"file is a file: name a folder"):
        ptq161.save(model, tokenizer, tmp_path / "file" / "checkpoint")
    with pytest.raises(UserError, match=r"file is a file: name a folder"):
        ptq161.export(stored, tmp_path / "file" / "dense")


def test_without_a_tokenizer_loading_says_so(tiny_model: TinyModel, tmp_path: Path) -> None:
    ptq161.save(quantized(tiny_model), None, tmp_path)
    with pytest.raises(UserError, match="tokenizer"):
        ptq161.load(tmp_path)


def test_foreign_folders_are_refused(tiny_model_dir: Path, tmp_path: Path) -> None:
    for folder in (tiny_model_dir, tmp_path, tmp_path / "missing"):
        with pytest.raises(UserError, match=r"no packed checkpoint \(config.json with quant_method=ptq161\) is there"):
            ptq161.load(folder)
        with pytest.raises(UserError, match="no packed checkpoint"):
            ptq161.export(folder, tmp_path / "out")
    assert not (tmp_path / "out").exists()


def test_a_broken_config_is_refused(damaged: Path) -> None:
    config = damaged / "config.json"
    content = config.read_text()
    for broken in (content[: len(content) // 2], "[]", ""):
        config.write_text(broken)
        with pytest.raises(UserError, match=r"config\.json"):
            ptq161.load(damaged)


@pytest.mark.parametrize("version", [0, 2, None])
def test_another_layout_is_refused(version: int | None, damaged: Path) -> None:
    config = json.loads((damaged / "config.json").read_text())
    config["quantization_config"]["schema_version"] = version
    (damaged / "config.json").write_text(json.dumps(config))
    with pytest.raises(UserError, match=rf"checkpoint layout {version}; this version reads 1"):
        ptq161.load(damaged)


@pytest.mark.parametrize("share", [0, 0.001, 0.5, 0.999])
def test_a_truncated_file_is_refused(share: float, damaged: Path) -> None:
    file = damaged / WEIGHTS_FILE
    content = file.read_bytes()
    file.write_bytes(content[: math.floor(len(content) * share)])
    with pytest.raises(UserError, match=r"packed\.safetensors cannot be read"):
        ptq161.load(damaged)
    file.unlink()
    with pytest.raises(UserError, match=r"packed\.safetensors cannot be read"):
        ptq161.load(damaged)


@pytest.mark.parametrize(
    "name",
    [
        "model.decoder.layers.0.fc1.sign",
        "model.decoder.layers.0.fc1.salient_zero_point",
        "model.decoder.layers.1.self_attn.q_proj.bias",
        "model.decoder.layers.1.final_layer_norm.weight",
        "model.decoder.embed_tokens.weight",
    ],
)
def test_a_missing_tensor_is_named(name: str, damaged: Path) -> None:
    rewrite(damaged, lambda tensors: tensors.pop(name))
    with pytest.raises(UserError, match=f"{name.rpartition('.')[2]}.* is missing|{name}") as caught:
        ptq161.load(damaged)
    assert "damaged" in str(caught.value)


def test_all_tensors_of_a_linear_missing(damaged: Path) -> None:
    def remove(tensors: dict[str, Tensor]) -> None:
        for name in [name for name in tensors if ".1.fc2." in name]:
            del tensors[name]

    rewrite(damaged, remove)
    with pytest.raises(UserError, match="damaged"):
        ptq161.load(damaged)


def test_a_tensor_of_another_model_is_named(damaged: Path) -> None:
    rewrite(damaged, lambda tensors: tensors.update({"model.decoder.layers.7.fc1.sign": torch.zeros(1)}))
    with pytest.raises(UserError, match=r"model\.decoder\.layers\.7\.fc1\.sign is missing or not of this model"):
        ptq161.load(damaged)


def test_a_tensor_of_another_shape_is_named(damaged: Path) -> None:
    rewrite(damaged, lambda tensors: tensors.update({"model.decoder.final_layer_norm.weight": torch.zeros(3)}))
    with pytest.raises(UserError, match=r"damaged: .*final_layer_norm\.weight") as caught:
        ptq161.load(damaged)
    assert "\n" not in str(caught.value)
