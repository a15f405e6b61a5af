"""The fixtures that all tests share."""

import pytest
import torch
from transformers import AutoModelForCausalLM, AutoTokenizer

from tests.conftest import TINY

WINDOWED = ("mistral", "qwen2", "qwen3", "gemma2", "gemma3_text", "gemma3", "mistral3")


@pytest.mark.parametrize("architecture", TINY)
def test_tiny_model_is_seeded(tiny_model, architecture):
    first, again, other = tiny_model(architecture), tiny_model(architecture), tiny_model(architecture, seed=1)
    assert not first.training
    assert {p.dtype for p in first.parameters()} == {torch.float32}
    pairs = list(zip(first.parameters(), again.parameters(), other.parameters(), strict=True))
    assert all(torch.equal(a, b) for a, b, _ in pairs)
    assert any(not torch.equal(a, c) for a, _, c in pairs)


@pytest.mark.parametrize("architecture", TINY)
def test_sliding_window_is_shorter_than_the_sequence(tiny_model, architecture):
    """In the first block, the last of 48 tokens depends on the first one exactly where nothing cuts it off."""
    model = tiny_model(architecture, n_blocks=1)
    tokens = torch.randint(3, 256, (1, 48), generator=torch.Generator().manual_seed(0))
    changed = tokens.clone()
    changed[0, 0] = (tokens[0, 0] + 7) % 250 + 3
    with torch.no_grad():
        difference = (model(tokens).logits - model(changed).logits)[0].abs().amax(-1)
    assert difference[0] > 1e-3
    assert (difference[-1] == 0) == (architecture in WINDOWED)


def test_tokenizer_is_exact(tiny_tokenizer):
    text = "Größe 漢字 🙂\n\n tab\tand  spaces "
    ids = tiny_tokenizer(text)["input_ids"]
    assert len(tiny_tokenizer) == 256
    assert len(ids) == len(text.encode())
    assert tiny_tokenizer.decode(ids) == text
    assert {0, 1, 2}.isdisjoint(ids)
    special = (tiny_tokenizer.bos_token_id, tiny_tokenizer.eos_token_id, tiny_tokenizer.pad_token_id)
    assert special == (0, 1, 2)


def test_saved_folder_loads(tiny_model_dir, tiny_model, tiny_tokenizer):
    model = AutoModelForCausalLM.from_pretrained(tiny_model_dir)
    tokenizer = AutoTokenizer.from_pretrained(tiny_model_dir)
    tokens = torch.tensor([tokenizer("The capital of France")["input_ids"]])
    assert tokens.tolist() == [tiny_tokenizer("The capital of France")["input_ids"]]
    with torch.no_grad():
        assert torch.equal(model(tokens).logits, tiny_model("llama")(tokens).logits)
