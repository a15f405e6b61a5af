"""Seconds that each layer-wise method takes: on the embedded model, and per linear as it grows wider.

    python benchmarks/layerwise_methods.py [--methods pb_llm billm] [--n-blocks 30] [--n-samples 32] [--seq-len 512]
        [--compute-dtype float32] [--rounds 1] [--widths 256 512 1024 2048]

First table: SmolLM2-135M through ``ptq161.quantize``, statistics and the propagation of the chain included, in total
and per block; the processor time of all threads beside it, which other work on the machine disturbs less. Thirty
blocks with every method take a few minutes on two cores; ``--n-blocks 4`` is enough for the seconds per block. The
methods are the presets of these names; ``--rounds`` takes them in turn several times.
Second table: one linear ``[width, width]`` from its hessian on; of GPTQ, PB-LLM and BiLLM without the factorization,
which linears that share an input share. In brackets the exponent of growth over the width before: 2 is proportional
to the number of weights, 3 to a product with the hessian.
"""

from __future__ import annotations

import argparse
import itertools
import math
import statistics
import time
from collections import defaultdict
from collections.abc import Callable
from functools import partial

import torch
from hydra import compose, initialize_config_dir

import ptq161
from ptq161.data.calibration import calibration_tokens
from ptq161.data.settings import CalibConfig
from ptq161.methods import awq, billm, gptq, pb_llm, quip, rtn
from ptq161.methods.base import Method, OnMetric
from ptq161.methods.compensation import inverse_factor
from ptq161.models.loading import load_model
from ptq161.models.settings import ModelConfig
from ptq161.numerics import COMPUTE_DTYPES
from ptq161.run.conf import CONF
from ptq161.run.config import load_run_config

METHODS = ("rtn", "gptq", "awq", "quip", "pb_llm", "billm", "quant_dllm", "vptq_1_06", "vptq_1_5", "vptq_1_6")
"""Presets of ``conf/method``."""


def main() -> None:
    """Print both tables."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--methods", nargs="*", default=METHODS, choices=METHODS)
    parser.add_argument("--n-blocks", type=int, default=30)
    parser.add_argument("--n-samples", type=int, default=32)
    parser.add_argument("--seq-len", type=int, default=512)
    parser.add_argument("--compute-dtype", default="float32", choices=list(COMPUTE_DTYPES))
    parser.add_argument("--rounds", type=int, default=1)
    parser.add_argument("--widths", type=int, nargs="*", default=[256, 512, 1024, 2048])
    args = parser.parse_args()
    print(f"torch threads: {torch.get_num_threads()}")
    if args.n_blocks:
        methods = [(name, preset(name, args.compute_dtype)) for name in args.methods]
        time_model(methods * args.rounds, args.n_blocks, args.n_samples, args.seq_len)
    if args.widths:
        time_widths(args.widths)


def preset(name: str, dtype: str) -> Method:
    """Return the method of a preset, on the default model."""
    with initialize_config_dir(str(CONF), version_base="1.3"):
        return load_run_config(compose("config", [f"method={name}", f"dtype={dtype}"])).method


def time_model(methods: list[tuple[str, Method]], n_blocks: int, n_samples: int, seq_len: int) -> None:
    """Quantize the embedded model with each method."""
    print(f"SmolLM2-135M, {n_blocks} blocks, {n_samples} x {seq_len} tokens")
    print(f"{'method':10} {'total s':>8} {'CPU s':>8} {'median s/block':>15} {'bits/weight':>12}")
    config = ModelConfig(name="smollm2_135m", asset="smollm2_135m", n_blocks=n_blocks)
    for name, method in methods:
        model, tokenizer = load_model(config)
        tokens = calibration_tokens(tokenizer, CalibConfig("squad", n_samples, seq_len), seed=0)
        recorded: dict[str, list[float]] = defaultdict(list)
        weights = n_weights(model)
        began, began_cpu = time.perf_counter(), time.process_time()
        ptq161.quantize(model, tokens, method, on_metric=append_to(recorded))
        total, total_cpu = time.perf_counter() - began, time.process_time() - began_cpu
        bits = 8 * sum(recorded["nbytes"]) / weights
        median = statistics.median(recorded["seconds"])
        print(f"{name:10} {total:8.1f} {total_cpu:8.1f} {median:15.2f} {bits:12.2f}", flush=True)


def append_to(recorded: dict[str, list[float]]) -> OnMetric:
    """Return an ``on_metric`` that appends each value to the list of its name."""

    def on_metric(name: str, value: float, /, **where: int | str) -> None:
        recorded[name].append(value)

    return on_metric


def n_weights(model: torch.nn.Module) -> int:
    """Weights in the linears of a model's decoder blocks."""
    linears = [m for n, m in model.named_modules() if isinstance(m, torch.nn.Linear) and ".layers." in n]
    return sum(linear.weight.numel() for linear in linears)


def time_widths(widths: list[int]) -> None:
    """Quantize one square linear of each width with each method."""
    rows: dict[str, list[float]] = {}
    for width in widths:
        generator = torch.Generator().manual_seed(width)
        weight = torch.randn(width, width, generator=generator) * 0.05
        inputs = torch.randn(2 * width, width, generator=generator)
        hessian = 2 * inputs.T @ inputs
        factor = inverse_factor(hessian)
        calls: dict[str, Callable[[], object]] = {
            "factor": partial(inverse_factor, hessian),
            "rtn": partial(rtn.quantize_weight, weight, 2),
            "gptq": partial(gptq.GPTQ(bits=2).quantize_linear, weight, factor),
            "awq": partial(awq.quantize_weight, weight, hessian, inputs.abs().mean(0), 2),
            "quip": partial(quip.quantize_weight, weight, hessian, 2, rescale=False),
            "pb_llm": partial(pb_llm.PBLLM(saliency="hessian").quantize_linear, weight, factor),
            "billm": partial(billm.BiLLM(saliency="hessian").quantize_linear, weight, factor),
        }
        for name, call in calls.items():
            rows.setdefault(name, []).append(fastest(call))
    print("seconds for one linear [width, width]")
    print(f"{'':8}" + "".join(f"{width:>16}" for width in widths))
    for name, seconds in rows.items():
        growth = [""] + [f" ({exponent:.1f})" for exponent in exponents(widths, seconds)]
        print(f"{name:8}" + "".join(f"{f'{s:.3f}{g}':>16}" for s, g in zip(seconds, growth, strict=True)))


def exponents(widths: list[int], seconds: list[float]) -> list[float]:
    """Return e between neighbors where seconds grow like width to the power of e."""
    points = itertools.pairwise(zip(widths, seconds, strict=True))
    return [math.log(after / before) / math.log(wide / narrow) for (narrow, before), (wide, after) in points]


def fastest(call: Callable[[], object], repeats: int = 2) -> float:
    """Return the seconds of the fastest of a few calls."""
    times = []
    for _ in range(repeats):
        began = time.perf_counter()
        call()
        times.append(time.perf_counter() - began)
    return min(times)


if __name__ == "__main__":
    main()
