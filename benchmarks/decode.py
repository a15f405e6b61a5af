"""Seconds of one row with a packed weight, and tokens per second of a packed model, against dense ones in one sitting.

    python benchmarks/decode.py                                  # linears of 7B models, a SmolLM2-135M-shaped model
    python benchmarks/decode.py --checkpoint FOLDER --no-linears # a packed checkpoint of your own
    python benchmarks/decode.py --rows 24 --no-model             # where dequantizing first begins to pay

Contestants take turns, so that whatever else the machine does meets all of them; the table has the least and the median
of their times, and the ratio of the least ones to bfloat16's. "floor" is the time in which the processor reads a
contestant's bytes from memory, by a sum over 256 MB in the same sitting. 64 MB of other memory are read before each
call, so that a weight comes from memory, as in a large model. Weights are random, which changes no timing.
"""

from __future__ import annotations

import argparse
import copy
import statistics
import time
from collections.abc import Callable

import torch
from torch import Tensor
from torch.nn import functional as F
from transformers import DynamicCache, LlamaConfig, LlamaForCausalLM, PreTrainedModel

import ptq161
from ptq161.packed.allotted import AllottedWeight, Grid
from ptq161.packed.billm import BiLLMWeight, BinaryGrid, BinaryPlanes
from ptq161.packed.fp4 import FP4Weight
from ptq161.packed.gse import GseWeight, quantize
from ptq161.packed.linear import tiled_product
from ptq161.packed.model import cast_rest, densify, measure, packed_linears
from ptq161.packed.nf4 import NF4Weight
from ptq161.packed.pb_llm import PBLLMWeight
from ptq161.packed.quip import QuIPWeight
from ptq161.packed.row_column_binary import RowColumnBinaryWeight
from ptq161.packed.structured_binary import StructuredBinaryWeight
from ptq161.packed.uniform import UniformWeight
from ptq161.packed.vector import Coded, VectorWeight
from ptq161.packed.weight import PackedWeight

SHAPES = ((4096, 4096), (4096, 11008))
Contestants = dict[str, tuple[Callable[[], object], int]]
"""What is timed, and the bytes of its weight."""


