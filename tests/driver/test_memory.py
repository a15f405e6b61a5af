"""Peak resident memory of a quantization out of a folder, and of opening its checkpoint, in a process of its own."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest

pytestmark = pytest.mark.skipif(not Path("/proc/self/clear_refs").exists(), reason="peak memory is Linux's")

FEW, MANY = 4, 20
NO_FREE_LIST = {"MALLOC_MMAP_THRESHOLD_": "65536", "MALLOC_TRIM_THRESHOLD_": "65536"}
"""Freed memory goes back at once: what glibc's allocator kept would hide a part of the next growth."""
PROGRAM = f"""
import json, sys
from pathlib import Path

import torch
from transformers import AutoModelForCausalLM, LlamaConfig, LlamaForCausalLM

import ptq161
from ptq161.models.loading import load_weights
from ptq161.models.settings import ModelConfig
from tests.conftest import _tiny_tokenizer

FOLDER = Path(sys.argv[1])
TOKENS = torch.arange(16)[None]
torch.set_num_threads(1)


def resident(what):
    lines = Path("/proc/self/status").read_text().splitlines()
    return next(int(line.split()[1]) * 1024 for line in lines if line.startswith(what))


def growth(work, *arguments):
    Path("/proc/self/clear_refs").write_text("5")  # the peak begins anew
    before = resident("VmRSS")
    result = work(*arguments)
    return resident("VmHWM") - before


def make(n_blocks):
    sizes = {{"vocab_size": 256, "hidden_size": 512, "intermediate_size": 1024, "num_attention_heads": 8}}
    model = LlamaForCausalLM(LlamaConfig(num_hidden_layers=n_blocks, **sizes)).bfloat16()
    model.save_pretrained(FOLDER / f"dense_{{n_blocks}}", max_shard_size="20MB")
    _tiny_tokenizer().save_pretrained(FOLDER / f"dense_{{n_blocks}}")


def in_memory(n_blocks):
    model = load_weights(ModelConfig(name="model", path=str(FOLDER / f"dense_{{n_blocks}}")))
    ptq161.save(ptq161.quantize(model, TOKENS, ptq161.RTN(bits=2)), None, FOLDER / f"memory_{{n_blocks}}")


def by_blocks(n_blocks):
    out = FOLDER / f"packed_{{n_blocks}}"
    ptq161.quantize_folder(FOLDER / f"dense_{{n_blocks}}", TOKENS, ptq161.RTN(bits=2), out)


for n_blocks in ({FEW}, {MANY}):
    make(n_blocks)
by_blocks({FEW})  # what is imported and allocated once
ptq161.load(FOLDER / "packed_{FEW}")
print(json.dumps({{
    "few": growth(lambda: ptq161.quantize_folder(FOLDER / "dense_{FEW}", TOKENS, ptq161.RTN(bits=2), FOLDER / "again")),
    "many": growth(by_blocks, {MANY}),
    "in_memory": growth(in_memory, {MANY}),
    "load": growth(ptq161.load, FOLDER / "packed_{MANY}"),
    "from_pretrained": growth(AutoModelForCausalLM.from_pretrained, FOLDER / "packed_{MANY}"),
}}))
"""


@pytest.fixture(scope="module")
def measured(tmp_path_factory: pytest.TempPathFactory) -> dict[str, int]:
    """Peak bytes over what was resident before, by what was done; and the sizes of the files."""
    folder = tmp_path_factory.mktemp("memory")
    done = subprocess.run(
        [sys.executable, "-c", PROGRAM, str(folder)],
        env=os.environ | NO_FREE_LIST,
        capture_output=True,
        text=True,
        timeout=300,
        check=False,
    )
    assert done.returncode == 0, done.stderr
    growths: dict[str, int] = json.loads(done.stdout.splitlines()[-1])
    sizes = {path.name: sum(file.stat().st_size for file in path.glob("*.safetensors")) for path in folder.iterdir()}
    return growths | sizes


def test_the_peak_of_a_quantization_out_of_a_folder_does_not_grow_with_the_blocks(measured: dict[str, int]) -> None:
    more_weights = measured[f"dense_{MANY}"] - measured[f"dense_{FEW}"]
    assert measured["many"] - measured["few"] < 0.15 * more_weights
    assert measured["in_memory"] > more_weights  # the same way of measuring sees a model that is in memory


@pytest.mark.parametrize("way", ["load", "from_pretrained"])
def test_a_packed_checkpoint_is_opened_in_the_room_of_its_file(way: str, measured: dict[str, int]) -> None:
    assert measured[f"packed_{MANY}"] < measured[f"dense_{MANY}"] / 4
    assert measured[way] < 1.25 * measured[f"packed_{MANY}"]
