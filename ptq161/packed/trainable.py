"""A packed linear whose scales are trained, while its codes, planes and masks stay as they are.

What is trained is a gain of each stored scale, mean and zero point, in units of a fixed size. So one learning rate
serves all formats, and the trained weight has the bytes of the packed one.
"""

from __future__ import annotations

from collections.abc import Mapping

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from ptq161.packed.lenders import lenders_of
from ptq161.packed.linear import PackedLinear
from ptq161.packed.weight import OF_ACTIVATIONS, PackedWeight, scale_dtype_of, stored_scale


def scale_tensors(packed: PackedWeight) -> dict[str, Tensor]:
    """Return the tensors that can be trained, by field name: scales, means, zero points, all that are floating-point.

    Example:
        >>> from ptq161.packed.uniform import UniformWeight
        >>> packed = UniformWeight.pack(torch.tensor([[0, 3]]), torch.ones(1, 1), torch.ones(1, 1), bits=2)
        >>> sorted(scale_tensors(packed))
        ['scales', 'zero_points']
    """
    stored = packed.state_dict().items()
    return {name: tensor for name, tensor in stored if tensor.is_floating_point() and name not in OF_ACTIVATIONS}


def gain_sizes(packed: PackedWeight) -> dict[str, Tensor]:
    """Return by how much a gain of one changes each value: float32, of the shapes of :func:`scale_tensors`.

    A factor changes by its own magnitude, so that zero stays zero; an offset, which may cross zero, by the root mean
    square of its kind over the rows, or over the codebook that it belongs to; and nothing changes in a row whose
    weights are all zero.

    Example:
        >>> from ptq161.packed.uniform import UniformWeight
        >>> scales, zero_points = torch.tensor([[0.5], [2.0], [1.0]]), torch.tensor([[0.0], [1.0], [1.0]])
        >>> codes = torch.tensor([[0, 3], [1, 2], [1, 1]])  # the last row is zero
        >>> sizes = gain_sizes(UniformWeight.pack(codes, scales, zero_points, bits=2))
        >>> sizes["scales"].flatten(), sizes["zero_points"].flatten()
        (tensor([0.5000, 2.0000, 0.0000]), tensor([0.8165, 0.8165, 0.0000]))
    """
    has_weights = packed.dequantize().any(1).unsqueeze(1)
    sizes = {}
    for name, tensor in scale_tensors(packed).items():
        size = tensor.float().abs()
        if name in packed.offsets:
            size = size.square().mean((-2, -1)[-size.ndim :], keepdim=True).sqrt().expand_as(size)
        # A tensor of two or more dimensions is [..., out, groups], unless its format shares it among the rows.
        sizes[name] = size * has_weights if size.ndim > 1 and name not in packed.shared else size
    return sizes


def scaled_linears(
    packed: Mapping[str, PackedWeight], biases: Mapping[str, Tensor | None], compute_dtype: torch.dtype
) -> dict[str, ScaledLinear]:
    """Return a :class:`ScaledLinear` for each weight; weights that share tensors are trained together.

    Args:
        packed: by ``"{block}.{path}"`` or by module path.
        biases: by the same names.
        compute_dtype: of the matrix products.

    Example:
        >>> import dataclasses
        >>> from ptq161.packed.vector import Coded, VectorWeight
        >>> one = VectorWeight.pack(Coded(torch.ones(1, 2, 2), torch.tensor([[0, 1]])), (2, 2))
        >>> weights = {"0.q": one, "0.k": dataclasses.replace(one, lender="0.q")}
        >>> layers = scaled_linears(weights, {"0.q": None, "0.k": None}, torch.float32)
        >>> with torch.no_grad():
        ...     list(layers["0.k"].gains), layers["0.q"].gains["centroids"].fill_(0.5).shape
        ([], torch.Size([1, 2, 2]))
        >>> layers["0.k"].repack().dequantize().tolist()
        [[1.5, 1.5], [1.5, 1.5]]
    """
    lenders = lenders_of({name: weight.lender for name, weight in packed.items()})
    made: dict[str, ScaledLinear] = {}
    for name in sorted(packed, key=lambda name: name in lenders):
        lender = made[lenders[name]] if name in lenders else None
        made[name] = ScaledLinear(packed[name], biases[name], compute_dtype, lender)
    return {name: made[name] for name in packed}


