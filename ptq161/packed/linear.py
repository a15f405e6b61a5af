"""The linear layer over a packed weight: products from its bytes, or with its dense form, part by part or kept."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Self

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from ptq161.errors import UserError
from ptq161.packed.activations import quantized_activations
from ptq161.packed.weight import OF_ACTIVATIONS, PackedWeight

FEW_ROWS = 16
"""Rows up to which a product from the packed bytes is surely faster than one with the dequantized weight: both take as
long at 20 to 35 rows (``benchmarks/decode.py --rows``)."""
_TILE_WEIGHTS = 2**20
"""Weights that are dequantized at once on the CPU: they stay in the cache of a processor until they are multiplied."""


class PackedModule(nn.Module):
    """A module whose weight exists only as packed tensors.

    The packed tensors that the weight stores are the module's buffers, so that the state dict holds exactly what is
    stored; those that another linear stores are read from there (:mod:`ptq161.packed.lenders`). Changing the module's
    dtype leaves them as they are.

    Args:
        packed: the weight.
        owner: the module that holds the weight's tensors, where this one shares them; None for a weight of its own.

    Example:
        >>> from ptq161.packed.uniform import UniformWeight
        >>> packed = UniformWeight.pack(torch.tensor([[0, 1, 2]]), torch.ones(1, 1), torch.zeros(1, 1), bits=2)
        >>> holder = PackedModule(packed).to(torch.bfloat16)
        >>> {name: tensor.dtype for name, tensor in holder.state_dict().items()}["scales"], holder.dequantize()
        (torch.float16, tensor([[0., 1., 2.]]))
    """

    def __init__(self, packed: PackedWeight, owner: PackedModule | None = None) -> None:
        super().__init__()
        self.out_features = packed.out_features
        self.in_features = packed.in_features
        self.activation_bits = packed.activation_bits
        self.lender = packed.lender
        # No submodule: a tensor has one name in the state dict.
        self.__dict__["_owner"] = owner
        self.__dict__["_lender"] = None
        if owner is None:
            self._template, self._stored = packed, packed.state_dict()
            for name, tensor in packed.state_dict().items():
                self.register_buffer(name, tensor)

    @property
    def packed(self) -> PackedWeight:
        """The packed weight over this module's buffers, or over its owner's."""
        owner: PackedModule | None = self.__dict__["_owner"]
        if owner is not None:
            return owner.packed
        tensors = {name: tensor for name, tensor in self._buffers.items() if tensor is not None}
        lender: PackedModule | None = self.__dict__["_lender"]
        if lender is not None:
            tensors |= self._template.borrowed(lender.packed.lent())
        if any(self._stored.get(name) is not tensor for name, tensor in tensors.items()):
            self._template, self._stored = self._template.with_tensors(tensors), tensors
        return self._template

    def borrow_from(self, lender: PackedModule) -> None:
        """Read the tensors that the weight shares from the module that stores them."""
        self.__dict__["_lender"] = lender

    def dequantize(self) -> Tensor:
        """Return the weight that the stored bytes stand for: ``[out, in]`` float32."""
        return self.packed.dequantize()

    def _apply(self, fn: Callable[[Tensor], Tensor], recurse: bool = True) -> Self:
        """Follow a move to another device; keep every packed tensor's dtype."""
        stored = dict(self._buffers)
        super()._apply(fn, recurse)  # type: ignore[no-untyped-call]  # nn.Module leaves it without annotations
        for name, tensor in stored.items():
            moved = self._buffers[name]
            if tensor is not None and moved is not None and moved.dtype != tensor.dtype:
                self._buffers[name] = tensor.to(moved.device)
        return self


