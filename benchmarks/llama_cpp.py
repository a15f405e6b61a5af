"""Tokens per second of llama.cpp at 1.7 and 2.1 bits, for a model of LLaMA-2-7B's shape, beside ``large_model.py``.

::

    pip install xllamacpp                              # llama.cpp as a wheel; not among this project's requirements
    python benchmarks/llama_cpp.py                     # all 32 blocks: 1.4 to 1.8 GB on the disk
    python benchmarks/llama_cpp.py --types TQ1_0 --blocks 2

All linears are of one type, all blocks have the same random bytes, embedding and head are float16 with as many rows as
LLaMA-2's: what a token costs does not depend on what it says. The file is deleted afterwards.
"""

from __future__ import annotations

import argparse
import json
import tempfile
from pathlib import Path
from typing import Any

import numpy as np
import torch
from gguf import GGML_QUANT_SIZES, GGMLQuantizationType, GGUFWriter

HIDDEN, MLP, HEADS, VOCABULARY = 4096, 11008, 32, 32000
SHAPES = {
    "attn_q": (HIDDEN, HIDDEN),
    "attn_k": (HIDDEN, HIDDEN),
    "attn_v": (HIDDEN, HIDDEN),
    "attn_output": (HIDDEN, HIDDEN),
    "ffn_gate": (MLP, HIDDEN),
    "ffn_up": (MLP, HIDDEN),
    "ffn_down": (HIDDEN, MLP),
}
SCALE_AT = {"TQ1_0": -2, "TQ2_0": -2, "IQ2_XXS": 0}
"""Where a block of a type has its float16 scale."""


def main() -> None:
    """Print a line of JSON for each type."""
    parser = argparse.ArgumentParser(description="Tokens per second of llama.cpp at about 2 bits.")
    parser.add_argument("--types", nargs="+", choices=SCALE_AT, default=list(SCALE_AT))
    parser.add_argument("--blocks", type=int, default=32)
    parser.add_argument("--tokens", type=int, default=32, help="to generate, after one that reads the file")
    parser.add_argument("--threads", type=int, default=torch.get_num_threads())
    options = parser.parse_args()
    for name in options.types:
        with tempfile.TemporaryDirectory(prefix="llama_cpp.") as folder:
            file = Path(folder, "model.gguf")
            bits = write_model(file, GGMLQuantizationType[name], options.blocks)
            speed = tokens_per_second(file, options.tokens, options.threads)
            size = file.stat().st_size
        found = {"type": name, "blocks": options.blocks, "bits_per_weight": bits, "bytes": size}
        print(json.dumps({**found, "threads": options.threads, "tokens_per_second": round(speed, 2)}), flush=True)


def write_model(file: Path, kind: GGMLQuantizationType, n_blocks: int) -> float:
    """Write a random model; return the bits of a weight of its linears."""
    writer = GGUFWriter(file, "llama")
    writer.add_context_length(4096)
    writer.add_embedding_length(HIDDEN)
    writer.add_block_count(n_blocks)
    writer.add_feed_forward_length(MLP)
    writer.add_head_count(HEADS)
    writer.add_layer_norm_rms_eps(1e-5)
    writer.add_rope_dimension_count(HIDDEN // HEADS)
    writer.add_tokenizer_model("llama")
    words = ["<unk>", "<s>", "</s>", *(f"<0x{i:02X}>" for i in range(256))]
    words += [f"w{i}" for i in range(VOCABULARY - len(words))]
    writer.add_token_list(words)
    writer.add_token_scores([0.0] * VOCABULARY)
    writer.add_token_types([2, 3, 3, *[6] * 256, *[1] * (VOCABULARY - 259)])
    random = np.random.default_rng(0)
    rows = random.standard_normal((VOCABULARY, HIDDEN), dtype=np.float32).astype(np.float16)
    writer.add_tensor("token_embd.weight", rows)
    writer.add_tensor("output.weight", rows)
    writer.add_tensor("output_norm.weight", np.ones(HIDDEN, np.float32))
    linears = {name: random_bytes(shape, kind, random) for name, shape in SHAPES.items()}
    for block in range(n_blocks):
        for name in ("attn_norm", "ffn_norm"):
            writer.add_tensor(f"blk.{block}.{name}.weight", np.ones(HIDDEN, np.float32))
        for name, data in linears.items():
            writer.add_tensor(f"blk.{block}.{name}.weight", data, raw_dtype=kind)
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()
    weights, n_bytes = GGML_QUANT_SIZES[kind]
    return 8 * n_bytes / weights


def random_bytes(shape: tuple[int, int], kind: GGMLQuantizationType, random: np.random.Generator) -> Any:
    """Return random codes of a type under one small scale: ``[out, bytes of a row]`` uint8."""
    weights, n_bytes = GGML_QUANT_SIZES[kind]
    blocks = random.integers(0, 256, (shape[0] * shape[1] // weights, n_bytes), dtype=np.uint8)
    scale = np.frombuffer(np.float16(0.01).tobytes(), np.uint8)
    at = SCALE_AT[kind.name] % n_bytes
    blocks[:, at : at + 2] = scale
    return blocks.reshape(shape[0], -1)


def tokens_per_second(file: Path, n_tokens: int, threads: int) -> float:
    """Return the speed that llama.cpp itself reports for tokens behind the first."""
    import xllamacpp

    params = xllamacpp.CommonParams()
    params.model.path = str(file)
    params.n_ctx, params.n_parallel, params.warmup = 256, 1, True
    params.cpuparams.n_threads = params.cpuparams_batch.n_threads = threads
    server = xllamacpp.Server(params)
    request = {"prompt": [1, 300], "n_predict": n_tokens, "temperature": 0.0, "ignore_eos": True, "cache_prompt": False}
    server.handle_completions(request)
    answer = server.handle_completions(request)
    return float(answer["timings"]["predicted_per_second"])


if __name__ == "__main__":
    main()
