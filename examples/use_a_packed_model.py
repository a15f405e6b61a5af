"""Open a packed checkpoint with transformers, generate from its bytes, and compare with its dense weights.

Usage::

    python examples/use_a_packed_model.py RUN_DIR/checkpoint
    python examples/use_a_packed_model.py RUN_DIR/checkpoint --prompt "Once upon a time" --tokens 50

Any program of transformers can open the folder in this way: the import of ``ptq161`` is all that it needs.
"""

from __future__ import annotations

import argparse
import time
from pathlib import Path
from typing import Any

import torch
from torch import Tensor
from transformers import AutoModelForCausalLM, AutoTokenizer, PreTrainedModel

import ptq161
from ptq161.packed.linear import dense_cache, int8_activations
from ptq161.packed.model import measure


def main() -> None:
    """Open, generate in three ways, print."""
    options = parse()
    print(f"ptq161 {ptq161.__version__}")
    model = AutoModelForCausalLM.from_pretrained(options.checkpoint)
    tokenizer = AutoTokenizer.from_pretrained(options.checkpoint)
    size = measure(model)
    print(f"{size.linear_bytes:,} bytes of packed linears, {size.bits_per_weight:.2f} bits per weight")
    prompt = tokenizer(options.prompt, return_tensors="pt").input_ids

    packed = timed("packed", model, prompt, options.tokens)
    with int8_activations(model):
        timed("packed, activations of 8 bits", model, prompt, options.tokens)
    with dense_cache(model, model.dtype):  # as much memory as the dense model, and its bits
        timed("dense", model, prompt, options.tokens)
    print(tokenizer.decode(packed[0], skip_special_tokens=True))


def timed(name: str, model: PreTrainedModel, prompt: Tensor, n_tokens: int) -> Tensor:
    """Generate the most probable tokens and print their speed; return all tokens ``[1, n]``."""
    settings = {"do_sample": False, "min_new_tokens": n_tokens, "max_new_tokens": n_tokens}
    generate: Any = model.generate  # torch's modules leave it untyped
    generate(prompt, **settings | {"min_new_tokens": 1, "max_new_tokens": 1})  # what is made once
    began = time.perf_counter()
    tokens: Tensor = generate(prompt, attention_mask=torch.ones_like(prompt), **settings)
    print(f"{name:30} {n_tokens / (time.perf_counter() - began):6.1f} tokens per second")
    return tokens


def parse() -> argparse.Namespace:
    """Read the command line."""
    parser = argparse.ArgumentParser(description=(__doc__ or "").partition("\n")[0])
    parser.add_argument("checkpoint", type=Path, help="a folder that a run or ptq161.save has written")
    parser.add_argument("--prompt", default="The capital of France is", help="text to continue")
    parser.add_argument("--tokens", type=int, default=24, metavar="N", help="new tokens (24)")
    return parser.parse_args()


if __name__ == "__main__":
    main()