def main() -> None:
    """Print a table for each shape and for the model."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--threads", type=int, default=torch.get_num_threads())
    parser.add_argument("--repetitions", type=int, default=50)
    parser.add_argument("--tokens", type=int, default=32, help="to generate with each model, in each of 3 rounds")
    parser.add_argument("--checkpoint", help="a packed checkpoint in place of the random model")
    parser.add_argument("--rows", type=int, default=1, help="rows of the linears' input")
    parser.add_argument("--no-linears", action="store_true")
    parser.add_argument("--no-model", action="store_true")
    options = parser.parse_args()
    torch.set_num_threads(options.threads)
    torch.manual_seed(0)
    bandwidth = read_bandwidth()
    print(f"{options.threads} threads, {bandwidth / 1e9:.1f} GB/s read from memory, torch {torch.__version__}")
    if not options.no_linears:
        for shape in SHAPES:
            print(f"\n{options.rows} row(s) with a weight of {shape[0]} x {shape[1]}, milliseconds")
            contestants = linears(*shape, options.rows)
            print_table(contestants, race(contestants, options.repetitions), bandwidth)
    if not options.no_model:
        print("\na token of the whole model, milliseconds")
        contestants = models(options.checkpoint, options.tokens)
        with torch.inference_mode():
            times = race(contestants, 3 * options.tokens)
        print_table(contestants, times, bandwidth)


def linears(rows: int, columns: int, n: int) -> Contestants:
    """Return one product with each kind of weight of ``[rows, columns]``; activations are bfloat16 but for float32."""
    weight, x = torch.randn(rows, columns), torch.randn(n, columns)
    half, short = weight.bfloat16(), x.bfloat16()
    codes = torch.randint(0, 16, (rows, columns), dtype=torch.int32)
    four = torch.ops.aten._convert_weight_to_int4pack_for_cpu(codes, 1)
    grid = torch.rand(columns // 128, rows, 2).bfloat16()
    found: Contestants = {
        "torch float32": (lambda: F.linear(x, weight), 4 * weight.numel()),
        "torch bfloat16": (lambda: F.linear(short, half), 2 * weight.numel()),
        "torch int4, groups of 128": (
            lambda: torch.ops.aten._weight_int4pack_mm_for_cpu(short, four, 128, grid),
            codes.numel() // 2 + 2 * grid.numel(),
        ),
    }
    for name, packed in packed_weights(rows, columns).items():
        found[name] = (lambda packed=packed: product(packed, short), packed.nbytes)
        if type(packed).segments is not PackedWeight.segments:
            found[f"{name}, int8"] = (lambda packed=packed: product(packed, short, int8=True), packed.nbytes)
        if n > 1:
            found[f"{name}, dequantized"] = (lambda packed=packed: tiled_product(packed, short), packed.nbytes)
    return found


def packed_weights(rows: int, columns: int) -> dict[str, PackedWeight]:
    """Make a random weight of each format that has a product from its bytes."""
    salient = torch.rand(columns) < 0.2
    n = int(salient.sum())
    bits = torch.tensor([1, 2, 4])[torch.multinomial(torch.tensor([0.55, 0.35, 0.1]), columns, replacement=True)]
    grid = Grid(torch.rand(rows, 1), torch.rand(columns), torch.rand(rows, 1), torch.full((rows, 1), 8.0))
    return {
        "PTQ1.61 (1.6 bits)": StructuredBinaryWeight.pack(
            mask=salient,
            sign=torch.rand(rows, columns - n) > 0.5,
            scale=torch.rand(rows, 1),
            mean=torch.rand(rows, 1),
            column_angle=torch.rand(columns - n),
            codes=torch.randint(0, 16, (rows, n)),
            salient_scale=torch.rand(rows, 1),
            salient_zero_point=torch.full((rows, 1), 8.0),
            salient_bits=4,
            scale_dtype="float16",
        ),
        "water-filling (1.65 bits)": AllottedWeight.pack(
            (torch.rand(rows, columns) * 2.0**bits).long(), bits, grid, tiers=[1, 2, 4]
        ),
        **{
            f"uniform {b} bits": UniformWeight.pack(
                torch.randint(0, 2**b, (rows, columns)), torch.rand(rows, 1), torch.ones(rows, 1), bits=b
            )
            for b in (2, 3, 4)
        },
        **other_weights(rows, columns),
    }


def other_weights(rows: int, columns: int) -> dict[str, PackedWeight]:
    """Make a random weight of each format whose product is in float32 only, at the defaults of its method."""
    blocks = columns // 128
    signs = [torch.rand(rows, columns) > 0.5 for _ in range(3)]
    one = torch.ones(rows, 1)
    codes = torch.randint(0, 256, (rows, columns), dtype=torch.uint8)
    vectors = Coded(torch.randn(1, 512, 6), torch.randint(0, 512, (-(-rows // 6), columns)))
    return {
        "VPTQ, 512 vectors of 6": VectorWeight.pack(vectors, (rows, columns)),
        "QuIP 2 bits, butterfly": QuIPWeight.pack(codes % 4, torch.ones(1), 2, rotation="butterfly", seed=0),
        "QuIP 2 bits, Hadamard": QuIPWeight.pack(codes % 4, torch.ones(1), 2, rotation="hadamard", seed=0),
        "BiLLM": BiLLMWeight.pack(
            BinaryPlanes(torch.rand(columns) < 0.08, *signs),
            BinaryGrid(torch.rand(4, rows, blocks), torch.rand(3, rows, blocks)),
            column_block=128,
        ),
        "PB-LLM": PBLLMWeight.pack(
            torch.rand(rows, columns) < 0.1,
            signs[0],
            codes,
            means=one,
            scales=one,
            high_scales=one,
            high_zero_points=128 * one,
            high_bit=8,
        ),
        "Quant-dLLM, 2 signs": RowColumnBinaryWeight.pack(
            orders=torch.full((columns,), 2),
            signs=torch.stack(signs[:2]),
            row_scales=torch.rand(2, rows, blocks),
            column_scales=torch.rand(2, columns),
            column_block=128,
        ),
        "NF4": NF4Weight.pack(codes % 16, torch.rand(rows, columns // 64)),
        "NVFP4": FP4Weight.rounded(torch.randn(rows, columns), "nvfp4"),
        "GSE 5 bits": GseWeight.pack(*quantize(torch.randn(rows, columns), 5), 5),
    }


def product(packed: PackedWeight, x: Tensor, *, int8: bool = False) -> Tensor:
    """Multiply from the packed bytes, or end: a fallback would be timed as what it is not."""
    y = packed.rows_product(x, None, int8=int8)
    if y is None:
        raise SystemExit("no compiled operator on this machine")
    return y


def models(checkpoint: str | None, tokens: int) -> Contestants:
    """Return the step to the next token with a packed model, exact and int8, and with its dense forms."""
    packed = random_model() if checkpoint is None else ptq161.load(checkpoint)[0]
    cast_rest(packed, torch.bfloat16)
    size = measure(packed)
    dense = copy.deepcopy(packed)
    densify(dense)
    full = copy.deepcopy(dense).float()
    nbytes = {id(m): sum(p.numel() * p.element_size() for p in m.parameters()) for m in (dense, full)}
    packed_bytes = size.linear_bytes + size.other_bytes

    rounded = copy.deepcopy(packed)
    for layer in packed_linears(rounded).values():
        layer.int8 = True
    return {
        "dense float32": (Decoding(full, tokens), nbytes[id(full)]),
        "torch bfloat16": (Decoding(dense, tokens), nbytes[id(dense)]),
        "packed": (Decoding(packed, tokens), packed_bytes),
        "packed, int8": (Decoding(rounded, tokens), packed_bytes),
    }


class Decoding:
    """Greedy decoding with a cache of keys and values; each call is one token, and a text ends after ``tokens``."""

    def __init__(self, model: PreTrainedModel, tokens: int) -> None:
        """Begin before the first token."""
        self.model, self.tokens = model.eval(), tokens
        self.next, self.cache = torch.tensor([[1]]), DynamicCache()

    def __call__(self) -> None:
        """Make the next token."""
        if self.cache.get_seq_length() >= self.tokens:
            self.next, self.cache = torch.tensor([[1]]), DynamicCache()
        output = self.model(self.next, past_key_values=self.cache, use_cache=True, logits_to_keep=1)
        self.next = output.logits[:, -1:].argmax(-1)


def random_model() -> PreTrainedModel:
    """Make a packed model of SmolLM2-135M's shape with random weights, quantized with PTQ1.61 without optimization."""
    config = LlamaConfig(
        hidden_size=576,
        intermediate_size=1536,
        num_attention_heads=9,
        num_key_value_heads=3,
        num_hidden_layers=30,
        vocab_size=49152,
        tie_word_embeddings=True,
        max_position_embeddings=2048,
    )
    return ptq161.quantize(LlamaForCausalLM(config), torch.randint(0, 1000, (1, 64)), ptq161.PTQ161(epochs=0))


