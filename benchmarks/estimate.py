"""Estimates beside what real runs took: memory, bytes and seconds.

::

    python benchmarks/estimate.py                        # SmolLM2 with four methods, then the 4096-wide block with two
    python benchmarks/estimate.py --cases rtn,gptq
    python benchmarks/estimate.py --cases wide_rtn

A case of SmolLM2 is ``ptq161 estimate`` and then ``ptq161 run`` with the same settings, in processes of their own; it
keeps four blocks of the model and scores perplexities alone, so that it takes a minute or so. Both measure processor
seconds of one thread, in which other work on the machine counts little. A case called ``wide_``
is ``benchmarks/large_model.py``: two random blocks of LLaMA-2-7B's shape out of their folder, with the memory that
:func:`ptq161.estimate.memory.quantization_memory` predicts.
"""

from __future__ import annotations

import argparse
import json
import os
import subprocess
import sys
import tempfile
from pathlib import Path
from typing import Any

_SMALL = [
    "model.n_blocks=4",
    "calib.n_samples=16",
    "eval.corpora=[boolq]",
    "eval.max_windows=16",
    "eval.tasks=[]",
    "tracker=none",
    "cache=false",
]
_METHODS = {
    "rtn": ["method=rtn"],
    "gptq": ["method=gptq"],
    "ptq161": ["method=ptq161", "method.epochs=2"],
    "waterfill": ["method=waterfill", "method.epochs=2"],
}
_PROGRAM = [
    sys.executable,
    "-c",
    "import sys, time; time.perf_counter = time.process_time; from ptq161.__main__ import main; sys.exit(main())",
]
"""``ptq161`` with processor seconds in the place of those of the clock."""
_WIDE = ("rtn", "ptq161")
_SAMPLES, _SEQ_LEN = 2, 256


def main() -> None:
    """Run the cases and print a row of Markdown for each figure, with the prediction over the measurement."""
    names = [*_METHODS, *(f"wide_{name}" for name in _WIDE)]
    parser = argparse.ArgumentParser(description="Compare estimates with real runs.")
    parser.add_argument("--cases", default=",".join(names), help=f"of {', '.join(names)}")
    options = parser.parse_args()
    print("| case | figure | predicted | measured | predicted / measured |\n|---|---|---:|---:|---:|")
    for case in options.cases.split(","):
        rows = wide(case.removeprefix("wide_")) if case.startswith("wide_") else small(_METHODS[case])
        for figure, predicted, measured, unit in rows:
            ratio = f"{predicted / measured:.2f}" if measured else "-"
            print(f"| {case} | {figure} | {predicted:.4g}{unit} | {measured:.4g}{unit} | {ratio} |", flush=True)


def small(method: list[str]) -> list[tuple[str, float, float, str]]:
    """Estimate and run a method on four blocks of SmolLM2; return (figure, predicted, measured, unit)."""
    settings = [*_SMALL, *method]
    predicted = json.loads(_output([*_PROGRAM, "estimate", *settings, "--json"]))
    with tempfile.TemporaryDirectory(prefix="estimate.") as folder:
        _output([*_PROGRAM, "run", *settings, f"hydra.run.dir={folder}/run"])
        results = json.loads((Path(folder) / "run" / "results.json").read_text(encoding="utf-8"))
    metrics, seconds = results["metrics"], results["seconds"]
    sizes, times = predicted["sizes"], predicted["seconds"]
    return [
        ("peak memory", predicted["host_bytes"] / 1e9, results["peak_memory_bytes"] / 1e9, " GB"),
        ("bits per weight", sizes["bits_per_weight"], metrics["bits_per_weight"], ""),
        ("checkpoint", sizes["checkpoint_bytes"] / 1e6, metrics["checkpoint_bytes"] / 1e6, " MB"),
        ("quantization", times["quantize"], seconds["quantize"], " s"),
        ("perplexities", times["evaluate"], seconds["full_precision"] + seconds["evaluate"], " s"),
    ]


def wide(name: str) -> list[tuple[str, float, float, str]]:
    """Quantize two blocks of LLaMA-2-7B's shape out of their folder; the same rows."""
    script = Path(__file__).with_name("large_model.py")
    tokens = ["--samples", str(_SAMPLES), "--seq-len", str(_SEQ_LEN)]
    measured = json.loads(_output([sys.executable, str(script), "--blocks", "2", "--method", name, *tokens]))
    found, n_bits = measured["quantize_folder"], measured["load"]["bits_per_weight"]
    held, bits, checkpoint = predicted_of_wide(name)
    peak = held + found["resident_before_bytes"]
    return [
        ("peak memory", peak / 1e9, found["peak_resident_bytes"] / 1e9, " GB"),
        ("bits per weight", bits, n_bits, ""),
        ("checkpoint", checkpoint / 1e6, found["checkpoint_bytes"] / 1e6, " MB"),
    ]


def predicted_of_wide(name: str) -> tuple[float, float, int]:
    """Return bytes beside the process, bits per weight and bytes of the checkpoint, predicted."""
    import torch
    from transformers import LlamaConfig

    import ptq161
    from ptq161.estimate.memory import RETAINED, quantization_memory
    from ptq161.estimate.shapes import empty_model, shape_of
    from ptq161.estimate.sizes import packed_sizes
    from ptq161.models.settings import ModelConfig

    method: Any = ptq161.RTN(bits=2) if name == "rtn" else ptq161.PTQ161(epochs=1)
    config = LlamaConfig(
        hidden_size=4096,
        intermediate_size=11008,
        num_hidden_layers=2,
        num_attention_heads=32,
        max_position_embeddings=4096,
        dtype="bfloat16",
    )
    with tempfile.TemporaryDirectory() as folder:
        config.save_pretrained(folder)
        model = empty_model(ModelConfig(name="wide", path=folder))
    shape = shape_of(model)
    phases = quantization_memory(
        shape, method, _SAMPLES, _SEQ_LEN, device=torch.device("cpu"), whole_model=False, retained=RETAINED
    )
    sizes = packed_sizes(model, method, torch.bfloat16)
    return max(held.host for held in phases.values()), sizes.bits_per_weight, sizes.checkpoint_bytes


def _output(command: list[str]) -> str:
    done = subprocess.run(command, capture_output=True, text=True, env={**os.environ, "OMP_NUM_THREADS": "1"})
    if done.returncode:
        raise SystemExit(f"{' '.join(command)}: {done.stderr.strip().splitlines()[-1]}")
    return done.stdout


if __name__ == "__main__":
    main()