class PackedLinear(PackedModule):
    """A linear whose weight exists only as packed tensors.

    Few rows without gradient are multiplied with the packed bytes where their format and device have an operator for
    it. Otherwise each forward pass dequantizes them, without gradient a tile of rows at a time on the CPU, unless it
    runs inside :func:`dense_cache`.

    Args:
        packed: the weight.
        bias: ``[out]``, in any float dtype; None for no bias.
        owner: as for :class:`PackedModule`.

    Attributes:
        int8: multiply activations of eight bits, see :func:`int8_activations`.
        whole: dequantize the whole weight for each product on any device, see :func:`dense_products`.

    Example:
        >>> from ptq161.packed.uniform import UniformWeight
        >>> packed = UniformWeight.pack(torch.tensor([[0, 1, 2]]), torch.ones(1, 1), torch.zeros(1, 1), bits=2)
        >>> layer = PackedLinear(packed, bias=torch.tensor([0.5]))
        >>> layer(torch.ones(4, 3)).flatten()
        tensor([3.5000, 3.5000, 3.5000, 3.5000])
        >>> sorted(layer.state_dict())
        ['bias', 'codes', 'scales', 'zero_points']
    """

    def __init__(self, packed: PackedWeight, bias: Tensor | None = None, owner: PackedModule | None = None) -> None:
        super().__init__(packed, owner)
        self.int8 = self.whole = False
        self.bias = None if bias is None else nn.Parameter(bias.detach(), requires_grad=False)
        self._dense: Tensor | None = None

    @property
    def qweight(self) -> Tensor:
        """One of the packed tensors, under the name by which PEFT looks for the device of a quantized linear."""
        return next(self.buffers(recurse=False))

    def forward(self, x: Tensor) -> Tensor:
        """Map ``[..., in]`` to ``[..., out]`` in the dtype of ``x``, rounded first where the weight says so.

        Raises:
            UserError: activations of eight bits are asked for, and need a gradient or a format that has none.
        """
        x = self.rounded(x)
        bias = None if self.bias is None else self.bias.to(x.dtype)
        if self.int8:
            return self._int8_product(x, bias)
        if self._dense is not None:
            return F.linear(x, self._dense.to(x.dtype), bias)
        packed = self.packed
        if self.whole or self._needs_gradient(x):
            learned = any(tensor is not None and tensor.requires_grad for tensor in self._buffers.values())
            return F.linear(x, packed.dequantize().to(x.dtype) if learned else packed.dense(x.dtype), bias)
        if x.numel() <= FEW_ROWS * self.in_features and not torch.is_autocast_enabled(x.device.type):
            y = packed.rows_product(x, bias)
            if y is not None:
                return y
        return tiled_product(packed, x, bias)

    def rounded(self, x: Tensor) -> Tensor:
        """Return the inputs ``[..., in]`` as they are multiplied: rounded if the packed weight has activation bits."""
        bits = self.activation_bits
        if bits is None:
            return x
        scale, zero_point = (self.get_buffer(name) for name in OF_ACTIVATIONS)
        return quantized_activations(x, scale, zero_point, bits)

    def extra_repr(self) -> str:
        """Return shape, format and measured bits, as they are printed in a model."""
        packed, bits = self.packed, self.activation_bits
        return (
            f"in_features={self.in_features}, out_features={self.out_features}, format={packed.format}, "
            f"bits_per_weight={packed.bits_per_weight:.2f}" + (f", activation_bits={bits}" if bits else "")
        )

    def _needs_gradient(self, x: Tensor) -> bool:
        tensors = (x, self.bias, *self._buffers.values())
        return torch.is_grad_enabled() and any(tensor is not None and tensor.requires_grad for tensor in tensors)

    def _int8_product(self, x: Tensor, bias: Tensor | None) -> Tensor:
        if self._needs_gradient(x):
            raise UserError("activations of eight bits have no gradient: call the model inside torch.no_grad().")
        packed = self.packed
        y = packed.rows_product(x, bias, int8=True)
        return int8_product(packed, x, bias) if y is None else y


class PackedHead(PackedLinear):
    """A model's output embedding: it counts as none of the packed linears, and is left out of activations of 8 bits.

    Example:
        >>> from ptq161.packed.uniform import UniformWeight
        >>> packed = UniformWeight.pack(torch.tensor([[0, 1, 2]]), torch.ones(1, 1), torch.zeros(1, 1), bits=2)
        >>> embedding = PackedModule(packed)
        >>> head = PackedHead(embedding.packed, owner=embedding)
        >>> head(torch.ones(1, 3)), list(head.state_dict())
        (tensor([[3.]]), [])
    """


