"""A checkpoint is opened by a process that has never quantized anything: it knows every format from the start."""

from __future__ import annotations

import dataclasses
import importlib
import json
import pkgutil
import subprocess
import sys
from collections.abc import Callable

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

tokens, found = torch.tensor(json.loads(sys.argv[1])), {}
for folder in sys.argv[3:]:
    model, _ = ptq161.load(f"{folder}/packed")
    ptq161.export(f"{folder}/packed", f"{folder}/dense")
    exported = transformers.AutoModelForCausalLM.from_pretrained(f"{folder}/dense")
    scores = [perplexity(m, tokens, int(sys.argv[2])).value for m in (model, exported)]
    found[folder] = [sha256_of_packed(model), *scores]
print(json.dumps(found))
"""


@dataclasses.dataclass(frozen=True)
class Opened:
    """A method's model, and what the other process has said of it."""

    model: PreTrainedModel
    sha256: str
    scores: list[float]


@pytest.fixture(scope="module")
def opened(
    tiny_model: Callable[..., PreTrainedModel],
    tiny_tokenizer: PreTrainedTokenizerFast,
    tmp_path_factory: pytest.TempPathFactory,
) -> dict[str, Opened]:
    """Every method's model, opened and exported by one process, by the method's name."""
    folder = tmp_path_factory.mktemp("models")
    models = {type(method).__name__: ptq161.quantize(tiny_model("llama"), TOKENS, method) for method in METHODS}
    for name, model in models.items():
        ptq161.save(model, tiny_tokenizer, folder / name / "packed")
    arguments = [json.dumps(TOKENS.flatten().tolist()), str(SEQ_LEN), *(str(folder / name) for name in models)]
    done = subprocess.run([sys.executable, "-c", OPEN, *arguments], capture_output=True, text=True, timeout=300)
    assert done.returncode == 0, done.stderr
    found = json.loads(done.stdout)
    return {
        name: Opened(model, found[str(folder / name)][0], found[str(folder / name)][1:])
        for name, model in models.items()
    }


@pytest.mark.parametrize("name", [type(method).__name__ for method in METHODS])
def test_a_fresh_process_loads_exports_and_scores_the_same_bits(name: str, opened: dict[str, Opened]) -> None:
    model = opened[name].model
    assert opened[name].sha256 == sha256_of_packed(model)
    assert opened[name].scores == [perplexity(model, TOKENS.flatten(), SEQ_LEN).value] * 2


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
