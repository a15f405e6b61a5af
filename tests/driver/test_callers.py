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
from torch import Tensor, nn
from torch.nn.utils import parametrizations, prune
from torch.utils.data import DataLoader, TensorDataset
from transformers import BatchEncoding, PretrainedConfig, PreTrainedModel, PreTrainedTokenizerFast

import ptq161
from ptq161.errors import UserError
from ptq161.evaluation.perplexity import perplexity
from ptq161.methods.base import Method
from ptq161.models.architectures import max_seq_len, quantized_linears
from ptq161.packed.model import packed_linears, sha256_of_packed

TinyModel = Callable[..., PreTrainedModel]
TOKENS = torch.randint(3, 256, (3, 16), generator=torch.Generator().manual_seed(0))
TEXT = torch.randint(3, 256, (64,), generator=torch.Generator().manual_seed(1))
METHODS: dict[str, Method] = {
    "rtn": ptq161.RTN(bits=3),
    "gptq": ptq161.GPTQ(bits=3),
    "awq": ptq161.AWQ(bits=3),
    "quip": ptq161.QuIP(bits=3),
    "omniquant": ptq161.OmniQuant(bits=3, epochs=1),
    "pb_llm": ptq161.PBLLM(),
    "billm": ptq161.BiLLM(),
    "ptq161": ptq161.PTQ161(epochs=1),
    "waterfill": ptq161.Waterfill(level="linear", epochs=1, batch_size=2),
}


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


@pytest.mark.parametrize(
    ("tokens", "sentence"),
    [
        ([[1, 2, 3], [4, 5]], "have lengths from 2 to 3; cut them to one"),
        ("a text", "are text; apply the model's tokenizer first"),
        (["a text"], "are text"),
        ([{"text": "a"}], "have no input_ids but text"),
        ({"input_ids": TOKENS, "attention_mask": TOKENS * 0}, r"are padded \(zeros in attention_mask\)"),
        (None, "are a NoneType"),
        (7, "are a int"),
        ([], "are empty"),
        ([[]], "use integers"),
        (TOKENS.float(), "are of float32"),
        ([[1.5, 2.0]], "hold a float"),
        (TOKENS > 9, "are of bool"),
        (TOKENS[0], r"have shape \[16\]"),
        (TOKENS.tolist()[0], r"have shape \[16\]"),
    ],
)
def test_tokens_that_are_none(tokens: Any, sentence: str, tiny_model: TinyModel) -> None:
    model = tiny_model("llama")
    with pytest.raises(UserError, match=f"calibration tokens .*{sentence}") as caught:
        ptq161.quantize(model, tokens, METHODS["rtn"])
    assert "\n" not in str(caught.value)
    assert all(type(module) is nn.Linear for _, module in quantized_linears(model))


@pytest.mark.parametrize("tokens", [TEXT, TEXT.unsqueeze(0), TEXT.tolist(), {"input_ids": TEXT.unsqueeze(0)}])
def test_perplexity_takes_a_text_in_any_container(tokens: Any, tiny_model: TinyModel) -> None:
    model = tiny_model("llama").train()
    assert perplexity(model, tokens, 16).value == perplexity(model, TEXT, 16).value
    assert model.training


# models that are none


def peft_model(model: PreTrainedModel) -> Any:
    from peft import LoraConfig, get_peft_model

    return get_peft_model(model, LoraConfig(target_modules=["q_proj"]))


def adapted(model: PreTrainedModel) -> Any:
    peft_model(model)
    return model


def weight_norm(model: PreTrainedModel) -> Any:
    parametrizations.weight_norm(model.model.layers[1].mlp.up_proj)
    return model


def pruned(model: PreTrainedModel) -> Any:
    prune.l1_unstructured(model.model.layers[1].mlp.up_proj, "weight", 0.5)
    return model


def hooked(model: PreTrainedModel) -> Any:
    model.model.layers[1].mlp.up_proj.register_forward_hook(lambda *_: None)
    return model


def on_meta(model: PreTrainedModel) -> Any:
    return model.to("meta")


def dispatched(model: PreTrainedModel) -> Any:
    from accelerate import dispatch_model

    return dispatch_model(model, {"": "cpu"}, force_hooks=True)


def integers(model: PreTrainedModel) -> Any:
    linear = model.model.layers[0].mlp.up_proj
    linear.weight = nn.Parameter(linear.weight.to(torch.int8), requires_grad=False)
    return model


@pytest.mark.parametrize(
    ("change", "sentence"),
    [
        (peft_model, r"a PeftModel is a model with an adapter: merge it first, with merge_and_unload\(\)\."),
        (adapted, r"carries an adapter \(a Linear at .*q_proj\): merge it first"),
        (weight_norm, r"model\.layers\.1\.mlp\.up_proj is computed from others"),
        (pruned, r"model\.layers\.1\.mlp\.up_proj is computed from others"),
        (hooked, r"model\.layers\.1\.mlp\.up_proj has forward hooks, which would be lost"),
        (on_meta, r"not in memory \(model\.embed_tokens\.weight is on the meta device\)"),
        (dispatched, "spread over devices"),
        (integers, "of int8: use a dense model"),
        (nn.DataParallel, r"the model is wrapped \(a DataParallel\): pass its \.module"),
        (torch.compile, r"the model is compiled \(a OptimizedModule\): pass its \._orig_mod"),
        (lambda model: (model, None), r"pass its first item, if it is \(model, tokenizer\)"),
        (lambda _: "folder/of/model", "'folder/of/model' is no model: load it first"),
        (lambda _: Path("folder"), "'folder' is no model: load it first"),
        (lambda _: None, "a NoneType is no transformers model"),
        (lambda model: model.state_dict(), "is no transformers model"),
        (lambda _: nn.Linear(4, 4), "a Linear is no transformers model"),
    ],
)
def test_models_that_are_none(change: Callable[[PreTrainedModel], Any], sentence: str, tiny_model: TinyModel) -> None:
    given = change(tiny_model("llama"))
    with pytest.raises(UserError, match=sentence) as caught:
        ptq161.quantize(given, TOKENS, METHODS["rtn"])
    assert "\n" not in str(caught.value)


@pytest.mark.parametrize(
    ("method", "sentence"),
    [
        ("rtn", r"'rtn' is no method: pass an instance, such as ptq161\.RTN\(bits=4\)"),
        (ptq161.RTN, r"the class RTN is no method: pass an instance"),
        (None, r"None is no method"),
        ({"bits": 4}, r"is no method"),
    ],
)
def test_methods_that_are_none(method: Any, sentence: str, tiny_model: TinyModel) -> None:
    with pytest.raises(UserError, match=sentence):
        ptq161.quantize(tiny_model("llama"), TOKENS, method)


@pytest.mark.parametrize("device", ["tpu", "", "cuda:99", "meta"])
def test_devices_that_are_none(device: str, tiny_model: TinyModel) -> None:
    with pytest.raises(UserError, match=f"device={device}: "):
        ptq161.quantize(tiny_model("llama"), TOKENS, METHODS["rtn"], device=device)


def test_a_sequence_longer_than_the_models(tiny_model: TinyModel) -> None:
    tokens: Tensor = TOKENS.repeat(1, 33)
    with pytest.raises(UserError, match=r"calib\.seq_len=528: the model takes at most 512 tokens"):
        ptq161.quantize(tiny_model("llama"), tokens, METHODS["rtn"])


def test_a_config_without_a_limit() -> None:
    assert max_seq_len(PretrainedConfig()) is None
