"""What all tests share: one thread, no network services, tiny random models; skips.py says what may be skipped."""

from __future__ import annotations

import os
from collections.abc import Callable, Iterator
from pathlib import Path

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

from tests import skips

GOLDEN = Path(__file__).resolve().parent / "golden"

VOCAB_SIZE = 256
MAX_LENGTH = 512
SLIDING_WINDOW = 24


def pytest_configure(config: pytest.Config) -> None:
    skips.pytest_configure(config)
    torch.set_num_threads(int(os.environ["OMP_NUM_THREADS"]))


def pytest_runtest_setup(item: pytest.Item) -> None:
    if item.get_closest_marker("gpu") and not torch.cuda.is_available():
        pytest.skip(skips.GPU_MISSING)


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


@pytest.fixture
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
    }
    name, settings = family[architecture]
    if architecture == "opt":
        settings |= {"ffn_dim": 96, "word_embed_proj_dim": 64, "init_std": 0.1}
    else:
        settings |= {"intermediate_size": 96, "num_key_value_heads": 2, "head_dim": 16, "initializer_range": 0.1}
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
