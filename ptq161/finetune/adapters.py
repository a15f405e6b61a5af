"""Finetuning of adapters on a quantized model, which itself stays as it is.

::

    packed, tokenizer = ptq161.load("checkpoint")
    tuning = Tuning(text_file="notes.txt")
    packed = tune(packed, training_tokens(tokenizer, tuning, seed=0), tuning, seed=0)
    ptq161.save(packed, tokenizer, "tuned")
"""

from __future__ import annotations

import copy
import math
from pathlib import Path

import torch
from torch import nn
from transformers import PreTrainedModel

from ptq161.errors import UserError
from ptq161.files import identity
from ptq161.files.fingerprints import KeyedFolder, claim
from ptq161.files.hashing import sha256_of_tensors
from ptq161.finetune.checks import check_dense_embeddings, folder_checkpoint, held_out_of, split_held_out
from ptq161.finetune.tuning import Tuning
from ptq161.methods.base import OnMetric, ignore_metric
from ptq161.models.architectures import max_seq_len
from ptq161.models.checks import check_head, check_seq_len
from ptq161.numerics import COMPUTE_DTYPES, plain_torch, working_device
from ptq161.packed.adapted import AdaptedWeight
from ptq161.packed.checkpoint import own_methods
from ptq161.packed.lenders import link_lenders
from ptq161.packed.linear import PackedLinear
from ptq161.packed.model import activation_bits, cast_rest, densify, packed_linears, sha256_of_packed, tensor_bytes
from ptq161.training.arithmetic.linears import FrozenLinear, LoraLinear
from ptq161.training.arithmetic.metis import check_ranks
from ptq161.training.loop import random_numbers, run_steps, trained_parameters
from ptq161.training.losses import objective
from ptq161.training.targets import linears_of_roles


@plain_torch()
def tune(
    packed: PreTrainedModel,
    tokens: object,
    tuning: Tuning,
    *,
    held_out_tokens: object | None = None,
    folder: Path | str | KeyedFolder | None = None,
    on_metric: OnMetric | None = None,
    seed: int = 0,
    device: torch.device | str | None = None,
    progress: bool = False,
) -> PreTrainedModel:
    """Train adapters of a quantized model, and store them in place beside its packed weights.

    Args:
        packed: the quantized model, of any format; its bytes stay, and the adapters' are added.
        tokens: ``[n, seq_len]`` training sequences, from :func:`ptq161.training.text.training_tokens` or in any form
            that :func:`ptq161.models.checks.as_tokens` takes.
        tuning: hyperparameters.
        held_out_tokens: sequences that are never trained on, in any such form; None takes the first
            ``tuning.held_out`` of ``tokens``.
        folder: receives checkpoints, from which an interrupted training continues with the same result, bit for bit;
            None keeps none. A path is checked against all arguments, for which the model is hashed; a ``KeyedFolder``
            is not checked.
        on_metric: receives ``finetune_loss``, ``finetune_lr``, ``finetune_tokens_per_second`` of every ``step``,
            ``finetune_held_out_loss``, whose ``step`` is the number of steps before it, and once
            ``finetune_trained_bytes``, ``finetune_optimizer_bytes``, ``finetune_base_bytes`` (as it is stored) and
            ``finetune_base_held_bytes`` (as it is held in the training).
        seed: all random numbers follow from it.
        device: where the model is trained; None is where it is.
        progress: show a progress bar.

    Returns:
        the same model.

    Raises:
        UserError: the model is not quantized, rounds its activations or has adapters already; the tokens do not fit; a
            loss is not finite; ``folder`` belongs to another training.
    """
    names = _check(packed, tuning)
    trained, held_out = split_held_out(packed, tokens, held_out_tokens, tuning.held_out)
    target = working_device(device, packed.device)
    if isinstance(folder, Path | str):
        found = identity.tuning(
            packed=sha256_of_packed(packed),
            tokens=sha256_of_tensors({"trained": trained, "held_out": held_out}),
            settings=tuning,
            seed=seed,
            device=target,
        )
        folder = claim(Path(folder).expanduser(), found, tuning.names.advice)
    checkpoint = folder_checkpoint(folder, "tuning.pt", tuning, target)
    on_metric = on_metric or ignore_metric
    with random_numbers(target, seed, "tuning"):
        student = make_student(packed, names, tuning, target)
        for name, count in _memory(packed, student, names).items():
            on_metric(f"finetune_{name}", count)
        run_steps(
            student,
            torch.optim.AdamW(trained_parameters(student).values(), lr=tuning.lr, weight_decay=0.0),
            objective(student, None, tuning),
            trained,
            tuning,
            checkpoint,
            on_metric=on_metric,
            seed=seed,
            where={},
            progress=progress,
            held_out=held_out_of(held_out, tuning),
        )
    _store(packed, student, names, tuning)
    own_methods(packed)
    return packed


