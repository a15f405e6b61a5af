"""What all tests share: one thread, no network services, tiny random models; skips.py says what may be skipped."""

from __future__ import annotations

import os
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

# Before torch and the Hugging Face libraries are imported, which read these once. One thread per test process is the
# fastest for models this small and makes sums reproducible; subprocesses inherit it. No test needs the hub or W&B.
os.environ.setdefault("OMP_NUM_THREADS", "1")
os.environ.setdefault("HF_HUB_OFFLINE", "1")
os.environ.setdefault("WANDB_MODE", "offline")
os.environ.setdefault("TOKENIZERS_PARALLELISM", "false")
os.environ.setdefault("MPLBACKEND", "agg")

import pytest
import torch
import transformers
from tokenizers import Tokenizer, decoders, models, pre_tokenizers
from transformers import PreTrainedModel, PreTrainedTokenizerFast

import ptq161
from ptq161.methods.base import Method
from tests import skips

GOLDEN = Path(__file__).resolve().parent / "golden"

VOCAB_SIZE = 256
MAX_LENGTH = 512
WRAPPERS = ("gemma3", "mistral3", "qwen3_vl")
"""Models of images and text around a language model."""
MIXTURES = ("mixtral", "qwen3_moe")
TINY = ("llama", "mistral", "qwen2", "qwen3", "gemma2", "gemma3_text", "opt", *MIXTURES, *WRAPPERS)
"""What ``tiny_model`` can make: one model at least of every row in the table of architectures."""
SLIDING_WINDOW = 24

VPTQ_WITH_ALL = ptq161.VPTQ(
    vector_length=3,
    centroids=40,
    residual_centroids=9,
    outlier_share=0.05,
    outlier_centroids=6,
    groups=2,
    permute=True,
    normalize=True,
    row_scales=True,
    iterations=5,
)
"""VPTQ with every part of its format."""


def pytest_configure(config: pytest.Config) -> None:
    skips.pytest_configure(config)
    torch.set_num_threads(int(os.environ["OMP_NUM_THREADS"]))


def pytest_runtest_setup(item: pytest.Item) -> None:
    if item.get_closest_marker("gpu") and not torch.cuda.is_available():
        pytest.skip(skips.GPU_MISSING)


def every_method(bits: int, epochs: int) -> dict[str, Method]:
    """Make each method once, quick enough for a tiny model."""
    return {
        "rtn": ptq161.RTN(bits=bits),
        "fp4": ptq161.FP4(),
        "fp8": ptq161.FP8(),
        "gptq": ptq161.GPTQ(bits=bits),
        "awq": ptq161.AWQ(bits=bits),
        "quip": ptq161.QuIP(bits=bits),
        "gse": ptq161.GSE(bits=bits),
        "nf4": ptq161.NF4(),
        "omniquant": ptq161.OmniQuant(bits=bits, epochs=epochs),
        "pb_llm": ptq161.PBLLM(),
        "billm": ptq161.BiLLM(),
        "quant_dllm": ptq161.QuantDLLM(column_block=16, mixed_ratio=0.25),
        "qdrop": ptq161.QDrop(bits=bits, steps=6 * epochs, batch_size=2),
        "vptq": ptq161.VPTQ(vector_length=2, centroids=4**bits, iterations=5),
        "ptq161": ptq161.PTQ161(epochs=epochs, scale_lr=1e-3, angle_lr=1e-2),
        "waterfill": ptq161.Waterfill(level="linear", epochs=epochs, batch_size=2),
    }


@pytest.fixture(scope="session")
def golden_dir() -> Path:
    """The folder ``tests/golden``: vectors of the authors' released code, and published figures."""
    return GOLDEN


@pytest.fixture(autouse=True)
def _global_random_state() -> Iterator[None]:
    """Start every test from the same global state and give the state back, so that the order of tests is no input."""
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        yield


@pytest.fixture(scope="session")
def tiny_model() -> Callable[..., PreTrainedModel]:
    """Factory of tiny random models: ``tiny_model("qwen3")``, ``tiny_model("llama", n_blocks=3, seed=1)``."""
    return _tiny_model


@pytest.fixture(scope="session")
def tiny_tokenizer() -> PreTrainedTokenizerFast:
    """A byte-level tokenizer of ``VOCAB_SIZE`` tokens, exact for any text; no special token is added by itself."""
    return _tiny_tokenizer()


