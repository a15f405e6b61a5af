"""What a decoder block computes between its matrix products, for the CPU: one pass each where torch takes many.

Norms, gates and rotated attention of a block in bfloat16 are some sixty passes over its activations, forward and
backward, which take longer than its matrix products. Inside :func:`fused_blocks` the modules that compute them as
Llama's do, word for word (in transformers most do), take the operators of ``block.cpp`` and
:mod:`ptq161.kernels.attention`; all others stay as they are. The results are those of the modules up to the order of
sums and to what transformers rounds in between.
"""

from __future__ import annotations

import functools
from collections.abc import Callable, Iterable, Iterator
from contextlib import contextmanager
from types import FunctionType
from typing import Any

import torch
from torch import Tensor, nn

from ptq161.kernels import native
from ptq161.kernels.attention import FastCausalAttention, causal_attention


@contextmanager
def fused_blocks(blocks: Iterable[nn.Module]) -> Iterator[None]:
    """Inside this context, modules of blocks on the CPU take one pass where torch takes many, under bfloat16 autocast.

    Causal attention of all other modules is :class:`~ptq161.kernels.attention.FastCausalAttention`.

    Args:
        blocks: whose modules; those with a ``forward`` of their own keep it.
    """
    fused = []
    halves = torch.is_autocast_enabled("cpu") and torch.get_autocast_dtype("cpu") == torch.bfloat16
    if halves and native.usable("block") and native.usable("attention"):
        for block in blocks:
            for module in block.modules():
                forward = _fused_forward(type(module).forward)
                if forward is not None and "forward" not in module.__dict__:
                    module.__dict__["forward"] = functools.partial(forward, module)
                    fused.append(module)
    try:
        with FastCausalAttention():
            yield
    finally:
        for module in fused:
            del module.__dict__["forward"]


def rms_norm(x: Tensor, weight: Tensor, epsilon: float) -> Tensor:
    """Return ``weight * x / rms(x)`` in float32, differentiable in both.

    Args:
        x: ``[..., n]`` float32 or bfloat16.
        weight: ``[n]`` float32.
        epsilon: added to the mean square.

    Example:
        >>> rms_norm(torch.tensor([[3.0, 3.0]]), torch.tensor([1.0, 2.0]), 0.0).tolist()
        [[1.0, 2.0]]
    """
    if not native.usable("block", x, weight):
        size = x.float().square().mean(-1, keepdim=True)
        return weight * (x.float() * torch.rsqrt(size + epsilon))
    flat = x.reshape(-1, x.shape[-1])
    out: Tensor = _RMSNorm.apply(flat, weight, epsilon)  # type: ignore[no-untyped-call]  # torch leaves it untyped
    return out.view(x.shape)


def gated(gate: Tensor, up: Tensor) -> Tensor:
    """Return ``silu(gate) * up``, differentiable in both.

    Args:
        gate: ``[..., n]`` bfloat16.
        up: the same shape.

    Example:
        >>> gated(torch.tensor([[8.0, -8.0]]).bfloat16(), torch.ones(1, 2).bfloat16()).float().round().tolist()
        [[8.0, -0.0]]
    """
    if not native.usable("block", gate, up):
        return (nn.functional.silu(gate.float()) * up.float()).to(gate.dtype)
    flat = [x.reshape(-1, x.shape[-1]) for x in (gate, up)]
    out: Tensor = _Gated.apply(*flat)  # type: ignore[no-untyped-call]  # torch leaves it untyped
    return out.view(gate.shape)


def rotate(x: Tensor, cosines: Tensor, sines: Tensor) -> Tensor:
    """Rotate the features of each head by the angles of its position, and put the heads before the positions.

    Args:
        x: ``[batch, seq, heads, width]`` bfloat16.
        cosines: ``[1 or batch, seq, width]`` float32.
        sines: the same shape.

    Returns:
        ``[batch, heads, seq, width]`` bfloat16, differentiable in ``x``.

    Example:
        >>> quarter = torch.zeros(1, 1, 2), torch.ones(1, 1, 2)
        >>> rotate(torch.tensor([[[[1.0, 2.0]]]]).bfloat16(), *quarter).tolist()
        [[[[-2.0, 1.0]]]]
    """
    if not native.usable("block", x, cosines, sines):
        first, second = x.float().chunk(2, -1)
        turned = torch.cat([-second, first], -1)
        of_head = [angles.unsqueeze(2) for angles in (cosines, sines)]
        return (x.float() * of_head[0] + turned * of_head[1]).to(x.dtype).transpose(1, 2)
    rotated: Tensor = _Rotation.apply(x, cosines, sines)  # type: ignore[no-untyped-call]  # torch leaves it untyped
    return rotated


class _RMSNorm(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, x: Tensor, weight: Tensor, epsilon: float) -> Tensor:
        x, weight = x.contiguous(), weight.contiguous()
        out: Tensor
        out, inverse = torch.ops.ptq161.rms_norm(x, weight, epsilon)
        ctx.save_for_backward(x, weight, inverse)
        return out

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor | None, Tensor | None, None]:
        x, weight, inverse = ctx.saved_tensors
        of_x, of_weight = ctx.needs_input_grad[:2]
        grad = grad.contiguous()
        return (
            torch.ops.ptq161.rms_norm_gradient(grad, x, weight, inverse) if of_x else None,
            (grad * x).T @ inverse if of_weight else None,
            None,
        )


