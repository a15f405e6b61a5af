"""Microseconds of a few rows with a packed weight on a GPU, and tokens per second of a packed model.

    python benchmarks/decode_gpu.py                 # linears of 7B models, eight blocks of LLaMA-2-7B's shape
    python benchmarks/decode_gpu.py --rows 1 4 16 64 --no-model

"graph" is the time in a CUDA graph, which holds nothing but the kernels; "eager" the time of a call from Python. Each
contestant has copies of its weight, which take turns and are larger together than the cache of the GPU, so that a
weight comes from memory, as in a large model. "floor" is the time in which the GPU reads a contestant's bytes, by a
copy of 1 GB in the same sitting. Weights are random, which changes no timing.
"""

from __future__ import annotations

import argparse
import copy
import time
from collections.abc import Callable

import torch
from decode import SHAPES, Decoding, packed_weights, product
from torch import nn
from torch.nn import functional as F
from transformers import LlamaConfig, LlamaForCausalLM, PreTrainedModel

from ptq161.models.architectures import quantized_linears
from ptq161.packed.linear import PackedLinear
from ptq161.packed.model import densify
from ptq161.packed.weight import PackedWeight

CACHE_BYTES = 2 * 10**8
"""More than any GPU's cache holds."""
Calls = list[Callable[[], object]]


def main() -> None:
    """Print a table for each shape and for the model."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--rows", type=int, nargs="+", default=[1], help="rows of the linears' input")
    parser.add_argument("--blocks", type=int, default=8, help="of the model; LLaMA-2-7B has 32")
    parser.add_argument("--tokens", type=int, default=64, help="to generate with each model")
    parser.add_argument("--no-linears", action="store_true")
    parser.add_argument("--no-model", action="store_true")
    options = parser.parse_args()
    if not torch.cuda.is_available():
        raise SystemExit("benchmarks/decode_gpu.py needs a GPU, and torch finds none.")
    torch.manual_seed(0)
    bandwidth = copy_bandwidth()
    name = torch.cuda.get_device_name()
    print(f"{name}, {bandwidth / 1e12:.2f} TB/s in a copy, torch {torch.__version__}")
    with torch.device("cuda"), torch.inference_mode():
        if not options.no_linears:
            for shape in SHAPES:
                for rows in options.rows:
                    print_linears(*shape, rows, bandwidth)
        if not options.no_model:
            print_models(options.blocks, options.tokens)


def print_linears(rows: int, columns: int, n: int, bandwidth: float) -> None:
    """Print the times of ``n`` rows with each kind of weight of ``[rows, columns]``; activations are bfloat16."""
    print(f"\n{n} row(s) with a weight of {rows} x {columns}, microseconds")
    print(f"{'':32}{'MB':>8}{'floor':>9}{'graph':>9}{'eager':>9}{'x bf16':>9}")
    x, weight = torch.randn(n, columns).bfloat16(), torch.randn(rows, columns).bfloat16()
    contestants: dict[str, tuple[Callable[[int], Calls], int]] = {
        "torch bfloat16": (
            lambda copies: [lambda w=w: F.linear(x, w) for w in repeated(weight, copies)],
            2 * weight.numel(),
        )
    }
    for name, packed in packed_weights(rows, columns).items():
        contestants[name] = (
            lambda copies, packed=packed: [lambda p=p: product(p, x) for p in copies_of(packed, copies)],
            packed.nbytes,
        )
        if n > 1:
            contestants[f"{name}, dequantized"] = (
                lambda copies, packed=packed: [
                    lambda p=p: F.linear(x, p.dense(x.dtype)) for p in copies_of(packed, copies)
                ],
                packed.nbytes,
            )
    base = 0.0
    for name, (calls_of, nbytes) in contestants.items():
        calls = calls_of(max(4, -(-CACHE_BYTES // nbytes)))
        graph, eager = graph_seconds(calls), eager_seconds(calls)
        base = base or graph
        print(
            f"{name:32}{nbytes / 1e6:8.1f}{1e6 * nbytes / bandwidth:9.1f}{1e6 * graph:9.1f}{1e6 * eager:9.1f}", end=""
        )
        print(f"{base / graph:9.2f}", flush=True)


def print_models(blocks: int, tokens: int) -> None:
    """Print the milliseconds of a token of each model, called from Python."""
    packed = random_model(blocks)
    dense = copy.deepcopy(packed)
    densify(dense)
    print(f"\na token of {blocks} blocks of LLaMA-2-7B's shape, milliseconds, eager")
    for name, model in (("torch bfloat16", dense.bfloat16()), ("PTQ1.61, packed", packed)):
        step = Decoding(model, tokens)
        step.next = step.next.cuda()
        eager_seconds([step] * 4)
        print(f"{name:32}{1e3 * eager_seconds([step] * tokens):9.2f}")


def random_model(blocks: int) -> PreTrainedModel:
    """Make blocks of LLaMA-2-7B's shape with random packed weights."""
    config = LlamaConfig(num_hidden_layers=blocks, vocab_size=32000)
    with torch.device("meta"):
        model = LlamaForCausalLM(config)
    made: dict[tuple[int, int], PackedWeight] = {}
    for name, linear in quantized_linears(model):
        assert isinstance(linear, nn.Linear)
        shape = (linear.out_features, linear.in_features)
        if shape not in made:
            made[shape] = next(iter(packed_weights(*shape).values()))
        block, _, path = name.partition(".")
        model.model.layers[int(block)].set_submodule(path, PackedLinear(copies_of(made[shape], 1)[0]))
    for parent in model.modules():
        for name, parameter in parent.named_parameters(recurse=False):
            if parameter.is_meta:
                fresh = 0.02 * torch.randn(parameter.shape)
                setattr(parent, name, nn.Parameter(fresh.bfloat16(), requires_grad=False))
    model.model.rotary_emb = type(model.model.rotary_emb)(config)
    return model.eval()


def copies_of(packed: PackedWeight, n: int) -> list[PackedWeight]:
    """Return ``n`` weights with the same bytes in other memory."""
    return [packed.with_tensors({k: t.clone() for k, t in packed.state_dict().items()}) for _ in range(n)]


def repeated(weight: torch.Tensor, n: int) -> list[torch.Tensor]:
    """Return ``n`` copies."""
    return [weight.clone() for _ in range(n)]


def copy_bandwidth() -> float:
    """Return bytes per second that are read and written while 1 GB is copied."""
    source = torch.empty(10**9, dtype=torch.uint8, device="cuda")
    target = torch.empty_like(source)
    return 2 * source.numel() / graph_seconds([lambda: target.copy_(source)] * 4)


def graph_seconds(calls: Calls, repetitions: int = 10) -> float:
    """Return the seconds of a call in a CUDA graph of all of them, the least of some repetitions."""
    for call in calls[:2]:
        call()
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        for call in calls:
            call()
    best = float("inf")
    for _ in range(repetitions):
        began, ended = (torch.cuda.Event(enable_timing=True) for _ in range(2))
        began.record()
        graph.replay()
        ended.record()
        ended.synchronize()
        best = min(best, began.elapsed_time(ended))
    return 1e-3 * best / len(calls)


def eager_seconds(calls: Calls) -> float:
    """Return the seconds of a call from Python."""
    torch.cuda.synchronize()
    began = time.perf_counter()
    for call in calls:
        call()
    torch.cuda.synchronize()
    return (time.perf_counter() - began) / len(calls)


if __name__ == "__main__":
    main()
