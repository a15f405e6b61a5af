"""Tokens per second of finetuning, by update, against the floor of its matrix products, in one sitting.

    python benchmarks/distillation.py                               # the embedded model, 4 x 256 tokens a step
    python benchmarks/distillation.py --blocks 6 --updates codes    # its first blocks alone, where time is short
    python benchmarks/distillation.py --operators compiled torch    # the operators in C++ against torch's

The model is quantized without learning, which changes no timing. A step is a teacher's forward pass, a student's
forward and backward pass, the divergence over the whole vocabulary, and the optimizer. The floor is the time that the
operations of its matrix products take at the rate of one plain bfloat16 product on this machine: 2 a weight and token
for a forward pass, 4 for a backward pass through a linear whose codes or scales are trained, 2 through the head. The
share is that of matrix products in the time that torch's profiler sees.
"""

from __future__ import annotations

import argparse
import copy
import itertools
import statistics
import time
from unittest import mock

import torch
from torch import Tensor
from torch.profiler import ProfilerActivity, profile
from transformers import PreTrainedModel

import ptq161
from ptq161.allocation import keep_freed_memory
from ptq161.finetune.distillation import Distillation
from ptq161.finetune.student import make_student
from ptq161.kernels import native
from ptq161.models.loading import load_model
from ptq161.models.settings import ModelConfig
from ptq161.numerics import COMPUTE_DTYPES, resolve_dtype
from ptq161.packed.model import measure
from ptq161.training.losses import frozen_copy, objective
from ptq161.training.text import training_tokens

CPU = torch.device("cpu")
PRODUCTS = ("aten::mm", "aten::addmm", "aten::bmm", "aten::baddbmm_")


def main() -> None:
    """Print a line per update."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--blocks", type=int, default=None, help="first blocks of the model; all by default")
    parser.add_argument("--batch-size", type=int, default=4)
    parser.add_argument("--seq-len", type=int, default=256)
    parser.add_argument("--steps", type=int, default=6, help="steps that are timed, after three that warm up")
    parser.add_argument("--updates", nargs="+", choices=("scales", "codes"), default=["scales", "codes"])
    parser.add_argument("--operators", nargs="+", choices=("compiled", "torch"), default=["compiled"])
    options = parser.parse_args()
    keep_freed_memory()  # as a run does
    dtype = resolve_dtype("auto", CPU)[0]
    full, tokenizer = load_model(ModelConfig(name="smollm2_135m", asset="smollm2_135m", n_blocks=options.blocks))
    distillation = Distillation(
        batch_size=options.batch_size, seq_len=options.seq_len, steps=1, held_out=0, compute_dtype=dtype
    )
    tokens = training_tokens(tokenizer, distillation, seed=0)
    method = ptq161.Waterfill(level="linear", codes="rounded", compute_dtype=dtype)
    packed = ptq161.quantize(copy.deepcopy(full), tokens[:, :64], method)
    teacher = frozen_copy(full, COMPUTE_DTYPES[dtype], CPU)
    floor = floor_per_token(packed) * tokens.numel()
    print(f"{options.batch_size} x {options.seq_len} tokens a step, {dtype}, {torch.get_num_threads()} threads")
    for update, operators in itertools.product(options.updates, options.operators):
        settings = Distillation(update=update, steps=1, compute_dtype=dtype)
        with mock.patch.object(native, "usable", native.usable if operators == "compiled" else lambda *_: False):
            seconds, share = step_seconds(packed, teacher, tokens, settings, options.steps)
        print(
            f"{update:8} {operators:8} {tokens.numel() / seconds:6.0f} tokens/s, {seconds:.2f} s a step, "
            f"{100 * share:.0f} % in matrix products; floor {tokens.numel() / floor:.0f} tokens/s, {floor:.2f} s a step"
        )


def step_seconds(
    packed: PreTrainedModel, teacher: PreTrainedModel, tokens: Tensor, distillation: Distillation, steps: int
) -> tuple[float, float]:
    """Return the median seconds of a step, and the share of matrix products in one."""
    student = make_student(packed, teacher, distillation, CPU)
    optimizer, loss_of = student.optimizer(distillation), objective(student.model, teacher, distillation)

    def step() -> float:
        began = time.perf_counter()
        loss_of(tokens).backward()
        optimizer.step()
        optimizer.zero_grad()
        return time.perf_counter() - began

    for _ in range(3):
        step()
    seconds = statistics.median(step() for _ in range(steps))
    with profile(activities=[ProfilerActivity.CPU]) as profiled:
        step()
    events = profiled.key_averages()
    products = sum(event.self_cpu_time_total for event in events if event.key in PRODUCTS)
    return seconds, products / sum(event.self_cpu_time_total for event in events)


def floor_per_token(packed: PreTrainedModel) -> float:
    """Return the seconds that the matrix products of one token take at the rate of a plain bfloat16 product."""
    a, b = (torch.randn(2048, 2048, dtype=torch.bfloat16) for _ in range(2))
    seconds = []
    for _ in range(6):
        began = time.perf_counter()
        a @ b
        seconds.append(time.perf_counter() - began)
    rate = 2 * 2048**3 / min(seconds)
    head = packed.get_output_embeddings().weight.numel()
    linears = measure(packed).linear_weights
    return (linears * (2 + 2 + 4) + head * (2 + 2 + 2)) / rate


if __name__ == "__main__":
    main()