def read_bandwidth() -> float:
    """Return bytes per second of the fastest of ten sums over 256 MB."""
    block = torch.ones(2**26)
    nbytes = block.numel() * block.element_size()
    return nbytes / min(race({"sum": (block.sum, nbytes)}, 10)["sum"])


def race(contestants: Contestants, repetitions: int) -> dict[str, list[float]]:
    """Return the seconds of each call; contestants take turns, after one call each that warms up."""
    for run, _ in contestants.values():
        run()
    times: dict[str, list[float]] = {name: [] for name in contestants}
    others = torch.ones(2**24)
    for _ in range(repetitions):
        for name, (run, _) in contestants.items():
            others.sum()  # 64 MB between two calls: no weight waits in the processor's cache, as in a large model
            began = time.perf_counter()
            run()
            times[name].append(time.perf_counter() - began)
    return times


def print_table(contestants: Contestants, times: dict[str, list[float]], bandwidth: float) -> None:
    """Print least, median, floor and the factor over bfloat16 of each contestant."""
    base = min(times["torch bfloat16"])
    print(f"{'':32}{'MB':>8}{'floor':>9}{'least':>9}{'median':>9}{'x bf16':>9}")
    for name, (_, nbytes) in contestants.items():
        least, median = min(times[name]), statistics.median(times[name])
        columns = (1e3 * nbytes / bandwidth, 1e3 * least, 1e3 * median)
        print(f"{name:32}{nbytes / 1e6:8.1f}" + "".join(f"{value:9.3f}" for value in columns) + f"{base / least:9.2f}")


if __name__ == "__main__":
    main()
