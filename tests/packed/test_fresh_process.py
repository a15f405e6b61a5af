"""A checkpoint is opened by a process that has never quantized anything: it knows every format from the start."""

from __future__ import annotations

import importlib
import json
import pkgutil
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from transformers import PreTrainedModel, PreTrainedTokenizerFast

import ptq161
import ptq161.packed
from ptq161.evaluation.likelihood import perplexity
from ptq161.methods.awq import AWQ
from ptq161.methods.base import Method
from ptq161.methods.billm import BiLLM
from ptq161.methods.fp4 import FP4
from ptq161.methods.fp8 import FP8
from ptq161.methods.gptq import GPTQ
from ptq161.methods.gse import GSE
from ptq161.methods.nf4 import NF4
from ptq161.methods.omniquant import OmniQuant
from ptq161.methods.pb_llm import PBLLM
from ptq161.methods.ptq161 import PTQ161
from ptq161.methods.qdrop import QDrop
from ptq161.methods.quant_dllm import QuantDLLM
from ptq161.methods.quip import QuIP
from ptq161.methods.rtn import RTN
from ptq161.methods.waterfill import Waterfill
from ptq161.packed.model import sha256_of_packed
from ptq161.packed.weight import PackedWeight
from tests.conftest import VPTQ_WITH_ALL

METHODS: list[Method] = [
    RTN(),
    FP4(block_format="mxfp4"),
    FP8(group_size=24),
    GPTQ(bits=2),
    AWQ(bits=2),
    GSE(),
    NF4(),
    QuIP(),
    OmniQuant(epochs=1),
    QDrop(steps=2),
    VPTQ_WITH_ALL,
    Waterfill(epochs=1),
    PBLLM(),
    BiLLM(),
    QuantDLLM(column_block=24, mixed_ratio=0.25, allocation="columns"),
    PTQ161(epochs=1),
]
SEQ_LEN = 32
TOKENS = torch.randint(3, 256, (4, SEQ_LEN), generator=torch.Generator().manual_seed(4))

OPEN = """
import json, sys
import torch, transformers
import ptq161
from ptq161.evaluation.likelihood import perplexity
from ptq161.packed.model import sha256_of_packed

folder, dense, tokens = sys.argv[1], sys.argv[2], torch.tensor(json.loads(sys.argv[3]))
model, _ = ptq161.load(folder)
ptq161.export(folder, dense)
exported = transformers.AutoModelForCausalLM.from_pretrained(dense)
scores = [perplexity(m, tokens, int(sys.argv[4])).value for m in (model, exported)]
print(json.dumps([sha256_of_packed(model), *scores]))
"""


@pytest.mark.parametrize("method", METHODS, ids=lambda method: type(method).__name__)
def test_a_fresh_process_loads_exports_and_scores_the_same_bits(
    method: Method,
    tiny_model: Callable[..., PreTrainedModel],
    tiny_tokenizer: PreTrainedTokenizerFast,
    tmp_path: Path,
) -> None:
    model = ptq161.quantize(tiny_model("llama"), TOKENS, method)
    ptq161.save(model, tiny_tokenizer, tmp_path / "packed")
    arguments = [str(tmp_path / "packed"), str(tmp_path / "dense"), json.dumps(TOKENS.flatten().tolist()), str(SEQ_LEN)]
    done = subprocess.run([sys.executable, "-c", OPEN, *arguments], capture_output=True, text=True, timeout=300)
    assert done.returncode == 0, done.stderr
    sha256, *scores = json.loads(done.stdout)
    assert sha256 == sha256_of_packed(model)
    assert scores == [perplexity(model, TOKENS.flatten(), SEQ_LEN).value] * 2


def test_the_package_registers_every_format_that_one_of_its_modules_defines() -> None:
    done = subprocess.run(
        [sys.executable, "-c", "import ptq161.packed.weight as w; print(*sorted(w._FORMATS))"],
        capture_output=True,
        text=True,
        timeout=300,
    )
    assert done.returncode == 0, done.stderr
    defined = set()
    for module in pkgutil.walk_packages(ptq161.packed.__path__, "ptq161.packed."):
        for value in vars(importlib.import_module(module.name)).values():
            if isinstance(value, type) and issubclass(value, PackedWeight) and "format" in vars(value):
                defined.add(value.format)
    assert set(done.stdout.split()) == defined
    assert len(defined) >= 6
