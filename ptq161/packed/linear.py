"""The linear layer over a packed weight, and the explicit, temporary cache of its dense form."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from ptq161.packed.activations import quantized_activations
from ptq161.packed.weight import OF_ACTIVATIONS, PackedWeight


class PackedLinear(nn.Module):
    """A linear whose weight exists only as packed tensors.

    The packed tensors are the module's buffers, so that the state dict holds exactly what is stored. Each forward
    pass dequantizes them, unless it runs inside :func:`dense_cache`. Changing the module's dtype leaves the packed
    tensors as they are.

    Args:
        packed: the weight.
        bias: ``[out]``, in any float dtype; None for no bias.

    Example:
        >>> from ptq161.packed.uniform import UniformWeight
        >>> packed = UniformWeight.pack(torch.tensor([[0, 1, 2]]), torch.ones(1, 1), torch.zeros(1, 1), bits=2)
        >>> layer = PackedLinear(packed, bias=torch.tensor([0.5]))
        >>> layer(torch.ones(4, 3)).flatten()
        tensor([3.5000, 3.5000, 3.5000, 3.5000])
        >>> sorted(layer.state_dict())
        ['bias', 'codes', 'scales', 'zero_points']
    """

    def __init__(self, packed: PackedWeight, bias: Tensor | None = None) -> None:
        super().__init__()
        self.out_features = packed.out_features
        self.in_features = packed.in_features
        self._template = packed
        for name, tensor in packed.state_dict().items():
            self.register_buffer(name, tensor)
        self.bias = None if bias is None else nn.Parameter(bias.detach(), requires_grad=False)
        self._dense: Tensor | None = None

    @property
    def packed(self) -> PackedWeight:
        """The packed weight over this module's buffers."""
        return self._template.with_tensors(dict(self.named_buffers(recurse=False)))

    @property
    def qweight(self) -> Tensor:
        """One of the packed tensors, under the name by which PEFT looks for the device of a quantized linear."""
        return next(self.buffers(recurse=False))

    def dequantize(self) -> Tensor:
        """Return the weight that the stored bytes stand for: ``[out, in]`` float32."""
        return self.packed.dequantize()

    def forward(self, x: Tensor) -> Tensor:
        """Map ``[..., in]`` to ``[..., out]`` in the dtype of ``x``, rounded first where the weight says so."""
        x = self.rounded(x)
        weight = self.dequantize().to(x.dtype) if self._dense is None else self._dense
        return F.linear(x, weight.to(x.dtype), None if self.bias is None else self.bias.to(x.dtype))

    def rounded(self, x: Tensor) -> Tensor:
        """Return the inputs ``[..., in]`` as they are multiplied: rounded if the packed weight has activation bits."""
        bits = self._template.activation_bits
        if bits is None:
            return x
        scale, zero_point = (self.get_buffer(name) for name in OF_ACTIVATIONS)
        return quantized_activations(x, scale, zero_point, bits)

    def extra_repr(self) -> str:
        """Return shape, format and measured bits, as they are printed in a model."""
        bits = self._template.activation_bits
        return (
            f"in_features={self.in_features}, out_features={self.out_features}, format={self._template.format}, "
            f"bits_per_weight={self.packed.bits_per_weight:.2f}" + (f", activation_bits={bits}" if bits else "")
        )

    def _apply(self, fn: Callable[[Tensor], Tensor], recurse: bool = True) -> PackedLinear:
        """Follow a move to another device; keep every packed tensor's dtype."""
        stored = dict(self._buffers)
        super()._apply(fn, recurse)  # type: ignore[no-untyped-call]  # nn.Module leaves it without annotations
        for name, tensor in stored.items():
            moved = self._buffers[name]
            if tensor is not None and moved is not None and moved.dtype != tensor.dtype:
                self._buffers[name] = tensor.to(moved.device)
        return self


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
