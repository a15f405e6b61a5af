"""Decoder blocks as the model calls them: the inputs of the first block and the arguments of each."""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from functools import partial
from typing import Any

import torch
from torch import Tensor, nn
from transformers import PreTrainedModel

from ptq161.models.architectures import architecture_of, decoder_blocks


@dataclasses.dataclass(frozen=True)
class BlockArguments:
    """The arguments of one block beside the hidden states, as the model passed them, for each batch size.

    Attributes:
        by_batch_size: batch size -> (args after the first, kwargs).
    """

    by_batch_size: dict[int, tuple[tuple[Any, ...], dict[str, Any]]]

    def to(self, device: torch.device) -> BlockArguments:
        """Move every tensor, however deeply nested, to ``device``."""
        return BlockArguments({size: _to_device(call, device) for size, call in self.by_batch_size.items()})

    def call(self, block: nn.Module, hidden: Tensor) -> Tensor:
        """Run ``block`` on ``hidden [b, seq_len, hidden]`` as the model would."""
        args, kwargs = self.by_batch_size[hidden.shape[0]]
        output = block(hidden, *args, **kwargs)
        result: Tensor = output[0] if isinstance(output, tuple) else output
        return result


def capture_inputs(model: PreTrainedModel, tokens: Tensor, batch_size: int) -> tuple[Tensor, list[BlockArguments]]:
    """Run the model up to its first block, and record the arguments of each block.

    Meanwhile each block's ``forward`` is replaced by one that records its arguments and returns the hidden states
    unchanged, so that no block is computed.

    Args:
        model: the full-precision model.
        tokens: ``[n_samples, seq_len]``.
        batch_size: sequences per batch, also of the later replays.

    Returns:
        the hidden states ``[n_samples, seq_len, hidden]`` that enter the first block, and each block's arguments.
    """
    blocks = decoder_blocks(model)
    calls: list[dict[int, tuple[tuple[Any, ...], dict[str, Any]]]] = [{} for _ in blocks]
    hidden_states: list[Tensor] = []

    returns_tuple = architecture_of(model).returns_tuple

    def record(i: int, *args: Any, **kwargs: Any) -> Tensor | tuple[Tensor, None]:
        hidden: Tensor = kwargs.pop("hidden_states") if "hidden_states" in kwargs else args[0]
        rest = args[1:] if args and hidden is args[0] else args
        if i == 0:
            hidden_states.append(hidden)
        calls[i].setdefault(hidden.shape[0], (rest, kwargs))
        if i == len(blocks) - 1:
            raise _CapturedError
        return (hidden, None) if returns_tuple else hidden

    with _replaced_forward(list(blocks), record), torch.no_grad():
        for batch in tokens.split(batch_size):
            with suppress(_CapturedError):
                model(input_ids=batch.to(model.device), use_cache=False)
    return torch.cat(hidden_states), [BlockArguments(by_size) for by_size in calls]


def logits_after(model: PreTrainedModel, tokens: Tensor, hidden: Tensor) -> Tensor:
    """Return the logits that a model computes from what its last block returns, with gradients.

    Args:
        model: with a head.
        tokens: ``[b, seq_len]``.
        hidden: ``[b, seq_len, hidden]`` in the model's dtype, the last block's outputs.
    """
    blocks, returns_tuple = decoder_blocks(model), architecture_of(model).returns_tuple

    def forward(i: int, given: Tensor, *_: Any, **__: Any) -> Tensor | tuple[Tensor, None]:
        returned = hidden if i == len(blocks) - 1 else given
        return (returned, None) if returns_tuple else returned

    with _replaced_forward(list(blocks), forward):
        logits: Tensor = model(input_ids=tokens.to(model.device), use_cache=False).logits
    return logits


@contextmanager
def _replaced_forward(blocks: list[nn.Module], forward: Callable[..., Tensor | tuple[Tensor, None]]) -> Iterator[None]:
    """Let block ``i`` compute ``forward(i, hidden, ...)`` meanwhile."""
    originals = [vars(block).get("forward") for block in blocks]
    try:
        for i, block in enumerate(blocks):
            block.forward = partial(forward, i)
        yield
    finally:
        for block, original in zip(blocks, originals, strict=True):
            # Restored only where it was the instance's own: a block that holds its bound method is a reference cycle.
            del block.forward
            if original is not None:
                block.forward = original


class _CapturedError(Exception):
    """Ends a forward pass once the last block's arguments are known."""


def _to_device(value: Any, device: torch.device) -> Any:
    if isinstance(value, Tensor):
        # Blocks run in float32; arguments of half precision are taken as they are, those of a float64 model cut to it.
        return value.to(device, torch.float32 if value.dtype == torch.float64 else None)
    if isinstance(value, tuple | list):
        return type(value)(_to_device(item, device) for item in value)
    if isinstance(value, dict):
        return {key: _to_device(item, device) for key, item in value.items()}
    return value
