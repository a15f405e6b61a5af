"""Round to nearest: each weight goes to the nearest point of its channel's or group's uniform grid."""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping
from typing import Any, ClassVar

import torch
from torch import Tensor

from ptq161.methods.base import Window
from ptq161.methods.layerwise import InputStatistics, UniformMethod
from ptq161.packed.uniform import UniformWeight, check_uniform, grouped, per_column, uniform_codes, uniform_parameters
from ptq161.packed.weight import PackedWeight, check_magnitude

_WEIGHTS_AT_ONCE = 2**22


@dataclasses.dataclass(frozen=True)
class RTN(UniformMethod):
    """Round to nearest, without any data.

    The grid's settings are those of :class:`~ptq161.methods.layerwise.UniformMethod`.

    Attributes:
        symmetric: center the grid on zero and store no zero points.

    Example:
        >>> RTN(bits=2, group_size=128, symmetric=True).nominal_bits()
        2.0
    """

    format: ClassVar[str] = "uniform"
    needs_statistics: ClassVar[bool] = False

    symmetric: bool = False

    def quantize_group(
        self, weights: Mapping[str, Tensor], statistics: InputStatistics | None, window: Window
    ) -> dict[str, PackedWeight]:
        """Quantize each linear on its own; statistics and window are not used."""
        return {
            name: quantize_weight(
                weight, self.bits, group_size=self.group_size, symmetric=self.symmetric, scale_dtype=self.scale_dtype
            )
            for name, weight in weights.items()
        }


def quantize_weight(
    weight: Tensor,
    bits: int,
    *,
    group_size: int | None = None,
    symmetric: bool = False,
    scale_dtype: str = "float16",
) -> UniformWeight:
    """Round a weight to nearest (IST-DASLab/gptq, ``quant.py``: ``Quantizer`` with ``perchannel``, without ``mse``).

    Args:
        weight: ``[out, in]``.
        bits: 2, 3, 4 or 8.
        group_size: columns that share a scale; None is one scale per output channel. The last group may be shorter.
        symmetric: center the grid on zero.
        scale_dtype: dtype of stored scales and zero points.

    Raises:
        UserError: a setting is out of range, or a weight is not finite.

    Example:
        >>> import torch
        >>> packed = quantize_weight(torch.tensor([[-1.0, 0.4, 2.0, 0.0]]), bits=2)
        >>> packed.dequantize().tolist()
        [[-1.0, 0.0, 2.0, 0.0]]
        >>> packed.bits_per_weight  # 2, and 16 each of scale and zero point over a row of only 4 weights
        10.0
    """
    check_uniform(bits, group_size)
    check_magnitude(weight, scale_dtype)
    return _rounded(weight, bits, group_size, symmetric, scale_dtype)


def quantize_rows(weight: Tensor, bits: int, *, group_size: int | None = None) -> UniformWeight:
    """Do what :func:`quantize_weight` does, with some rows in float32 at a time: for weights of very many rows.

    Args:
        weight: ``[out, in]``.
        bits: 2, 3, 4 or 8.
        group_size: as there.

    Raises:
        UserError: as there.

    Example:
        >>> import torch
        >>> weight = torch.randn(3, 8)
        >>> torch.equal(quantize_rows(weight, 4).dequantize(), quantize_weight(weight, 4).dequantize())
        True
    """
    check_uniform(bits, group_size)
    check_magnitude(weight, "float16")
    step = max(1, _WEIGHTS_AT_ONCE // weight.shape[1])
    parts = [_rounded(rows, bits, group_size, False, "float16") for rows in weight.split(step)]
    tensors = [part.state_dict() for part in parts]
    joined: dict[str, Any] = {name: torch.cat([part[name] for part in tensors]) for name in tensors[0]}
    return dataclasses.replace(parts[0], out_features=weight.shape[0], **joined)


def _rounded(weight: Tensor, bits: int, group_size: int | None, symmetric: bool, scale_dtype: str) -> UniformWeight:
    weight = weight.float()
    scale, zero_point = uniform_parameters(grouped(weight, group_size), bits, symmetric, scale_dtype=scale_dtype)
    scales, zero_points = scale.squeeze(-1), zero_point.squeeze(-1)
    in_features = weight.shape[1]
    codes = uniform_codes(
        weight, per_column(scales, in_features, group_size), per_column(zero_points, in_features, group_size), bits
    )
    return UniformWeight.pack(
        codes, scales, zero_points, bits, group_size=group_size, symmetric=symmetric, scale_dtype=scale_dtype
    )
