"""The shared fixtures and the rule about skipped tests."""

import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from transformers import AutoModelForCausalLM, AutoTokenizer

ARCHITECTURES = ("llama", "mistral", "qwen2", "qwen3", "opt", "gemma2", "gemma3_text")
WINDOWED = ("mistral", "qwen2", "qwen3", "gemma2", "gemma3_text")


@pytest.mark.parametrize("architecture", ARCHITECTURES)
def test_tiny_model_is_seeded(tiny_model, architecture):
    first, again, other = tiny_model(architecture), tiny_model(architecture), tiny_model(architecture, seed=1)
    assert not first.training
    assert {p.dtype for p in first.parameters()} == {torch.float32}
    pairs = list(zip(first.parameters(), again.parameters(), other.parameters(), strict=True))
    assert all(torch.equal(a, b) for a, b, _ in pairs)
    assert any(not torch.equal(a, c) for a, _, c in pairs)


@pytest.mark.parametrize("architecture", ARCHITECTURES)
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


@pytest.mark.parametrize("workers", ["0", "2"])
@pytest.mark.parametrize(
    ("body", "status"),
    [
        ("def test_a(): pytest.skip('../shared is missing')", 0),
        ("@pytest.mark.skip(reason='no GPU')\ndef test_a(): pass", 0),
        ("@pytest.mark.xfail\ndef test_a(): assert False", 0),
        ("def test_a(): pytest.skip('no time')", 1),
        ("pytest.importorskip('no_such_library')\ndef test_a(): pass", 1),
    ],
)
def test_skips_fail_in_ci(tmp_path, body, status, workers):
    (tmp_path / "conftest.py").write_text(Path(__file__).with_name("conftest.py").read_text())
    (tmp_path / "test_skip.py").write_text(f"import pytest\n{body}\ndef test_b(): pass\n")
    command = [sys.executable, "-m", "pytest", "-q", "-p", "no:cacheprovider", "-n", workers, str(tmp_path)]
    run = subprocess.run(command, env=os.environ | {"CI": "1"}, cwd=tmp_path, capture_output=True, text=True)
    collected_none = 5 if "importorskip" in body and workers == "0" else status
    assert run.returncode in (status, collected_none), run.stdout + run.stderr
    assert ("skipped tests are failures in CI" in run.stdout) == (status == 1)