class ScaledLinear(nn.Module):
    """A linear over a packed weight whose scales, means and zero points are trained.

    Each of them is ``start + gain * size`` with ``size`` from :func:`gain_sizes`. The gains are the module's only
    parameters that require a gradient: float32, zero at first, when the weight is exactly the packed one.

    Args:
        packed: the weight.
        bias: ``[out]``, in any float dtype, not trained; None for no bias.
        compute_dtype: of the matrix product.
        lender: the layer in training whose weight stores what this one shares; its gains move both.

    Example:
        >>> from ptq161.packed.uniform import UniformWeight
        >>> packed = UniformWeight.pack(torch.tensor([[0, 1, 2]]), torch.ones(1, 1), torch.zeros(1, 1), bits=2)
        >>> layer = ScaledLinear(packed, None, torch.float32)
        >>> with torch.no_grad():
        ...     layer.gains["scales"].fill_(0.5).tolist()
        [[0.5]]
        >>> layer(torch.ones(1, 3)).tolist(), layer.repack().scales.tolist()
        ([[4.5]], [[1.5]])
    """

    def __init__(
        self,
        packed: PackedWeight,
        bias: Tensor | None,
        compute_dtype: torch.dtype,
        lender: ScaledLinear | None = None,
    ) -> None:
        super().__init__()
        self.start = PackedLinear(packed, bias)
        self.__dict__["_lender"] = lender  # no submodule: a gain has one name
        self.compute_dtype = compute_dtype
        self.gains = nn.ParameterDict()
        for name, size in gain_sizes(packed).items():
            self.gains[name] = nn.Parameter(torch.zeros_like(size))
            self.register_buffer(f"{name}_size", size, persistent=False)

    def dequantize(self) -> Tensor:
        """Return the weight with its present gains, differentiable in them: ``[out, in]`` float32."""
        return self._present().dequantize()

    def forward(self, x: Tensor) -> Tensor:
        """Map ``[..., in]`` in ``compute_dtype`` (any float dtype under autocast) to ``[..., out]``."""
        bias, x = self.start.bias, self.start.rounded(x)
        with torch.autocast(x.device.type, enabled=False):  # a format may have products of its own
            weight = self.dequantize().to(self.compute_dtype)
        return F.linear(x, weight, None if bias is None else bias.to(self.compute_dtype))

    @torch.no_grad()
    def repack(self) -> PackedWeight:
        """Return the packed weight with its trained values, rounded to the dtypes in which they are stored.

        Raises:
            UserError: a value is not finite or leaves the range of its dtype.
        """
        packed, lender = self.start.packed, self._lender
        stored = packed.tensors()
        if lender is not None:
            stored |= packed.borrowed(lender.repack().lent())
        for name, value in self._values().items():
            stored[name] = stored_scale(value, scale_dtype_of(stored[name]))
        return packed.with_tensors(stored)

    @property
    def _lender(self) -> ScaledLinear | None:
        lender: ScaledLinear | None = self.__dict__["_lender"]
        return lender

    def _present(self) -> PackedWeight:
        """Return the weight over its present values, in float32."""
        packed, lender = self.start.packed, self._lender
        borrowed = {} if lender is None else packed.borrowed(lender._present().lent())
        return packed.with_tensors(borrowed | self._values())

    def _values(self) -> dict[str, Tensor]:
        starts = scale_tensors(self.start.packed)
        return {
            name: starts[name].float() + gain * self.get_buffer(f"{name}_size") for name, gain in self.gains.items()
        }