def tiled_product(packed: PackedWeight, x: Tensor, bias: Tensor | None = None) -> Tensor:
    """Return ``x @ W.T + bias`` in the dtype of ``x``; on a CPU no more than a tile of rows is dequantized at a time.

    Args:
        packed: the weight; one whose rows cannot be read alone is dequantized whole.
        x: ``[..., in]``, without gradient.
        bias: ``[out]`` in the dtype of ``x``.

    Example:
        >>> from ptq161.packed.uniform import UniformWeight
        >>> packed = UniformWeight.pack(torch.tensor([[0, 1, 2]]), torch.ones(1, 1), torch.zeros(1, 1), bits=2)
        >>> tiled_product(packed, torch.ones(2, 3))
        tensor([[3.],
                [3.]])
    """
    n = packed.out_features
    step = max(2, _TILE_WEIGHTS // max(1, packed.in_features) // 2 * 2)  # even: two rows may share a byte
    if x.device.type != "cpu" or n <= step:
        return F.linear(x, packed.dense(x.dtype), bias)
    tiles = []
    for start in range(0, n, step):
        stop = min(start + step, n)
        weight = packed.tile(start, stop, x.dtype)
        if weight is None:
            return F.linear(x, packed.dense(x.dtype), bias)
        tiles.append(F.linear(x, weight, None if bias is None else bias[start:stop]))
    return torch.cat(tiles, dim=-1)


def int8_product(packed: PackedWeight, x: Tensor, bias: Tensor | None = None) -> Tensor:
    """Return ``x @ W.T + bias`` with activations of eight bits: what the compiled operators compute, in torch.

    For each row of ``x`` and each segment of the weight the activations, times the columns' factors, are rounded to 127
    steps of equal size to either side of zero.

    Args:
        packed: a weight that has segments.
        x: ``[..., in]``, without gradient.
        bias: ``[out]`` in the dtype of ``x``.

    Raises:
        UserError: the format has no segments.

    Example:
        >>> from ptq161.packed.uniform import UniformWeight
        >>> packed = UniformWeight.pack(torch.tensor([[0, 1, 2]]), torch.ones(1, 1), torch.zeros(1, 1), bits=2)
        >>> int8_product(packed, torch.tensor([[100.0, 0.3, 0.0]]))  # 0.3 is nothing in steps of 100 / 127
        tensor([[0.]])
    """
    segments = packed.segments()
    if segments is None:
        raise UserError(_no_int8(packed.format))
    y = torch.zeros(*x.shape[:-1], packed.out_features, device=x.device)
    for part in segments:
        if not part.columns.numel():
            continue
        values = x.float()[..., part.columns] * part.factor
        step = values.abs().amax(-1, keepdim=True) / 127
        rounded = torch.where(step > 0, values / step, values).round()
        y += step * (rounded @ (part.scale * part.codes + part.shift).T)
    y *= 2.0**packed.exponent
    return (y if bias is None else y + bias.float()).to(x.dtype)


@contextmanager
def int8_activations(model: nn.Module) -> Iterator[None]:
    """Let every packed linear of ``model`` multiply activations of eight bits for the duration of the context.

    That is faster and another result (:func:`int8_product`); nothing does it of its own accord. Heads are left out.

    Raises:
        UserError: a linear's format has no such product.

    Example:
        >>> from ptq161.packed.uniform import UniformWeight
        >>> packed = UniformWeight.pack(torch.tensor([[0, 1, 2]]), torch.ones(1, 1), torch.zeros(1, 1), bits=2)
        >>> model = nn.Sequential(PackedLinear(packed))
        >>> with int8_activations(model):
        ...     y = model(torch.tensor([[100.0, 0.3, 0.0]]))
        >>> y, model(torch.tensor([[100.0, 0.3, 0.0]]))
        (tensor([[0.]]), tensor([[0.3000]]))
    """
    found = (module for module in model.modules() if isinstance(module, PackedLinear))
    layers = [module for module in found if not isinstance(module, PackedHead)]
    for layer in layers:
        if type(layer.packed).segments is PackedWeight.segments:
            raise UserError(_no_int8(layer.packed.format))
    try:
        for layer in layers:
            layer.int8 = True
        yield
    finally:
        for layer in layers:
            layer.int8 = False


@contextmanager
def dense_cache(model: nn.Module, dtype: torch.dtype) -> Iterator[None]:
    """Dequantize every packed linear of ``model`` once for the duration of the context.

    Bytes that are changed inside the context have no effect until it ends.

    Example:
        >>> from ptq161.packed.uniform import UniformWeight
        >>> packed = UniformWeight.pack(torch.tensor([[0, 1, 2]]), torch.ones(1, 1), torch.zeros(1, 1), bits=2)
        >>> model = nn.Sequential(PackedLinear(packed))
        >>> with dense_cache(model, torch.float32):
        ...     y = model(torch.ones(4, 3))
        >>> torch.equal(y, model(torch.ones(4, 3)))
        True
    """
    layers = [module for module in model.modules() if isinstance(module, PackedLinear)]
    try:
        for layer in layers:
            layer._dense = layer.dequantize().to(dtype)
        yield
    finally:
        for layer in layers:
            layer._dense = None


@contextmanager
def dense_products(model: nn.Module) -> Iterator[None]:
    """Let every packed linear of ``model`` dequantize its weight for each product, for the duration of the context.

    The products have the bits that they have inside of :func:`dense_cache`, with one dense linear at a time in memory.

    Example:
        >>> from ptq161.packed.uniform import UniformWeight
        >>> packed = UniformWeight.pack(torch.tensor([[0, 1, 2]]), torch.ones(1, 1), torch.zeros(1, 1), bits=2)
        >>> model = nn.Sequential(PackedLinear(packed))
        >>> with dense_products(model):
        ...     model(torch.ones(1, 3))
        tensor([[3.]])
    """
    layers = [module for module in model.modules() if isinstance(module, PackedLinear)]
    try:
        for layer in layers:
            layer.whole = True
        yield
    finally:
        for layer in layers:
            layer.whole = False


def _no_int8(name: str) -> str:
    return f"activations of eight bits: weights stored as {name!r} have no such product."
