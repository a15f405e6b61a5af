"""A binarized linear whose scale and angular factors are learned with two matrix products per step.

With ``u = r2 * x``, ``z = u S^T`` and ``s = sum of u over the binary channels``, the layer computes
``y = r1 * (scale * z + mean * s) + x_salient W_salient^T + bias``. Given the gradient ``g`` at ``y``, the gradients
of scale, mean, r1 and r2 are sums over tokens of ``g * z``, ``g * s`` and ``x * (g W)``, so the product ``g^T x`` that
a weight's gradient would take is never needed.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, nn

from ptq161.kernels import binary_product
from ptq161.methods.ptq161.binarization import initial_scales, nearest_codes, pack_weight
from ptq161.packed.structured_binary import StructuredBinaryWeight


class BinaryLinear(nn.Module):
    """A linear during block-wise optimization: everything that does not change is computed once.

    Args:
        linear: the full-precision linear.
        mask: ``[in]`` bool, salient channels.
        salient_bits: bits of the salient channels.
        salient_range: see :func:`~ptq161.methods.ptq161.binarization.quantize_salient`.
        scale_dtype: dtype in which scales, means, angles and zero points are stored.
        compute_dtype: dtype of the matrix products.
        codes: see :func:`~ptq161.methods.ptq161.binarization.pack_weight`; None takes the nearest ones.

    Attributes:
        scale: parameter ``[out, 1]`` float32.
        row_angle: parameter ``[out, 1]`` float32, starts at one.
        column_angle: parameter ``[1, in]`` float32, starts at one, and stays zero where the column is all zero; salient
            channels ignore theirs.
        mask: ``[in]`` bool, salient channels.
        mean: parameter ``[out, 1]`` float32.

    Example:
        >>> settings = {"salient_bits": 4, "salient_range": "row", "scale_dtype": "float32"}
        >>> mask = torch.tensor([True, False, False, False])
        >>> layer = BinaryLinear(nn.Linear(4, 3, bias=False), mask, compute_dtype=torch.float32, **settings)
        >>> x = torch.eye(4)
        >>> torch.allclose(layer(x), x @ layer.pack().dequantize().T, atol=1e-5)
        True
        >>> [name for name, _ in layer.named_parameters()]
        ['mean', 'scale', 'row_angle', 'column_angle']
    """

    def __init__(
        self,
        linear: nn.Linear,
        mask: Tensor,
        *,
        salient_bits: int,
        salient_range: str,
        scale_dtype: str,
        compute_dtype: torch.dtype,
        codes: Tensor | None = None,
    ) -> None:
        super().__init__()
        self.weight = linear.weight.detach().float()
        self.bias: Tensor | None = linear.bias
        self.mask = mask
        self.salient_bits = salient_bits
        self.salient_range = salient_range
        self.scale_dtype = scale_dtype
        self.compute_dtype = compute_dtype
        mean, scale = initial_scales(self.weight, mask)
        if codes is None:  # kept, since a mean that is learned must not move the signs
            codes = nearest_codes(self.weight, mask, mean, salient_bits, salient_range, scale_dtype)
        self.codes = codes
        out_features, in_features = self.weight.shape
        self.mean = nn.Parameter(mean)
        self.scale = nn.Parameter(scale)
        self.row_angle = nn.Parameter(torch.ones(out_features, 1, device=scale.device))
        self.column_angle = nn.Parameter(torch.ones(1, in_features, device=scale.device))
        # Rows and columns that are all zero stay so, which pruning relies on; the released code gives them a scale.
        self.live_rows = scale > 0
        self.learned_columns = (self.weight != 0).any(0) & ~mask
        with torch.no_grad():
            self.column_angle.mul_(self.learned_columns | mask)

        self.salient_index = mask.nonzero().flatten()
        sign = torch.where(codes > 0, 1.0, -1.0) * ~mask
        self.sign = sign.to(compute_dtype)
        self.binary_channel = (~mask).float()
        self.salient_weight = (self.pack().dequantize() * mask).to(compute_dtype)
        self.salient_columns = self.salient_weight[:, self.salient_index].contiguous()

    def pack(self) -> StructuredBinaryWeight:
        """Return the packed weight of the present scales and angles."""
        with torch.no_grad():
            return pack_weight(
                self.weight,
                self.mask,
                self.mean,
                self.scale,
                self.row_angle,
                self.column_angle,
                self.salient_bits,
                self.salient_range,
                self.scale_dtype,
                self.codes,
            )

    def forward(self, x: Tensor) -> Tensor:
        """Map ``[..., in]`` to ``[..., out]`` of ``compute_dtype``."""
        # Function.apply has no annotations.
        y: Tensor = _BinaryProduct.apply(x, self.mean, self.scale, self.row_angle, self.column_angle, self)  # type: ignore[no-untyped-call]
        return y


class _BinaryProduct(torch.autograd.Function):
    """The layer's product, with the gradients as sums (see the module's docstring)."""

    @staticmethod
    def forward(
        ctx: Any, x: Tensor, mean: Tensor, scale: Tensor, row_angle: Tensor, column_angle: Tensor, layer: BinaryLinear
    ) -> Tensor:
        dtype = layer.compute_dtype
        ctx.layer, ctx.x_dtype = layer, x.dtype
        shape = x.shape[:-1]
        column = column_angle.flatten()
        row_scale, row_mean = (row_angle * scale).to(dtype), (row_angle * mean).to(dtype)
        with torch.autocast(x.device.type, enabled=False):
            # Eq. 5 without its weight: r2 on the inputs, one product with the signs, then scale and r1 on the outputs.
            x, u, rest = binary_product.inputs(
                x.reshape(-1, x.shape[-1]), column.masked_fill(layer.mask, 0.0), layer.salient_index, dtype
            )
            z = u @ layer.sign.T
            # All else is one product more: the salient channels at their own weights, and the mean with the sum of u.
            rest_weight = torch.cat([layer.salient_columns, row_mean], dim=1)
            bias = None if layer.bias is None else layer.bias.to(dtype)
            y = torch.nn.functional.linear(rest, rest_weight, bias)
            y.addcmul_(z, row_scale.T)
        ctx.save_for_backward(x, z, rest, row_scale, row_mean, mean, scale, row_angle, column)
        return y.view(*shape, y.shape[-1])

    @staticmethod
    def backward(ctx: Any, grad_y: Tensor) -> tuple[Tensor | None, ...]:
        x, z, rest, row_scale, row_mean, mean, scale, row_angle, column = ctx.saved_tensors
        layer: BinaryLinear = ctx.layer
        g = grad_y.reshape(-1, grad_y.shape[-1]).to(z.dtype).contiguous()
        with torch.autocast(x.device.type, enabled=False):
            grad_z, grad_total = binary_product.output_sums(g, z, rest)
            # W before r2, which the gradient at u goes through; salient channels pass unscaled.
            weight = binary_product.effective_weight(
                layer.sign, layer.salient_weight, row_scale, row_mean, layer.binary_channel
            )
            factor = column.masked_fill(layer.mask, 1.0)
            grad_column, grad_x = binary_product.input_gradients(g @ weight, x, factor, ctx.x_dtype)
        grad_x = grad_x.view(*grad_y.shape[:-1], -1)
        grad_mean = row_angle * grad_total * layer.live_rows
        grad_scale = row_angle * grad_z * layer.live_rows
        grad_row = scale * grad_z + mean * grad_total
        return grad_x, grad_mean, grad_scale, grad_row, grad_column * layer.learned_columns, None