class _Gated(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, gate: Tensor, up: Tensor) -> Tensor:
        gate, up = gate.contiguous(), up.contiguous()
        ctx.save_for_backward(gate, up)
        out: Tensor = torch.ops.ptq161.gated(gate, up)
        return out

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor, Tensor]:
        gradients: tuple[Tensor, Tensor] = torch.ops.ptq161.gated_gradients(grad.contiguous(), *ctx.saved_tensors)
        return gradients


class _Rotation(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, x: Tensor, cosines: Tensor, sines: Tensor) -> Tensor:
        cosines, sines = cosines.contiguous(), sines.contiguous()
        ctx.save_for_backward(cosines, sines)
        rotated: Tensor = torch.ops.ptq161.rotate(x.contiguous(), cosines, sines, False)
        return rotated

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor, None, None]:
        return torch.ops.ptq161.rotate(grad.contiguous(), *ctx.saved_tensors, True), None, None


def _norm_forward(module: Any, hidden_states: Tensor) -> Tensor:
    floats = module.weight.dtype == torch.float32 and hidden_states.dtype in (torch.float32, torch.bfloat16)
    if floats and hidden_states.device.type == "cpu":
        return rms_norm(hidden_states, module.weight, module.variance_epsilon)
    out: Tensor = type(module).forward(module, hidden_states)
    return out


def _mlp_forward(module: Any, x: Tensor) -> Tensor:
    from transformers.activations import SiLUActivation  # long imported where there is a model

    gate, up = module.gate_proj(x), module.up_proj(x)
    is_silu = isinstance(module.act_fn, SiLUActivation)
    hidden = gated(gate, up) if is_silu and _halves(gate, up) else module.act_fn(gate) * up
    out: Tensor = module.down_proj(hidden)
    return out


def _attention_forward(
    module: Any,
    hidden_states: Tensor,
    position_embeddings: tuple[Tensor, Tensor] | None = None,
    attention_mask: Tensor | None = None,
    past_key_values: Any = None,
    **kwargs: Any,
) -> tuple[Tensor, Tensor | None]:
    plain = (
        position_embeddings is not None
        and attention_mask is None
        and past_key_values is None
        and hidden_states.device.type == "cpu"
        and module.is_causal
        and module.config._attn_implementation == "sdpa"
        and not (module.training and module.attention_dropout)
    )
    if not plain:
        found: tuple[Tensor, Tensor | None] = type(module).forward(
            module, hidden_states, position_embeddings, attention_mask, past_key_values, **kwargs
        )
        return found
    assert position_embeddings is not None  # plain
    shape = (*hidden_states.shape[:-1], -1, module.head_dim)
    query, key, value = (part(hidden_states).view(shape) for part in (module.q_proj, module.k_proj, module.v_proj))
    if _halves(query, key):
        angles = [part.float() for part in position_embeddings]
        query, key = (rotate(x, *angles) for x in (query, key))
    else:
        rotation = type(module).forward.__globals__["apply_rotary_pos_emb"]
        query, key = rotation(query.transpose(1, 2), key.transpose(1, 2), *position_embeddings)
    attended = causal_attention(query, key, value.transpose(1, 2), module.scaling)
    return module.o_proj(attended.transpose(1, 2).flatten(2)), None


def _halves(*tensors: Tensor) -> bool:
    return all(x.dtype == torch.bfloat16 and x.device.type == "cpu" for x in tensors)


@functools.cache
def _known() -> list[tuple[Any, str, Callable[..., Any]]]:
    """Return forward functions of Llama, the names that they used when this module was written, and its own."""
    # It takes seconds to import, and only runs that load a model need it.
    from transformers.models.llama.modeling_llama import LlamaAttention, LlamaMLP, LlamaRMSNorm

    return [
        (LlamaRMSNorm.forward, "dtype to torch float32 pow mean rsqrt variance_epsilon weight", _norm_forward),
        (LlamaMLP.forward, "down_proj act_fn gate_proj up_proj", _mlp_forward),
        (
            LlamaAttention.forward,
            "shape head_dim q_proj view transpose k_proj v_proj apply_rotary_pos_emb update layer_idx "
            "ALL_ATTENTION_FUNCTIONS get_interface config _attn_implementation eager_attention_forward training "
            "attention_dropout scaling reshape contiguous o_proj",
            _attention_forward,
        ),
    ]


_ROTATION = {"apply_rotary_pos_emb": "unsqueeze rotate_half", "rotate_half": "shape torch cat"}
"""Functions of a modeling file that its attention calls, and their names."""


@functools.cache
def _fused_forward(forward: Callable[..., Any]) -> Callable[..., Any] | None:
    """Return the function that computes what the ``forward`` of a class does; None if that is not known."""
    for llamas, names, fused in _known():
        if _same(forward, llamas, names):
            of_forward, of_llama = forward.__globals__, llamas.__globals__
            called = _ROTATION if fused is _attention_forward else {}
            if all(_same(of_forward.get(name), of_llama.get(name), used) for name, used in called.items()):
                return fused
    return None


def _same(function: Any, llamas: Any, names: str) -> bool:
    """Whether a function runs the instructions of Llama's on the same names and constants, and Llama's is the known."""
    if not (isinstance(function, FunctionType) and isinstance(llamas, FunctionType)):
        return False
    code, known = function.__code__, llamas.__code__
    same = all(getattr(code, part) == getattr(known, part) for part in ("co_code", "co_names", "co_consts"))
    return same and " ".join(known.co_names) == names