@pytest.fixture(scope="session")
def tiny_model_dir(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A saved Hugging Face folder with the tiny Llama and the tiny tokenizer. Copy it before changing it."""
    folder = tmp_path_factory.mktemp("tiny_model")
    _tiny_model("llama").save_pretrained(folder)
    _tiny_tokenizer().save_pretrained(folder)
    return folder


def _tiny_model(architecture: str, *, n_blocks: int = 2, seed: int = 0) -> PreTrainedModel:
    """Build a random causal language model in float32 and eval mode.

    Hidden 64, MLP 96, 4 heads of 16 (2 KV heads where the architecture has them), ``MAX_LENGTH`` positions. Where the
    architecture has sliding windows, block 0 (all blocks of Mistral) sees ``SLIDING_WINDOW`` tokens. Weights are drawn
    five times wider than usual, so that a wrong mask or position shows in the output.
    """
    family = {
        "llama": ("Llama", {}),
        "mistral": ("Mistral", {"sliding_window": SLIDING_WINDOW}),
        "qwen2": ("Qwen2", {"use_sliding_window": True, "sliding_window": SLIDING_WINDOW}),
        "qwen3": ("Qwen3", {"use_sliding_window": True, "sliding_window": SLIDING_WINDOW}),
        "opt": ("OPT", {}),
        "gemma2": ("Gemma2", {"sliding_window": SLIDING_WINDOW, "query_pre_attn_scalar": 16}),
        "gemma3_text": ("Gemma3", {"sliding_window": SLIDING_WINDOW, "query_pre_attn_scalar": 16}),
        "mixtral": ("Mixtral", {"num_local_experts": 4, "num_experts_per_tok": 2}),
        # Block 0 is dense.
        "qwen3_moe": ("Qwen3Moe", {"num_experts": 4, "num_experts_per_tok": 2, "mlp_only_layers": [0]}),
    }
    if architecture in WRAPPERS:
        return _tiny_wrapper(architecture, n_blocks, seed)
    name, settings = family[architecture]
    if architecture == "opt":
        settings |= {"ffn_dim": 96, "word_embed_proj_dim": 64, "init_std": 0.1}
    else:
        settings |= {"intermediate_size": 96, "num_key_value_heads": 2, "head_dim": 16, "initializer_range": 0.1}
    if architecture == "qwen3_moe":
        settings["moe_intermediate_size"] = 96
    if architecture in ("qwen2", "qwen3", "gemma2", "gemma3_text"):
        settings["layer_types"] = ["full_attention" if i % 2 else "sliding_attention" for i in range(n_blocks)]
    config = getattr(transformers, f"{name}TextConfig" if name == "Gemma3" else f"{name}Config")(
        vocab_size=VOCAB_SIZE,
        hidden_size=64,
        num_hidden_layers=n_blocks,
        num_attention_heads=4,
        max_position_embeddings=MAX_LENGTH,
        bos_token_id=0,
        eos_token_id=1,
        pad_token_id=2,
        **settings,
    )
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        model = getattr(transformers, f"{name}ForCausalLM")(config)
    return model.float().eval()


def _tiny_wrapper(architecture: str, n_blocks: int, seed: int) -> PreTrainedModel:
    """Build a model of images and text around a language model of the size of the others."""
    text: dict[str, Any] = {
        "vocab_size": VOCAB_SIZE,
        "hidden_size": 64,
        "intermediate_size": 96,
        "num_hidden_layers": n_blocks,
        "num_attention_heads": 4,
        "num_key_value_heads": 2,
        "head_dim": 16,
        "initializer_range": 0.1,
        "max_position_embeddings": MAX_LENGTH,
    }
    vision: dict[str, Any] = {
        "hidden_size": 32,
        "intermediate_size": 48,
        "num_hidden_layers": 1,
        "num_attention_heads": 2,
        "image_size": 32,
        "patch_size": 16,
    }
    match architecture:
        case "gemma3":
            name = "Gemma3"
            text |= {"sliding_window": SLIDING_WINDOW, "query_pre_attn_scalar": 16}
            text["layer_types"] = ["full_attention" if i % 2 else "sliding_attention" for i in range(n_blocks)]
            settings = {"image_token_index": 3, "boi_token_index": 4, "eoi_token_index": 5, "mm_tokens_per_image": 4}
        case "mistral3":
            name = "Mistral3"
            text |= {"model_type": "mistral", "sliding_window": SLIDING_WINDOW}
            vision |= {"model_type": "pixtral", "head_dim": 16}
            settings = {"image_token_index": 3}
        case _:
            name = "Qwen3VL"
            text["rope_parameters"] = {"rope_type": "default", "rope_theta": 1e4, "mrope_section": [2, 3, 3]}
            vision = {"depth": 1, "hidden_size": 32, "intermediate_size": 48, "num_heads": 2, "out_hidden_size": 64}
            vision |= {"patch_size": 16, "num_position_embeddings": 4, "deepstack_visual_indexes": [0]}
            settings = {"image_token_id": 3, "video_token_id": 4, "vision_start_token_id": 5, "vision_end_token_id": 6}
    config = getattr(transformers, f"{name}Config")(
        text_config=text, vision_config=vision, bos_token_id=0, eos_token_id=1, pad_token_id=2, **settings
    )
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        model = getattr(transformers, f"{name}ForConditionalGeneration")(config)
    return model.float().eval()


def _tiny_tokenizer() -> PreTrainedTokenizerFast:
    special = ["<s>", "</s>", "<pad>"]
    # The bytes 0xFD to 0xFF never occur in UTF-8: leaving them out makes room for the special tokens.
    symbols = sorted(set(pre_tokenizers.ByteLevel.alphabet()) - {"\xfd", "\xfe", "\xff"})
    tokenizer = Tokenizer(models.BPE(vocab={token: i for i, token in enumerate(special + symbols)}, merges=[]))
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    return PreTrainedTokenizerFast(
        tokenizer_object=tokenizer,
        bos_token="<s>",
        eos_token="</s>",
        pad_token="<pad>",
        model_max_length=MAX_LENGTH,
    )
