"""A packed weight with a low-rank update beside it: what finetuning adapters on a packed base leaves."""

from __future__ import annotations

import dataclasses
from collections.abc import Collection, Mapping
from typing import Any, ClassVar, Self

from torch import Tensor

from ptq161.packed.weight import PackedWeight, packed_weight_from, stored_scale

_BASE = "base_"
"""Begins the names of the base's tensors."""


@dataclasses.dataclass(frozen=True, eq=False)
class AdaptedWeight(PackedWeight):
    """The sum of a packed weight of any format and ``up @ down``.

    Attributes:
        base: the packed weight.
        down: ``[rank, in]`` in ``scale_dtype``.
        up: ``[out, rank]`` in ``scale_dtype``, any factor of the update included.

    Example:
        >>> import torch
        >>> from ptq161.packed.uniform import UniformWeight
        >>> base = UniformWeight.pack(torch.tensor([[0, 1, 2]]), torch.ones(1, 1), torch.zeros(1, 1), bits=2)
        >>> packed = AdaptedWeight.pack(base, torch.ones(1, 3), torch.tensor([[0.5]]))
        >>> packed.dequantize().tolist(), sorted(packed.state_dict())
        ([[0.5, 1.5, 2.5]], ['base_codes', 'base_scales', 'base_zero_points', 'down', 'up'])
        >>> packed.nbytes - base.nbytes  # 4 numbers in float16
        8
    """

    format: ClassVar[str] = "adapted"

    base: PackedWeight
    down: Tensor
    up: Tensor

    @classmethod
    def pack(cls, base: PackedWeight, down: Tensor, up: Tensor, *, scale_dtype: str = "float16") -> Self:
        """Store an update ``[rank, in]``, ``[out, rank]`` of a packed weight.

        Raises:
            UserError: a number is not finite or leaves the range of ``scale_dtype``.
        """
        down, up = stored_scale(down, scale_dtype), stored_scale(up, scale_dtype)
        return cls(base.out_features, base.in_features, base, down, up, lender=base.lender)

    def values(self) -> Tensor:
        """Return the base's weight and the update: ``[out, in]`` float32."""
        update: Tensor = self.up.float() @ self.down.float()
        return self.base.dequantize() + update

    def tensors(self) -> dict[str, Tensor]:
        """Return all tensors, those of the base under names that begin with ``base_``."""
        return super().tensors() | self.borrowed(self.base.tensors())

    def lent(self) -> dict[str, Tensor]:
        """Return what the base lends."""
        return self.base.lent()

    @classmethod
    def borrowed(cls, lent: Mapping[str, Tensor]) -> dict[str, Tensor]:
        """Return tensors of the base by the names that they have here."""
        return {f"{_BASE}{name}": tensor for name, tensor in lent.items()}

    def settings(self) -> dict[str, Any]:
        """Return everything else, the base's settings as a mapping of their own."""
        return super().settings() | {"base": self.base.settings()}

    @classmethod
    def from_state_dict(cls, settings: Mapping[str, Any], tensors: Mapping[str, Tensor]) -> Self:
        """Rebuild base and update from :meth:`settings` and :meth:`state_dict`.

        Raises:
            UserError: the base is of an unknown format, or lacks a tensor.
        """
        mine, bases = _split(tensors)
        return super().from_state_dict({**settings, "base": packed_weight_from(settings["base"], bases)}, mine)

    def with_tensors(self, tensors: Mapping[str, Tensor]) -> Self:
        """Return the same weight over other tensors of the same names."""
        mine, bases = _split(tensors)
        return dataclasses.replace(super().with_tensors(mine), base=self.base.with_tensors(bases))

    @classmethod
    def own_fields(cls, names: Collection[str]) -> set[str]:
        """Return the names that are not those of the base's tensors."""
        return {name for name in names if not name.startswith(_BASE)}


def _split(tensors: Mapping[str, Tensor]) -> tuple[dict[str, Tensor], dict[str, Tensor]]:
    """Return the update's tensors and the base's, each under its own names."""
    mine = {name: tensor for name, tensor in tensors.items() if not name.startswith(_BASE)}
    return mine, {name.removeprefix(_BASE): tensor for name, tensor in tensors.items() if name not in mine}
