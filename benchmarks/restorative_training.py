"""Tokens per second of restorative training against a plain Trainer loop in float32, in one sitting.

    python benchmarks/restorative_training.py                      # the embedded model, 8 x 512 tokens a step
    python benchmarks/restorative_training.py --blocks 6 --steps 3  # its first blocks alone, where time is short

Both train the same low-rank update (peft, the paper's rank and targets, no dropout) of the same dense model with the
causal-LM loss on the same packed sequences: the plain loop pays for no padding. It is transformers' Trainer as it
comes: float32, the library's attention, all logits at once. Steps of the two alternate with each repetition, so that a
busy machine slows both; the median step of each counts.
"""

from __future__ import annotations

import argparse
import copy
import itertools
import statistics
import tempfile
import time
from typing import Any

import torch
from peft import LoraConfig, get_peft_model
from torch import Tensor
from transformers import PreTrainedModel, Trainer, TrainerCallback, TrainingArguments

import ptq161
from ptq161.methods.rtn import RTN
from ptq161.models.loading import load_model
from ptq161.models.settings import ModelConfig
from ptq161.numerics import resolve_dtype
from ptq161.packed.model import cast_rest, densify
from ptq161.preprocess.restoration import Restoration
from ptq161.preprocess.student import make_student, target_names
from ptq161.preprocess.training import train
from ptq161.training.losses import objective
from ptq161.training.text import training_tokens

CPU = torch.device("cpu")


def main() -> None:
    """Print tokens per second of both and their ratio."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--blocks", type=int, default=None, help="first blocks of the model; all by default")
    parser.add_argument("--batch-size", type=int, default=8)
    parser.add_argument("--seq-len", type=int, default=512)
    parser.add_argument("--steps", type=int, default=3, help="steps per repetition, the first of which warms up")
    parser.add_argument("--repetitions", type=int, default=2)
    options = parser.parse_args()
    restoration = Restoration(
        dropout=0.0,
        steps=options.steps,
        batch_size=options.batch_size,
        accumulation=1,
        seq_len=options.seq_len,
        corpora=["squad", "drop", "coqa"],
        compute_dtype=resolve_dtype("auto", CPU)[0],
    )
    config = ModelConfig(name="smollm2_135m", asset="smollm2_135m", n_blocks=options.blocks)
    model, tokenizer = load_model(config)
    tokens = training_tokens(tokenizer, restoration, seed=0)
    packed = ptq161.quantize(model, tokens[:1, :64], RTN())
    print(f"{options.batch_size} x {options.seq_len} tokens a step, {torch.get_num_threads()} threads")
    plain: list[float] = []
    ours: list[float] = []
    for _ in range(options.repetitions):
        plain += plain_speed(packed, tokens, restoration)
        ours += our_speed(packed, tokens, restoration)
    for name, speeds in (("plain Trainer, float32", plain), (f"ours, {restoration.compute_dtype}", ours)):
        print(
            f"{name:24} {statistics.median(speeds):7.0f} tokens/s (all steps: {', '.join(f'{s:.0f}' for s in speeds)})"
        )
    print(f"ratio of the medians: {statistics.median(ours) / statistics.median(plain):.2f}")


def our_speed(packed: PreTrainedModel, tokens: Tensor, restoration: Restoration) -> list[float]:
    """Return the tokens per second of each step but the first."""
    speeds: list[float] = []

    def keep_speed(name: str, value: float, /, **where: int | str) -> None:
        if name == "preprocess_tokens_per_second":
            speeds.append(value)

    student = make_student(packed, restoration, CPU)
    loss_of = objective(student, None, restoration)
    train(student, loss_of, tokens, restoration, None, on_metric=keep_speed, seed=0, round_=0, progress=False)
    return speeds[1:]


def plain_speed(packed: PreTrainedModel, tokens: Tensor, restoration: Restoration) -> list[float]:
    """Return the tokens per second of each step but the first of transformers' Trainer in float32."""
    dense = copy.deepcopy(packed)
    cast_rest(dense, torch.float32)
    densify(dense)
    targets = target_names(dense, restoration)
    model = get_peft_model(dense, LoraConfig(r=restoration.rank, lora_alpha=16, target_modules=targets))
    ends: list[float] = []

    class Clock(TrainerCallback):
        def on_step_end(self, *_: Any, **__: Any) -> None:
            ends.append(time.perf_counter())

    with tempfile.TemporaryDirectory() as folder:
        arguments = TrainingArguments(
            folder,
            max_steps=restoration.steps,
            per_device_train_batch_size=restoration.batch_size,
            learning_rate=restoration.lr,
            lr_scheduler_type="cosine",
            use_cpu=True,
            save_strategy="no",
            report_to="none",
            disable_tqdm=True,
            logging_strategy="no",
        )
        data = [{"input_ids": row, "labels": row} for row in tokens]
        Trainer(model, arguments, train_dataset=data, callbacks=[Clock()]).train()
    per_step = restoration.batch_size * restoration.seq_len
    return [per_step / (end - start) for start, end in itertools.pairwise(ends)]


if __name__ == "__main__":
    main()
