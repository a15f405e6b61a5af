"""The training loop; it updates the student's parameters in place."""

from __future__ import annotations

import math
import time
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager

import torch
from accelerate import Accelerator
from torch import Tensor, nn
from tqdm.auto import tqdm
from transformers import PreTrainedModel, get_cosine_schedule_with_warmup

from ptq161.errors import UserError
from ptq161.methods.base import OnMetric
from ptq161.seeding import stage_generator
from ptq161.training.arithmetic.linears import quantizer_buffers
from ptq161.training.checkpoint import StepLog, TrainingCheckpoint, TrainingState
from ptq161.training.held_out import HeldOut
from ptq161.training.losses import LossOf, first_not_finite
from ptq161.training.settings import Training


def run_steps(
    student: PreTrainedModel,
    optimizer: torch.optim.Optimizer,
    loss_of: LossOf,
    tokens: Tensor,
    training: Training,
    checkpoint: TrainingCheckpoint | None,
    *,
    on_metric: OnMetric,
    seed: int,
    where: Mapping[str, int],
    progress: bool,
    held_out: HeldOut | None = None,
    at_first_gradients: Callable[[], None] | None = None,
) -> None:
    """Train the parameters that require a gradient, in place.

    ``on_metric`` receives ``GROUP_loss`` (mean over the step's sequences), ``GROUP_lr`` (of the first group of
    parameters) and ``GROUP_tokens_per_second`` with ``where`` and ``step``, from 0; and ``GROUP_held_out_loss``, whose
    ``step`` is the number of steps before it.

    Args:
        student: the model.
        optimizer: of its trained parameters, in groups with any learning rates.
        loss_of: from :func:`ptq161.training.losses.objective`.
        tokens: ``[n, seq_len]`` int64, in host memory.
        training: hyperparameters.
        checkpoint: to continue from and to write to; None keeps none.
        on_metric: receives every metric.
        seed: the order of the sequences follows from it.
        where: to what the metrics belong beside the step; the order of the sequences follows from its values, too.
        progress: show a progress bar.
        held_out: its best state is what the parameters end with; None takes the last one.
        at_first_gradients: called once, before the first step, when all parameters have the gradients that it takes.

    Raises:
        UserError: a loss is not finite, or a checkpoint cannot be written.
    """
    names = training.names
    warmup = math.ceil(training.warmup_share * training.steps)
    schedule = get_cosine_schedule_with_warmup(optimizer, warmup, training.steps)
    log = StepLog(on_metric, names.group, where)
    kept = quantizer_buffers(student)
    state = TrainingState(trained_parameters(student), optimizer, schedule, log, held_out, kept)
    first = 0 if checkpoint is None else checkpoint.restore(state)
    step_of = _Step(student, loss_of, state, training, where, at_first_gradients)
    order = _sequence_order(len(tokens), training, seed, *where.values())
    order = order.view(training.steps, training.accumulation, -1)
    if first == 0:
        _measure(state, loss_of, 0)
    with tqdm(total=training.steps, initial=first, desc=names.bar, unit="step", disable=not progress) as bar:
        for step in range(first, training.steps):
            began, lr = time.perf_counter(), schedule.get_last_lr()[0]
            loss = step_of([tokens[batch].to(student.device) for batch in order[step]], step)
            speed = order[step].numel() * tokens.shape[1] / (time.perf_counter() - began)
            log.add(step, loss=loss, lr=lr, tokens_per_second=speed)
            bar.set_postfix_str(f"loss {loss:.4f}, {speed:.0f} tokens/s", refresh=False)
            bar.update()
            is_last = step + 1 == training.steps
            if held_out is not None and (is_last or held_out.is_due(step + 1)):
                _measure(state, loss_of, step + 1)
                is_last = is_last or held_out.is_over()
                if is_last:
                    held_out.restore_best(state.parameters)
            if checkpoint is not None and (is_last or checkpoint.is_due(step + 1)):
                checkpoint.write(step + 1, state, is_finished=is_last)
            if is_last:
                break


def trained_parameters(student: nn.Module) -> dict[str, nn.Parameter]:
    """Return the parameters that are trained, by name; float32."""
    return {name: parameter for name, parameter in student.named_parameters() if parameter.requires_grad}


@contextmanager
def random_numbers(device: torch.device, seed: int, *stage: str | int) -> Iterator[None]:
    """Seed torch's global generators, which initial weights and dropout draw from, and restore their state after."""
    with torch.random.fork_rng(devices=[device] if device.type == "cuda" else []):
        torch.manual_seed(stage_generator(seed, *stage).initial_seed())
        yield


class _Step:
    """One optimizer step over the batches that it accumulates."""

    def __init__(
        self,
        student: PreTrainedModel,
        loss_of: LossOf,
        state: TrainingState,
        training: Training,
        where: Mapping[str, int],
        at_first_gradients: Callable[[], None] | None,
    ) -> None:
        self.student, self.loss_of, self.training, self.where = student, loss_of, training, where
        self.parameters, self.at_first_gradients = state.parameters, at_first_gradients
        # Accelerate must not move the model: the run's device is configured.
        self.accelerator = Accelerator(device_placement=False, gradient_accumulation_steps=training.accumulation)
        self.optimizer, self.schedule = self.accelerator.prepare(state.optimizer, state.schedule)

    def __call__(self, batches: list[Tensor], step: int) -> float:
        """Return the mean loss."""
        loss, lr = 0.0, self.schedule.get_last_lr()[0]
        for sequences in batches:
            with self.accelerator.accumulate(self.student):
                value = self.loss_of(sequences)
                self.accelerator.backward(value)
                # Read once, after the backward pass is queued: reading a value waits for the GPU.
                number = value.item()
                if not math.isfinite(number):
                    raise self._not_finite(number, sequences, step, lr)
                loss += number / self.training.accumulation
                if self.accelerator.sync_gradients:
                    self.accelerator.clip_grad_norm_(self.parameters.values(), self.training.max_grad_norm)
                    if step == 0 and self.at_first_gradients is not None:
                        self.at_first_gradients()
                self.optimizer.step()
                self.schedule.step()
                self.optimizer.zero_grad()
        return loss

    def _not_finite(self, number: float, sequences: Tensor, step: int, lr: float) -> UserError:
        names = self.training.names
        place = ", ".join(f"{key} {value}" for key, value in {**self.where, "step": step}.items())
        return UserError(
            f"the loss of {names.title} is {number}, first seen in {first_not_finite(self.student, sequences)} "
            f"({place}), at learning rate {lr:.3g}: lower {names.rates}."
        )


def _measure(state: TrainingState, loss_of: LossOf, done: int) -> None:
    if state.held_out is not None:
        state.log.add(done, held_out_loss=state.held_out.measure(loss_of, state.parameters))


def _sequence_order(n: int, training: Training, seed: int, *part: int) -> Tensor:
    """Return the sequences of a training in their order, int64 ``[steps * accumulation * batch_size]``.

    Each epoch shuffles anew.
    """
    wanted = training.steps * training.accumulation * training.batch_size
    generator = stage_generator(seed, f"{training.names.stage} order", *part)
    return torch.cat([torch.randperm(n, generator=generator) for _ in range(-(-wanted // n))])[:wanted]
