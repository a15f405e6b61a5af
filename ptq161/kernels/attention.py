"""Causal attention in bfloat16 for the CPU, faster than torch's own in training.

torch's fused kernel spends two thirds of a training step of attention in its backward pass (60 ms for [4, 9, 512, 64]
on two cores). Here probabilities are kept from the forward pass and every product is a plain matrix product; queries
are taken in chunks that see only their own past, which leaves out most of the masked half. What lies between the
products, the softmax and its gradient, is one pass over the scores (``attention.cpp``).
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import Any

import torch
from torch import Tensor
from torch.nn import functional as F
from torch.overrides import TorchFunctionMode

from ptq161.kernels import native

_CHUNK = 128


class FastCausalAttention(TorchFunctionMode):
    """Inside this context, causal bfloat16 attention on the CPU takes :func:`causal_attention`.

    Whatever else a model asks of ``scaled_dot_product_attention`` (a mask, dropout, another device or dtype) goes to
    torch's own.
    """

    def __torch_function__(
        self,
        func: Callable[..., Any],
        types: tuple[type, ...],
        args: tuple[Any, ...] = (),
        kwargs: Mapping[str, Any] | None = None,
    ) -> Any:
        """Replace ``scaled_dot_product_attention`` where :func:`causal_attention` applies."""
        kwargs = dict(kwargs or {})
        if func is F.scaled_dot_product_attention and _applies(args, kwargs):
            query, key, value = args
            return causal_attention(query, key, value, kwargs.get("scale"))
        return func(*args, **kwargs)


def causal_attention(query: Tensor, key: Tensor, value: Tensor, scale: float | None = None) -> Tensor:
    """Softmax attention over the past, in bfloat16.

    Args:
        query: ``[batch, heads, seq, head_dim]``.
        key: ``[batch, kv_heads, seq, head_dim]``; ``kv_heads`` divides ``heads``.
        value: the same shape as ``key``.
        scale: of the scores; None is ``head_dim ** -0.5``.

    Returns:
        ``[batch, heads, seq, head_dim]`` bfloat16.
    """
    scale = query.shape[-1] ** -0.5 if scale is None else scale
    batch, heads, seq, head_dim = query.shape
    shared = [t.to(torch.bfloat16).reshape(-1, seq, head_dim) for t in (key, value)]
    query = query.to(torch.bfloat16).reshape(shared[0].shape[0], -1, seq, head_dim)
    output: Tensor = _CausalAttention.apply(query, *shared, scale)  # type: ignore[no-untyped-call]  # torch leaves it untyped
    return output.view(batch, heads, seq, head_dim)


def _applies(args: tuple[Any, ...], kwargs: Mapping[str, Any]) -> bool:
    """Whether a call is plain causal self-attention that autocast would run in bfloat16 on the CPU."""
    if len(args) != 3 or not kwargs.get("is_causal") or kwargs.get("attn_mask") is not None:
        return False
    query, key, _ = args
    return (
        not kwargs.get("dropout_p")
        and query.device.type == "cpu"
        and torch.is_autocast_enabled("cpu")
        and torch.get_autocast_dtype("cpu") == torch.bfloat16
        and query.shape[-2] == key.shape[-2]
    )


class _CausalAttention(torch.autograd.Function):
    """Attention of queries ``[n, groups, seq, head_dim]`` over keys and values ``[n, seq, head_dim]`` of each group.

    Queries of a chunk are the rows of one product, those of all groups that share keys together. The probabilities of
    each chunk are kept for the gradient.
    """

    @staticmethod
    def forward(ctx: Any, query: Tensor, key: Tensor, value: Tensor, scale: float) -> Tensor:
        output = torch.empty_like(query)
        kept = []
        for here, past in _chunks(query.shape[2]):
            queries = query[:, :, here].flatten(1, 2)
            scores = queries @ key[:, past].transpose(1, 2)
            probabilities = _softmax(scores, here, scale)
            output[:, :, here] = (probabilities @ value[:, past]).view_as(output[:, :, here])
            kept += [queries, probabilities]
        ctx.scale = scale
        ctx.save_for_backward(key, value, *kept)
        return output

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor, Tensor, Tensor, None]:
        key, value, *kept = ctx.saved_tensors
        grad = grad.to(key.dtype)
        grad_query = torch.empty(grad.shape, dtype=grad.dtype, device=grad.device)
        grad_key, grad_value = torch.zeros_like(key), torch.zeros_like(value)
        chunks = _chunks(grad.shape[2])
        for (here, past), queries, probabilities in zip(chunks, kept[::2], kept[1::2], strict=True):
            of_output = grad[:, :, here].flatten(1, 2)
            grad_value[:, past].baddbmm_(probabilities.transpose(1, 2), of_output)
            of_probabilities = of_output @ value[:, past].transpose(1, 2)
            of_scores = _softmax_gradient(of_probabilities, probabilities, here, ctx.scale)
            grad_query[:, :, here] = (of_scores @ key[:, past]).view_as(grad_query[:, :, here])
            grad_key[:, past].baddbmm_(of_scores.transpose(1, 2), queries)
        return grad_query, grad_key, grad_value, None


def _chunks(seq: int) -> list[tuple[slice, slice]]:
    """Return the queries of each chunk, and the keys that they see."""
    ends = [min(start + _CHUNK, seq) for start in range(0, seq, _CHUNK)]
    return [(slice(start, end), slice(0, end)) for start, end in zip(range(0, seq, _CHUNK), ends, strict=True)]


def _softmax(scores: Tensor, here: slice, scale: float) -> Tensor:
    """Return the probabilities of scores ``[n, groups * chunk, keys]``, which may lie in the memory of the scores."""
    n_queries = here.stop - here.start
    if native.usable("attention", scores):
        torch.ops.ptq161.causal_softmax(scores, here.start, n_queries, scale)
        return scores
    future = torch.ones(n_queries, n_queries, dtype=torch.bool, device=scores.device).triu(1)
    scores = (scores.float() * scale).unflatten(1, (-1, n_queries))
    scores[..., here].masked_fill_(future, float("-inf"))
    return scores.softmax(-1).flatten(1, 2).to(torch.bfloat16)


def _softmax_gradient(gradient: Tensor, probabilities: Tensor, here: slice, scale: float) -> Tensor:
    """Return the gradient at the scores from that at the probabilities, which may lie in the memory of the latter."""
    if native.usable("attention", gradient, probabilities):
        n_queries = here.stop - here.start
        torch.ops.ptq161.causal_softmax_gradient(gradient, probabilities, here.start, n_queries, scale)
        return gradient
    of_shares, shares = gradient.float(), probabilities.float()
    expected = (of_shares * shares).sum(-1, keepdim=True)
    return ((of_shares - expected) * (shares * scale)).to(torch.bfloat16)
