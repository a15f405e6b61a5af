"""Seconds per decoder block of PTQ1.61 or of learned codes, the share of products, the factor over a plain version.

    python benchmarks/ptq161_block.py                 # a SmolLM2-135M-shaped block, 32 x 512 tokens, 4 epochs
    python benchmarks/ptq161_block.py --width 4096    # a Llama-7B-shaped block, fewer tokens
    python benchmarks/ptq161_block.py --method waterfill --samples 64  # learned codes, without a plain implementation

The plain implementation is what the method's formulas say, term by term: float32, batch 1, eager attention, the whole
fake-quantized weight rebuilt at each step, every gradient by autograd. Both run in one sitting on the same block; a
block's weights are random, which changes no timing. Matrix products are timed by torch's profiler.
"""

from __future__ import annotations

import argparse
import dataclasses
import resource
import time
from collections.abc import Callable

import torch
from torch import Tensor, nn
from torch.profiler import ProfilerActivity, profile
from transformers import LlamaConfig, LlamaForCausalLM

import ptq161
from ptq161.allocation import keep_freed_memory
from ptq161.methods.ptq161 import PTQ161, block_loss, initial_scales, quantize_salient, salient_mask

PRODUCTS = ("aten::mm", "aten::addmm", "aten::bmm", "aten::baddbmm_", "aten::addmv_", "mkldnn::_linear_pointwise")


def main() -> None:
    """Print one line per implementation, then the factors."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--method", choices=("ptq161", "waterfill"), default="ptq161")
    parser.add_argument("--width", type=int, choices=(576, 4096), default=576)
    parser.add_argument("--blocks", type=int, default=2, help="blocks to quantize; memory is printed after each")
    parser.add_argument("--samples", type=int, default=None)
    parser.add_argument("--seq-len", type=int, default=512)
    parser.add_argument("--epochs", type=int, default=4)
    parser.add_argument("--batch-size", type=int, default=4)
    parser.add_argument("--plain-steps", type=int, default=8, help="steps of the plain implementation to time")
    options = parser.parse_args()
    keep_freed_memory()  # as a run does
    samples = options.samples or (32 if options.width == 576 else 2)
    tokens = torch.randint(0, 1000, (samples, options.seq_len), generator=torch.Generator().manual_seed(0))
    print(
        f"{options.method}, width {options.width}, {samples} x {options.seq_len} tokens, {options.epochs} epochs, "
        f"{torch.get_num_threads()} threads"
    )
    if options.method == "waterfill":
        learned = ptq161.Waterfill(
            level="linear", epochs=options.epochs, batch_size=min(2, samples), compute_dtype="bfloat16"
        )
        seconds = seconds_per_block(random_model(options.width, options.blocks), tokens, learned)
        print(f"{'bfloat16':28} {seconds:8.1f} s per block")
        print_share(random_model(options.width, 1), tokens, learned)
        return
    method = PTQ161(
        epochs=options.epochs,
        batch_size=min(options.batch_size, samples),
        compute_dtype="bfloat16",
        scale_lr=5e-3,
        angle_lr=1e-2,
    )
    plain = plain_seconds_per_step(random_model(options.width, 1), tokens[:1], options.plain_steps)
    plain_block = plain * samples * options.epochs
    print(f"plain float32, batch 1       {plain_block:8.1f} s per block ({1000 * plain:.0f} ms a step, extrapolated)")
    for name, used in (("float32", dataclasses.replace(method, compute_dtype="float32")), ("bfloat16", method)):
        seconds = seconds_per_block(random_model(options.width, options.blocks), tokens, used)
        print(f"{name:28} {seconds:8.1f} s per block, {plain_block / seconds:.1f} times faster than plain")
    print_share(random_model(options.width, 1), tokens, method)


def random_model(width: int, n_blocks: int) -> LlamaForCausalLM:
    """Make a random Llama with blocks of SmolLM2-135M's or Llama-7B's shape and a small vocabulary."""
    heads, kv, mlp = (9, 3, 1536) if width == 576 else (32, 32, 11008)
    config = LlamaConfig(
        hidden_size=width,
        intermediate_size=mlp,
        num_attention_heads=heads,
        num_key_value_heads=kv,
        num_hidden_layers=n_blocks,
        vocab_size=1000,
        max_position_embeddings=4096,
    )
    torch.manual_seed(0)
    return LlamaForCausalLM(config).eval()


def seconds_per_block(model: LlamaForCausalLM, tokens: Tensor, method: PTQ161 | ptq161.Waterfill) -> float:
    """Quantize; return the mean seconds of a block, and print the peak memory after each."""
    seconds: list[float] = []

    def print_memory(name: str, value: float, /, **where: int | str) -> None:
        if name == "seconds":
            seconds.append(value)
            peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 1e6
            print(f"    block {where['block']}: {value:.1f} s, peak memory {peak:.2f} GB")

    ptq161.quantize(model, tokens, method, on_metric=print_memory)
    return sum(seconds) / len(seconds)


def print_share(model: LlamaForCausalLM, tokens: Tensor, method: PTQ161 | ptq161.Waterfill) -> None:
    """Print the share of a block's CPU time that matrix products take, those of attention included."""
    with profile(activities=[ProfilerActivity.CPU]) as profiled:
        ptq161.quantize(model, tokens, dataclasses.replace(method, epochs=1))
    events = profiled.key_averages()
    total = sum(event.self_cpu_time_total for event in events)
    spent = sum(e.self_cpu_time_total for e in events if e.key in PRODUCTS or "dot_product" in e.key)
    print(f"bfloat16: {100 * spent / total:.0f} % of the time in matrix products")