def make_student(packed: PreTrainedModel, names: list[str], tuning: Tuning, device: torch.device) -> PreTrainedModel:
    """Return a copy of a quantized model in which only adapters are trained, which are zero at first.

    Args:
        packed: the quantized model.
        names: module paths of the linears that get an adapter.
        tuning: hyperparameters.
        device: of the training.
    """
    dtype = COMPUTE_DTYPES[tuning.compute_dtype]
    student = copy.deepcopy(packed)
    cast_rest(student, dtype)
    layers = packed_linears(student)
    for name in names:
        layer = layers[name]
        base = FrozenLinear(layer.dequantize(), layer.bias, tuning, dtype)
        down, up = torch.empty(tuning.rank, layer.in_features), torch.zeros(layer.out_features, tuning.rank)
        nn.init.kaiming_uniform_(down, a=math.sqrt(5))  # as LoRA's authors do
        scale = tuning.alpha / tuning.rank
        student.set_submodule(name, LoraLinear(base, down, up, scale, tuning, tuning.dropout))
    densify(student)
    for name, parameter in student.named_parameters():
        parameter.requires_grad_(name.endswith((".lora_A", ".lora_B")))
    nn.Module.to(student, device)
    student.config.use_cache = False
    if tuning.gradient_checkpointing:
        student.activation_checkpointing_enable({"use_reentrant": False})
    student.train()
    return student


def _check(packed: PreTrainedModel, tuning: Tuning) -> list[str]:
    """Return the linears that get an adapter."""
    check_head(packed)
    layers = packed_linears(packed)
    if not layers:
        raise UserError("the model to finetune has no packed linears: quantize it first.")
    check_dense_embeddings(packed)
    if bits := activation_bits(packed):
        raise UserError(
            f"the model's activations are quantized to {bits} bits (method.activation_bits), which adapters are not "
            "trained for: quantize it with method.activation_bits=null."
        )
    for name, layer in layers.items():
        if isinstance(layer.packed, AdaptedWeight):
            raise UserError(
                f"the model has adapters already (at {name}): finetune the checkpoint that they were trained on."
            )
    check_seq_len("finetune.seq_len", tuning.seq_len, max_seq_len(packed.config))
    names = linears_of_roles(packed, tuning.targets, "finetune.targets")
    check_ranks(tuning, [[tuning.rank, layers[name].out_features, layers[name].in_features] for name in names])
    return names


def _memory(packed: PreTrainedModel, student: PreTrainedModel, names: list[str]) -> dict[str, int]:
    layers, trained = packed_linears(packed), tensor_bytes(trained_parameters(student).values())
    held = [tensor for name in names for tensor in student.get_submodule(f"{name}.base").buffers()]
    return {
        "trained_bytes": trained,
        "optimizer_bytes": 2 * trained,  # the two moments of AdamW
        "base_bytes": sum(layers[name].packed.nbytes for name in names),
        "base_held_bytes": tensor_bytes(held),
    }


@torch.no_grad()
def _store(packed: PreTrainedModel, student: PreTrainedModel, names: list[str], tuning: Tuning) -> None:
    """Put the adapters beside the packed weights, in the dtype in which they are stored."""
    layers, adapted = packed_linears(packed), {}
    for name in names:
        before, adapter = layers[name], student.get_submodule(name)
        assert isinstance(adapter, LoraLinear)
        home = next(before.buffers()).device
        factors = [factor.detach().to(home) for factor in (adapter.lora_A, adapter.lora_B * adapter.scale)]
        adapted[name] = AdaptedWeight.pack(before.packed, *factors, scale_dtype=tuning.adapter_dtype)
    for name, weight in adapted.items():
        before = layers[name]
        packed.set_submodule(name, PackedLinear(weight, before.bias).train(before.training))
    link_lenders(packed)
