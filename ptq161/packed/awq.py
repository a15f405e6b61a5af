"""Uniform codes of a weight whose input channels were scaled before rounding: the format of AWQ.

The released code of AWQ folds the inverse channel scales into the layer before the linear. Here they stay with the
codes that they belong to, so they are stored, counted, and any linear can have them.
"""

from __future__ import annotations

import dataclasses
from typing import ClassVar, Self

from torch import Tensor

from ptq161.packed.uniform import UniformWeight
from ptq161.packed.weight import stored_scale


@dataclasses.dataclass(frozen=True, eq=False)
class AWQWeight(UniformWeight):
    """A uniform weight over scaled input channels.

    Attributes:
        input_scales: ``[in]`` in ``scale_dtype``; column ``j`` was multiplied by ``input_scales[j]`` before rounding.

    Example:
        >>> import torch
        >>> scales = torch.tensor([1.0, 4.0])
        >>> scaled = UniformWeight.pack(torch.tensor([[1, 2]]), torch.ones(1, 1), torch.zeros(1, 1), bits=2)
        >>> AWQWeight.from_uniform(scaled, scales).dequantize().tolist()
        [[1.0, 0.5]]
    """

    format: ClassVar[str] = "awq"

    input_scales: Tensor = dataclasses.field(kw_only=True)

    @classmethod
    def from_uniform(cls, scaled: UniformWeight, input_scales: Tensor, scale_dtype: str = "float16") -> Self:
        """Join the packed form of the scaled weight and its channel scales.

        Args:
            scaled: the packed ``weight * input_scales``.
            input_scales: ``[in]``, positive.
            scale_dtype: ``float16`` or ``float32``.

        Raises:
            UserError: a channel scale leaves the range of ``scale_dtype``.
        """
        fields = {f.name: getattr(scaled, f.name) for f in dataclasses.fields(scaled)}
        return cls(**fields, input_scales=stored_scale(input_scales, scale_dtype))

    def values(self) -> Tensor:
        """Return ``scale * (code - zero_point) / input_scale``: ``[out, in]`` float32."""
        return super().values() / self.input_scales.float()

    def _input_scales(self) -> Tensor | None:
        return self.input_scales
