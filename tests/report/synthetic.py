"""Many records at once, of the shape that a sweep leaves."""

from __future__ import annotations

import json
import math
from pathlib import Path

import numpy as np

N_BLOCKS, N_EPOCHS = 30, 4
LINEARS = ("q_proj", "k_proj", "v_proj", "o_proj", "gate_proj", "up_proj", "down_proj")
METHODS = {"ptq161": 1.72, "billm": 2.96, "pb_llm": 2.79, "omniquant": 2.05, "gptq": 2.06}
FULL = {"ppl/boolq@512": 18.0, "zero_shot/piqa/acc": 0.66, "bits_per_weight": 16.0, "nominal_bits_per_weight": 16.0}


def write_records(folder: Path, n_runs: int, *, with_metrics: int) -> None:
    """Write ``folder/0`` and so on: runs over methods, learning rates, ratios and three seeds each.

    The first ``with_metrics`` of them have the numbers of 30 blocks of 7 linears, the others none.
    """
    generator = np.random.default_rng(0)
    for i in range(n_runs):
        step, method, seed = i // (3 * len(METHODS)), list(METHODS)[i // 3 % len(METHODS)], i % 3
        settings = {"lr": round(1e-4 * (step + 1), 6), "mask_ratio": round(0.005 * (step % 80), 4)}
        ppl = 100 * math.exp(math.sin(step / 9) + 0.1 * generator.standard_normal()) * len(method)
        _write(folder / str(i), method, seed, settings, ppl)
        if i < with_metrics:
            (folder / str(i) / "metrics.jsonl").write_text("".join(_lines(generator)))


def _write(folder: Path, method: str, seed: int, settings: dict[str, float], ppl: float) -> None:
    folder.mkdir(parents=True)
    config = {
        "mask_ratio": 0.2,
        "block_size": 1,
        "seed": seed,
        "device": "auto",
        "dtype": "auto",
        "model": {"name": "tiny", "path": None, "repo": None, "asset": "tiny"},
        "method": {"name": method, "epochs": 4, "batch_size": 4, "scale_dtype": "float16", **settings},
        "calib": {"name": "squad", "n_samples": 32, "seq_len": 512},
        "preprocess": {"name": "none"},
        "eval": {"name": "quick", "corpora": ["boolq"], "limit": 200},
        "tracker": {"name": "none"},
    }
    manifest = {
        "schema_version": 1,
        "exit_state": "finished",
        "start": "2026-01-01T00:00:00.000+00:00",
        "git": {"commit": "0123456789abcdef", "dirty": False},
        "seeds": {"seed": seed},
        "dtype": "bfloat16",
    }
    results = {
        "schema_version": 1,
        "metrics": {
            "ppl/boolq@512": ppl,
            "zero_shot/piqa/acc": 0.7 - 0.02 * math.log(ppl),
            "bits_per_weight": METHODS[method] + settings["mask_ratio"],
            "nominal_bits_per_weight": 1.6,
        },
        "full_precision": FULL,
        "protocol": {},
        "peak_memory_bytes": 2e9 + 1e6 * seed,
        "seconds": {"load": 3.0, "quantize": 100.0 + seed, "evaluate": 50.0},
    }
    # JSON is YAML.
    for name, content in (("config.yaml", config), ("manifest.json", manifest), ("results.json", results)):
        (folder / name).write_text(json.dumps(content))


def _lines(generator: np.random.Generator) -> list[str]:
    lines = []
    for block in range(N_BLOCKS):
        for epoch in range(N_EPOCHS):
            lines.append(_line("loss", 2.0 * (block + 1) / (epoch + 1), block=block, epoch=epoch))
        for linear in LINEARS:
            name = f"{block}.self_attn.{linear}"
            lines.append(_line("output_error", float(np.exp(generator.standard_normal())), linear=name))
            lines.append(_line("salient_channels", 116.0, linear=name))
            lines.append(_line("nbytes", 72416.0, linear=name))
            lines.append(_line("bits_per_weight", 1.746, linear=name))
        lines.append(_line("seconds", 5.0, block=block))
    return lines


def _line(name: str, value: float, **where: int | str) -> str:
    return json.dumps({"time": 1.0, "name": name, "value": value, **where}) + "\n"
