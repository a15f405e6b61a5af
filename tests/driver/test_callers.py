"""A library user's first call: the states of torch and of the model, the containers of tokens, the wrong objects."""

from __future__ import annotations

import contextlib
import copy
from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from torch import nn
from torch.utils.data import DataLoader, TensorDataset
from transformers import BatchEncoding, PreTrainedModel, PreTrainedTokenizerFast

import ptq161
from ptq161.errors import UserError
from ptq161.evaluation.likelihood import perplexity
from ptq161.packed.model import packed_linears, sha256_of_packed
from tests.conftest import every_method

TinyModel = Callable[..., PreTrainedModel]
TOKENS = torch.randint(3, 256, (3, 16), generator=torch.Generator().manual_seed(0))
TEXT = torch.randint(3, 256, (64,), generator=torch.Generator().manual_seed(1))
METHODS = every_method(bits=3, epochs=1)


@contextlib.contextmanager
def default_dtype(dtype: torch.dtype) -> Iterator[None]:
    torch.set_default_dtype(dtype)
    try:
        yield
    finally:
        assert torch.get_default_dtype() == dtype, "the caller's setting was changed"
        torch.set_default_dtype(torch.float32)


@contextlib.contextmanager
def products_in_bfloat16() -> Iterator[None]:
    torch.set_float32_matmul_precision("medium")
    try:
        yield
    finally:
        assert torch.get_float32_matmul_precision() == "medium", "the caller's setting was changed"
        torch.set_float32_matmul_precision("highest")


@contextlib.contextmanager
def deterministic() -> Iterator[None]:
    torch.use_deterministic_algorithms(True)
    try:
        yield
    finally:
        torch.use_deterministic_algorithms(False)


STATES: dict[str, Callable[[], AbstractContextManager[Any]]] = {
    "no_grad": torch.no_grad,
    "inference_mode": torch.inference_mode,
    "autocast": lambda: torch.autocast("cpu", torch.bfloat16),
    "float64 by default": lambda: default_dtype(torch.float64),
    "bfloat16 by default": lambda: default_dtype(torch.bfloat16),
    "meta by default": lambda: torch.device("meta"),
    "products in bfloat16": products_in_bfloat16,
    "anomaly detection": torch.autograd.detect_anomaly,
    "deterministic algorithms": deterministic,
}


@pytest.fixture(scope="module")
def expected(tiny_model: TinyModel) -> Callable[[str], str]:
    """The hash of each method's packed model without any state around the call."""
    found: dict[str, str] = {}

    def of(name: str) -> str:
        if name not in found:
            found[name] = sha256_of_packed(ptq161.quantize(tiny_model("llama"), TOKENS, METHODS[name]))
        return found[name]

    return of


@pytest.mark.filterwarnings("ignore:Anomaly Detection")
@pytest.mark.parametrize("name", METHODS)
@pytest.mark.parametrize("state", STATES)
def test_a_state_of_torch_changes_no_bit(
    state: str, name: str, expected: Callable[[str], str], tiny_model: TinyModel
) -> None:
    model = tiny_model("llama")
    with STATES[state]():
        ptq161.quantize(model, TOKENS, METHODS[name])
    assert sha256_of_packed(model) == expected(name)


@pytest.mark.filterwarnings("ignore:Anomaly Detection")
@pytest.mark.parametrize("state", STATES)
def test_a_state_of_torch_changes_no_score_and_no_file(
    state: str, tiny_model: TinyModel, tiny_tokenizer: PreTrainedTokenizerFast, tmp_path: Path
) -> None:
    packed = ptq161.quantize(tiny_model("llama"), TOKENS, METHODS["rtn"])
    score = perplexity(packed, TEXT, 16).value
    with torch.no_grad():
        logits = packed(TOKENS).logits
    with STATES[state]():
        assert perplexity(packed, TEXT, 16).value == score
        ptq161.save(packed, tiny_tokenizer, tmp_path / "packed")
        loaded, _ = ptq161.load(tmp_path / "packed")
        ptq161.export(tmp_path / "packed", tmp_path / "dense")
    dense = type(packed).from_pretrained(tmp_path / "dense")
    for model in (loaded, dense):
        assert {p.dtype for p in model.parameters()} == {torch.float32}
        with torch.no_grad():
            assert torch.equal(model(TOKENS).logits, logits)


def train(model: PreTrainedModel) -> PreTrainedModel:
    model.train()
    model.model.layers[1].eval()
    return model


def with_gradients(model: PreTrainedModel) -> PreTrainedModel:
    model(TOKENS, labels=TOKENS).loss.backward()
    return model


def compiled(model: PreTrainedModel) -> PreTrainedModel:
    model.compile()
    model.model.layers[0].compile()
    return model


def checkpointed(model: PreTrainedModel) -> PreTrainedModel:
    model.gradient_checkpointing_enable()
    return model.train()  # type: ignore[no-any-return]  # transformers leaves train without a type


def inference_tensors(model: PreTrainedModel) -> PreTrainedModel:
    with torch.inference_mode():
        for module in model.modules():
            for key, parameter in list(module.named_parameters(recurse=False)):
                setattr(module, key, nn.Parameter(parameter.clone(), requires_grad=False))
    return model


def observed(model: PreTrainedModel) -> PreTrainedModel:
    """A recorder hangs on a block, which cannot be copied."""
    lock = iter([])

    def record(*_: Any) -> None:
        list(lock)

    model.model.layers[0].register_forward_hook(record)
    return model


MODELS: dict[str, Callable[[PreTrainedModel], PreTrainedModel]] = {
    "training": train,
    "frozen": lambda model: model.requires_grad_(False),
    "with gradients": with_gradients,
    "compiled": compiled,
    "gradient checkpointing": checkpointed,
    "inference tensors": inference_tensors,
    "float64": lambda model: model.double(),
    "with a hook on a block": observed,
}


