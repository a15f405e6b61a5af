"""The table of ``docs/scale.md``: what runs of LLaMA-2's sizes are predicted to take on one GPU.

::

    python benchmarks/scale.py

A model is a folder that holds its ``config.json`` and nothing else. No GPU is needed, and nothing is quantized.
"""

from __future__ import annotations

import contextlib
import dataclasses
import tempfile
from collections.abc import Iterator
from pathlib import Path

import torch
from large_model import SHAPES
from transformers import LlamaConfig

from ptq161.estimate.__main__ import composed
from ptq161.estimate.predict import Estimate, estimate

METHODS = ("rtn", "gptq", "ptq161_paper", "waterfill")
SETTINGS = ("calib=wikitext2", "eval=ppl", "eval.seq_len=2048", "dtype=bfloat16", "device=cpu")
SCORES = ("full precision", "quantized")
"""Phases in which a whole model is on the GPU."""


def main() -> None:
    """Print a row of Markdown for each size and method, in GB."""
    print("| model | method | bits | checkpoint | disk | host | GPU, quantizing | GPU, scoring |")
    print("|---|---|---:|---:|---:|---:|---:|---:|")
    for name in SHAPES:
        with _folder(name) as folder:
            for method in METHODS:
                _print_row(name, method, _estimate(folder, method))


def _estimate(folder: Path, method: str) -> Estimate:
    config = composed([f"model.path={folder}", f"method={method}", *SETTINGS])
    return estimate(dataclasses.replace(config, device=torch.device("cuda")), measure_time=False)


def _print_row(name: str, method: str, found: Estimate) -> None:
    assert found.sizes is not None
    phases = found.memory.items()
    quantizing = max(held.device for phase, held in phases if phase not in SCORES)
    scoring = max(held.device for phase, held in phases if phase in SCORES)
    figures = [found.sizes.checkpoint_bytes, found.disk_bytes, found.host_bytes, quantizing, scoring]
    cells = [f"{found.sizes.bits_per_weight:.3f}", *(f"{n_bytes / 1e9:.3g}" for n_bytes in figures)]
    print(f"| {name} | `{method}` | {' | '.join(cells)} |", flush=True)


@contextlib.contextmanager
def _folder(name: str) -> Iterator[Path]:
    config = LlamaConfig(**SHAPES[name], vocab_size=32000, max_position_embeddings=4096, dtype="bfloat16")
    with tempfile.TemporaryDirectory() as place:
        config.save_pretrained(place)
        yield Path(place)


if __name__ == "__main__":
    main()
