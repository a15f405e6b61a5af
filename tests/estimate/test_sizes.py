"""Bytes before a quantization are those after it, to the byte where they do not depend on the data."""

import dataclasses
from pathlib import Path

import pytest
import torch

import ptq161
from ptq161.errors import UserError
from ptq161.estimate.shapes import empty_model, shape_of
from ptq161.estimate.sizes import packed_layout, packed_sizes
from ptq161.methods import rtn
from ptq161.models.settings import ModelConfig
from ptq161.packed.model import cast_rest, measure
from tests.conftest import VPTQ_WITH_ALL, every_method

TOKENS = torch.arange(32).view(4, 8)
# The tiers of a tiny linear depend on its few channels; BiLLM's salient columns fill their last bytes differently, and
# the share of PB-LLM is rounded in every linear.
WITHIN = {"waterfill": 0.15, "billm": 0.01, "pb_llm": 0.001}
METHODS = every_method(2, 1) | {
    "gptq_in_groups": ptq161.GPTQ(bits=3, group_size=24, act_order=True),
    "vptq_with_all": VPTQ_WITH_ALL,
    "vptq_per_input": dataclasses.replace(VPTQ_WITH_ALL, codebook_per="input"),
    "vptq_per_block": dataclasses.replace(VPTQ_WITH_ALL, codebook_per="block", groups=1),
    "qdrop_of_activations": ptq161.QDrop(bits=2, steps=1, batch_size=2, activation_bits=8),
    "ptq161_without_salient": ptq161.PTQ161(mask_ratio=0.0, epochs=0),
}


def config_only(folder: Path, model) -> ModelConfig:
    model.config.save_pretrained(folder)
    return ModelConfig(name="tiny", path=str(folder))


@pytest.mark.parametrize("name", METHODS)
def test_sizes_are_those_of_the_quantized_model(name, tiny_model, tmp_path):
    method, model = METHODS[name], tiny_model("llama", n_blocks=1)
    predicted = packed_sizes(empty_model(config_only(tmp_path / "config", model)), method, torch.bfloat16)
    ptq161.quantize(model, TOKENS, method)
    cast_rest(model, torch.bfloat16)
    file = ptq161.save(model, None, tmp_path / "checkpoint")
    found = measure(model)
    assert predicted.nominal_bits_per_weight == method.nominal_bits()
    assert predicted.other_bytes == found.other_bytes
    if within := WITHIN.get(name):
        assert predicted.linear_bytes == pytest.approx(found.linear_bytes, rel=within)
        assert predicted.bits_per_weight == pytest.approx(found.bits_per_weight, rel=within)
    else:
        assert predicted.linear_bytes == found.linear_bytes
        assert predicted.bits_per_weight == found.bits_per_weight
        assert predicted.checkpoint_bytes == file.stat().st_size


@pytest.mark.parametrize("architecture", ["opt", "qwen3_moe", "gemma3"])
def test_other_architectures(architecture, tiny_model, tmp_path):
    model = tiny_model(architecture)
    empty = empty_model(config_only(tmp_path / "config", model))
    assert shape_of(empty).parameters == sum(parameter.numel() for parameter in model.parameters())
    predicted = packed_sizes(empty, ptq161.RTN(bits=2), torch.float32)
    ptq161.quantize(model, TOKENS, ptq161.RTN(bits=2))
    assert predicted.checkpoint_bytes == ptq161.save(model, None, tmp_path / "checkpoint").stat().st_size


@pytest.mark.parametrize(("bits", "architecture"), [(8, "llama"), (4, "gemma3_text")])
def test_packed_embeddings_untied_and_tied(bits, architecture, tiny_model, tmp_path):
    model = tiny_model(architecture)
    empty = empty_model(config_only(tmp_path / "config", model))
    predicted = packed_sizes(empty, ptq161.RTN(bits=2), torch.float32, embedding_bits=bits)
    ptq161.quantize_embeddings(ptq161.quantize(model, TOKENS, ptq161.RTN(bits=2)), bits)
    assert predicted.checkpoint_bytes == ptq161.save(model, None, tmp_path / "checkpoint").stat().st_size
    assert predicted.other_bytes == measure(model).other_bytes


def test_rows_are_counted_and_not_packed():
    method = ptq161.RTN(bits=2)
    for rows in (1, 63, 64, 1000):
        packed = rtn.quantize_weight(torch.randn(rows, 24), 2)
        layout = packed_layout(method, rows, 24)
        assert (layout.nbytes, layout.settings()) == (packed.nbytes, packed.settings())
        assert layout.codes.is_meta


def test_the_published_size_of_a_large_linear():
    # README: a 4096 x 4096 linear takes 1.62 bits.
    assert round(packed_layout(ptq161.PTQ161(), 4096, 4096).bits_per_weight, 2) == 1.62


def test_settings_that_do_not_fit():
    with pytest.raises(UserError, match=r"method\.groups=7"):
        packed_layout(ptq161.VPTQ(groups=7), 64, 64)