class PlainLinear(nn.Module):
    """The binarized linear as its formula says, its weight rebuilt at each step."""

    def __init__(self, linear: nn.Linear, mask: Tensor) -> None:
        """Start from ``linear`` and a salient mask ``[in]``."""
        super().__init__()
        self.weight, self.mask = linear.weight.detach(), mask
        self.mean, scale = initial_scales(self.weight, mask)
        self.scale = nn.Parameter(scale)
        self.row_angle = nn.Parameter(torch.ones_like(scale))
        self.column_angle = nn.Parameter(torch.ones(1, self.weight.shape[1]))

    def forward(self, x: Tensor) -> Tensor:
        """Map ``[..., in]`` to ``[..., out]``."""
        codes, step, zero = quantize_salient(self.weight, self.mask)
        salient = torch.zeros_like(self.weight)
        salient[:, self.mask] = (codes - zero) * step
        binary = self.scale * torch.sign(self.weight - self.mean) + self.mean
        return nn.functional.linear(x, salient + self.row_angle @ self.column_angle * binary * ~self.mask)


def plain_seconds_per_step(model: LlamaForCausalLM, tokens: Tensor, steps: int) -> float:
    """Return the seconds of one optimization step of the plain implementation on the model's first block."""
    model.set_attn_implementation("eager")
    block, outputs = model.model.layers[0], {}

    def keep(_: nn.Module, args: tuple[Tensor, ...], kwargs: dict[str, object], output: Tensor) -> None:
        outputs.update(args=args, kwargs=kwargs, output=output.detach())

    hook = block.register_forward_hook(keep, with_kwargs=True)
    with torch.no_grad():
        model(tokens, use_cache=False)
    hook.remove()
    layers = []
    for name, linear in [(n, m) for n, m in block.named_modules() if isinstance(m, nn.Linear)]:
        activation = torch.rand(linear.in_features)
        layers.append(PlainLinear(linear, salient_mask(activation, 0.2)))
        block.set_submodule(name, layers[-1])
    optimizer = torch.optim.AdamW([p for layer in layers for p in layer.parameters()], weight_decay=0.0)

    def step() -> None:
        output = block(*outputs["args"], **outputs["kwargs"])
        loss = block_loss(output, outputs["output"], outputs["output"])
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()

    return timed(step, steps)


def timed(step: Callable[[], None], repetitions: int) -> float:
    """Return the median seconds of a call, after one that warms up."""
    step()
    seconds = []
    for _ in range(repetitions):
        began = time.perf_counter()
        step()
        seconds.append(time.perf_counter() - began)
    return sorted(seconds)[len(seconds) // 2]


if __name__ == "__main__":
    main()
