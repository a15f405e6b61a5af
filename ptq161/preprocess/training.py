"""The training loop of the restoration; it updates the student's parameters in place."""

from __future__ import annotations

import math
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager, nullcontext

import torch
from accelerate import Accelerator
from torch import Tensor
from tqdm.auto import tqdm
from transformers import PreTrainedModel, get_cosine_schedule_with_warmup

from ptq161.errors import UserError
from ptq161.kernels.attention import FastCausalAttention
from ptq161.methods.base import OnMetric
from ptq161.preprocess.checkpoint import StepLog, TrainingCheckpoint
from ptq161.preprocess.objectives import chunked_mean, cross_entropy_sum, divergence_sum, relative_error
from ptq161.preprocess.restoration import Restoration
from ptq161.preprocess.student import trained_parameters
from ptq161.seeding import stage_generator

LossOf = Callable[[Tensor], Tensor]


def train(
    student: PreTrainedModel,
    loss_of: LossOf,
    tokens: Tensor,
    restoration: Restoration,
    checkpoint: TrainingCheckpoint | None,
    *,
    on_metric: OnMetric,
    seed: int,
    round_: int,
    progress: bool,
) -> None:
    """Train the parameters that require a gradient, in place.

    ``on_metric`` receives ``preprocess_loss`` (mean over the step's sequences), ``preprocess_lr`` and
    ``preprocess_tokens_per_second`` with ``round`` and ``step``, both from 0. Dropout draws from torch's global
    generator, which the caller has seeded.

    Args:
        student: from :func:`ptq161.preprocess.student.make_student`.
        loss_of: from :func:`objective`.
        tokens: ``[n, seq_len]`` int64, in host memory.
        restoration: hyperparameters.
        checkpoint: to continue from and to write to; None keeps none.
        on_metric: receives every metric.
        seed: the order of the sequences follows from it.
        round_: from 0.
        progress: show a progress bar.

    Raises:
        UserError: a loss is not finite, or a checkpoint cannot be written.
    """
    parameters = trained_parameters(student)
    # Accelerate must not move the model: the run's device is configured.
    accelerator = Accelerator(device_placement=False, gradient_accumulation_steps=restoration.accumulation)
    plain_optimizer = torch.optim.AdamW(parameters.values(), lr=restoration.lr, weight_decay=0.0)
    warmup = math.ceil(restoration.warmup_share * restoration.steps)
    plain_schedule = get_cosine_schedule_with_warmup(plain_optimizer, warmup, restoration.steps)
    log = StepLog(on_metric, round_)
    first = 0
    if checkpoint is not None:
        first = checkpoint.restore(parameters, plain_optimizer, plain_schedule, log)
    optimizer, schedule = accelerator.prepare(plain_optimizer, plain_schedule)
    order = _sequence_order(len(tokens), restoration, seed, round_)
    order = order.view(restoration.steps, restoration.accumulation, -1)
    bar = tqdm(total=restoration.steps, initial=first, desc="restore", unit="step", disable=not progress)
    with bar:
        for step in range(first, restoration.steps):
            began, loss, lr = time.perf_counter(), 0.0, schedule.get_last_lr()[0]
            for batch in order[step]:
                sequences = tokens[batch].to(student.device)
                with accelerator.accumulate(student):
                    value = loss_of(sequences)
                    accelerator.backward(value)
                    # Read once, after the backward pass is queued: reading a value waits for the GPU.
                    number = value.item()
                    if not math.isfinite(number):
                        where = f"{_first_not_finite(student, sequences)} (round {round_}, step {step})"
                        raise UserError(
                            f"the loss of restorative training is {number}, first seen in {where}, at learning "
                            f"rate {lr:.3g}: lower preprocess.lr."
                        )
                    loss += number / restoration.accumulation
                    if accelerator.sync_gradients:
                        accelerator.clip_grad_norm_(parameters.values(), restoration.max_grad_norm)
                    optimizer.step()
                    schedule.step()
                    optimizer.zero_grad()
            speed = order[step].numel() * tokens.shape[1] / (time.perf_counter() - began)
            log.add(step, loss, lr, speed)
            bar.set_postfix_str(f"loss {loss:.4f}, {speed:.0f} tokens/s", refresh=False)
            bar.update()
            if checkpoint is not None and checkpoint.is_due(step + 1):
                checkpoint.write(step + 1, parameters, plain_optimizer, plain_schedule, log)