@pytest.mark.parametrize("name", METHODS)
@pytest.mark.parametrize("state", MODELS)
def test_a_state_of_the_model_changes_no_bit(
    state: str, name: str, expected: Callable[[str], str], tiny_model: TinyModel
) -> None:
    model = MODELS[state](tiny_model("llama"))
    modes = {path: module.training for path, module in model.named_modules()}
    ptq161.quantize(model, TOKENS, METHODS[name])
    assert {path: module.training for path, module in model.named_modules()} == modes
    model.float()
    assert sha256_of_packed(model) == expected(name)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
@pytest.mark.parametrize("name", METHODS)
def test_half_precision_weights_are_those_of_their_float32_copy(
    name: str, dtype: torch.dtype, tiny_model: TinyModel
) -> None:
    half = tiny_model("llama").to(dtype)
    full = copy.deepcopy(half).float()
    method = METHODS[name]
    packed = [packed_linears(ptq161.quantize(model, TOKENS, method)) for model in (half, full)]
    first = [name for name in packed[0] if ".layers.0.self_attn.q_proj" in name]
    assert packed[0].keys() == packed[1].keys() and half.dtype == dtype
    if name == "rtn":  # which looks at no input: those are computed in the model's dtype up to the first block
        first = list(packed[0])
    for path in first:
        assert torch.isfinite(packed[0][path].dequantize()).all()
        if name == "rtn":
            assert torch.equal(packed[0][path].dequantize(), packed[1][path].dequantize())


def test_the_global_random_state_is_no_input_and_no_output(
    expected: Callable[[str], str], tiny_model: TinyModel
) -> None:
    for name in METHODS:
        model = tiny_model("llama")
        torch.manual_seed(12345)
        before = torch.get_rng_state()
        ptq161.quantize(model, TOKENS, METHODS[name])
        assert torch.equal(torch.get_rng_state(), before), name
        assert sha256_of_packed(model) == expected(name)


@pytest.mark.parametrize("architecture", ["llama", "opt", "gemma3", "mixtral"])
@pytest.mark.parametrize("name", METHODS)
def test_without_a_head(name: str, architecture: str, tiny_model: TinyModel, tmp_path: Path) -> None:
    whole = tiny_model(architecture)
    headless = copy.deepcopy(whole.base_model)
    ptq161.quantize(whole, TOKENS, METHODS[name])
    ptq161.quantize(headless, TOKENS, METHODS[name])
    prefix = f"{whole.base_model_prefix}."
    expected = {path.removeprefix(prefix): layer for path, layer in packed_linears(whole).items()}
    found = packed_linears(headless)
    assert found.keys() == expected.keys()
    assert all(torch.equal(found[path].dequantize(), expected[path].dequantize()) for path in found)
    with pytest.raises(UserError, match="has no head that predicts tokens"):
        perplexity(headless, TEXT, 16)
    headless.save_pretrained(tmp_path / "packed")
    assert (tmp_path / "packed" / "packed.safetensors").exists()


# tokens

CONTAINERS: dict[str, Any] = {
    "int32": TOKENS.int(),
    "array": TOKENS.numpy(),
    "lists": TOKENS.tolist(),
    "tuple of tensors": tuple(TOKENS),
    "list of rows [1, n]": [row.unsqueeze(0) for row in TOKENS],
    "encoding": BatchEncoding({"input_ids": TOKENS, "attention_mask": torch.ones_like(TOKENS)}),
    "encoding of lists": BatchEncoding({"input_ids": TOKENS.tolist(), "attention_mask": [[1] * 16] * 3}),
    "dict": {"input_ids": TOKENS},
    "list of dicts": [{"input_ids": row.tolist(), "attention_mask": [1] * 16} for row in TOKENS],
    "list of encodings": [BatchEncoding({"input_ids": row.unsqueeze(0)}) for row in TOKENS],
    "GPTQ's loader": [(row.unsqueeze(0), row.unsqueeze(0).clone()) for row in TOKENS],
    "generator": (row for row in TOKENS),
    "data loader": DataLoader(TensorDataset(TOKENS), batch_size=2),
    "arrays": [np.asarray(row, dtype=np.int32) for row in TOKENS],
    "on a graph": TOKENS.expand(3, 16),
}


@pytest.mark.parametrize("container", CONTAINERS)
def test_tokens_in_any_container(container: str, expected: Callable[[str], str], tiny_model: TinyModel) -> None:
    packed = ptq161.quantize(tiny_model("llama"), CONTAINERS[container], METHODS["gptq"])
    assert sha256_of_packed(packed) == expected("gptq")


def test_tokens_of_a_data_set(expected: Callable[[str], str], tiny_model: TinyModel) -> None:
    datasets = pytest.importorskip("datasets")
    rows = datasets.Dataset.from_dict({"input_ids": TOKENS.tolist()})
    for container in (rows, rows.with_format("torch"), rows.with_format("numpy")):
        packed = ptq161.quantize(tiny_model("llama"), container, METHODS["gptq"])
        assert sha256_of_packed(packed) == expected("gptq")


@pytest.mark.parametrize("tokens", [TEXT, TEXT.unsqueeze(0), TEXT.tolist(), {"input_ids": TEXT.unsqueeze(0)}])
def test_perplexity_takes_a_text_in_any_container(tokens: Any, tiny_model: TinyModel) -> None:
    model = tiny_model("llama").train()
    assert perplexity(model, tokens, 16).value == perplexity(model, TEXT, 16).value
    assert model.training
