"""The loss of a training step as a function of its tokens: a model against its labels, or against a teacher."""

from __future__ import annotations

import copy
from collections.abc import Callable, Iterator
from contextlib import contextmanager, nullcontext

import torch
from torch import Tensor, nn
from transformers import PreTrainedModel

from ptq161.kernels.block import fused_blocks
from ptq161.packed.model import cast_rest
from ptq161.training.objectives import chunked_mean, cross_entropy_sum, divergence_sum, relative_error
from ptq161.training.settings import Training

LossOf = Callable[[Tensor], Tensor]
"""``loss_of(tokens [b, seq_len])`` is a scalar, differentiable in what is trained."""


def objective(student: PreTrainedModel, teacher: PreTrainedModel | None, training: Training) -> LossOf:
    """Return ``loss_of(tokens [b, seq_len]) -> scalar``, differentiable in the student's trained parameters.

    Args:
        student: the model that is trained.
        teacher: the full-precision model; None for the objective ``lm``.
        training: its ``objective`` and ``hidden_weight``.
    """
    if teacher is None:
        return lambda tokens: _next_token_loss(student, tokens)
    weight = training.hidden_weight if training.objective == "kl_hidden" else 0.0
    return lambda tokens: _distillation_loss(student, teacher, tokens, weight)


def _logits(model: PreTrainedModel, hidden: Tensor) -> Tensor:
    """Map a model's last hidden states ``[n, hidden]`` to logits ``[n, vocabulary]``, as the model itself would."""
    logits: Tensor = model.get_output_embeddings()(hidden)
    cap = getattr(model.config, "final_logit_softcapping", None)
    return logits if cap is None else torch.tanh(logits / cap) * cap


def _trained_head(model: PreTrainedModel) -> list[nn.Parameter]:
    """Return what :func:`_logits` uses and is trained."""
    return [parameter for parameter in model.get_output_embeddings().parameters() if parameter.requires_grad]


def frozen_copy(model: PreTrainedModel, dtype: torch.dtype, device: torch.device) -> PreTrainedModel:
    """Return a copy of a full-precision model in evaluation mode and without gradients: the teacher."""
    teacher = copy.deepcopy(model)
    cast_rest(teacher, dtype)
    nn.Module.to(teacher, device)
    teacher.requires_grad_(False)
    teacher.eval()
    return teacher


def _next_token_loss(student: PreTrainedModel, tokens: Tensor) -> Tensor:
    hidden, _ = _run(student, tokens)
    return chunked_mean(
        lambda h, labels: cross_entropy_sum(_logits(student, h), labels),
        hidden[:, :-1].flatten(0, 1),
        tokens[:, 1:].flatten(),
        parameters=_trained_head(student),
    )


def _distillation_loss(student: PreTrainedModel, teacher: PreTrainedModel, tokens: Tensor, weight: float) -> Tensor:
    with torch.no_grad():
        teacher_hidden, teacher_blocks = _run(teacher, tokens)
    hidden, blocks = _run(student, tokens)
    loss = chunked_mean(
        lambda h, t: divergence_sum(_logits(student, h), _without_gradient(teacher, t)),
        hidden.flatten(0, 1),
        teacher_hidden.flatten(0, 1),
        parameters=_trained_head(student),
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
    # Gradient checkpointing repeats the forward pass outside of this context, and expects the same tensors.
    fast = nullcontext() if model.is_activation_checkpointing else fused_blocks([model])
    with torch.autocast(device.type, dtype), fast:
        yield


def first_not_finite(student: PreTrainedModel, tokens: Tensor) -> str:
    """Name the first decoder block whose output is not finite."""
    with torch.no_grad():
        _, by_block = _run(student, tokens)
    return next((f"block {i}" for i, output in enumerate(by_block) if not output.isfinite().all()), "the loss alone")