def objective(student: PreTrainedModel, teacher: PreTrainedModel | None, restoration: Restoration) -> LossOf:
    """Return ``loss_of(tokens [b, seq_len]) -> scalar``, differentiable in the student's trained parameters.

    Args:
        student: the model that is trained.
        teacher: the full-precision model; None for the objective ``lm``.
        restoration: its ``objective`` and ``hidden_weight``.
    """
    if teacher is None:
        return lambda tokens: _next_token_loss(student, tokens)
    weight = restoration.hidden_weight if restoration.objective == "kl_hidden" else 0.0
    return lambda tokens: _distillation_loss(student, teacher, tokens, weight)


def _logits(model: PreTrainedModel, hidden: Tensor) -> Tensor:
    """Map a model's last hidden states ``[n, hidden]`` to logits ``[n, vocabulary]``, as the model itself would."""
    logits: Tensor = model.get_output_embeddings()(hidden)
    cap = getattr(model.config, "final_logit_softcapping", None)
    return logits if cap is None else torch.tanh(logits / cap) * cap


def _sequence_order(n: int, restoration: Restoration, seed: int, round_: int) -> Tensor:
    """Return the sequences of a round in their order, int64 ``[restoration.sequences]``: each epoch shuffles anew."""
    epochs = -(-restoration.sequences // n)
    generator = stage_generator(seed, "restoration order", round_)
    return torch.cat([torch.randperm(n, generator=generator) for _ in range(epochs)])[: restoration.sequences]


def _next_token_loss(student: PreTrainedModel, tokens: Tensor) -> Tensor:
    hidden, _ = _run(student, tokens)
    hidden = hidden[:, :-1].flatten(0, 1)
    return chunked_mean(
        lambda h, labels: cross_entropy_sum(_logits(student, h), labels), hidden, tokens[:, 1:].flatten()
    )


def _distillation_loss(student: PreTrainedModel, teacher: PreTrainedModel, tokens: Tensor, weight: float) -> Tensor:
    with torch.no_grad():
        teacher_hidden, teacher_blocks = _run(teacher, tokens)
    hidden, blocks = _run(student, tokens)
    loss = chunked_mean(
        lambda h, t: divergence_sum(_logits(student, h), _without_gradient(teacher, t)),
        hidden.flatten(0, 1),
        teacher_hidden.flatten(0, 1),
    )
    if not weight:
        return loss
    errors = [relative_error(s, t) for s, t in zip(blocks, teacher_blocks, strict=True)]
    return loss + weight * torch.stack(errors).mean()


def _without_gradient(teacher: PreTrainedModel, hidden: Tensor) -> Tensor:
    with torch.no_grad():
        return _logits(teacher, hidden)


def _run(model: PreTrainedModel, tokens: Tensor) -> tuple[Tensor, tuple[Tensor, ...]]:
    """Run a model without its head on ``tokens [b, seq_len]``.

    Returns:
        the last hidden states ``[b, seq_len, hidden]``, and the output of each block (the last one's normalized).
    """
    with _autocast(model, tokens.device):
        output = model.base_model(input_ids=tokens, use_cache=False, output_hidden_states=True)
    _, *by_block = output.hidden_states
    return output.last_hidden_state, tuple(by_block)


@contextmanager
def _autocast(model: PreTrainedModel, device: torch.device) -> Iterator[None]:
    """Compute matrix products in the dtype of the frozen weights, and half-precision attention with the fast kernel."""
    dtype = next(model.get_input_embeddings().parameters()).dtype
    if dtype == torch.float32:
        yield
        return
    # Gradient checkpointing repeats the forward pass outside of this function mode, and expects the same tensors.
    fast = nullcontext() if model.is_activation_checkpointing else FastCausalAttention()
    with torch.autocast(device.type, dtype), fast:
        yield


def _first_not_finite(student: PreTrainedModel, tokens: Tensor) -> str:
    """Name the first decoder block whose output is not finite."""
    with torch.no_grad():
        _, by_block = _run(student, tokens)
    return next((f"block {i}" for i, output in enumerate(by_block) if not output.isfinite().all()), "the loss alone")
