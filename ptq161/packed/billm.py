"""BiLLM's format: two signs for each weight of a salient column, a sign and a group for every other weight."""

from __future__ import annotations

import dataclasses
from typing import ClassVar, NamedTuple, Self

import torch
from torch import Tensor

from ptq161.kernels.packed_rows import Operands
from ptq161.kernels.where import fast_where
from ptq161.packed.bits import pack_plane, unpack_plane
from ptq161.packed.weight import PackedWeight, stored_scale


class BinaryGrid(NamedTuple):
    """Scales and means of one block of columns, or of several, along any trailing dimensions.

    Attributes:
        scales: ``[4, out, ...]``: of the concentrated group, the sparse group, and the salient columns' first and
            second order.
        means: ``[3, out, ...]``: of the concentrated group, the sparse group and the salient columns. Only the sum of
            the means of both orders is needed to dequantize, so only that is stored.

    Example:
        >>> grid = BinaryGrid(scales=torch.ones(4, 2, 3), means=torch.zeros(3, 2, 3))  # 2 rows, 3 blocks of columns
        >>> bits = 16 * (grid.scales.numel() + grid.means.numel())
        >>> bits / (2 * 3 * 128)  # per weight, with 128 columns in a block
        0.875
    """

    scales: Tensor
    means: Tensor


class BinaryPlanes(NamedTuple):
    """What each weight has of its own, as bools.

    Attributes:
        salient: ``[in]``, the salient columns.
        sparse: ``[out, in]``, the group of large weights; read where not salient.
        signs: ``[out, in]``, set for plus.
        second_signs: ``[out, in]``, signs of the residual; read where salient.

    Example:
        >>> planes = BinaryPlanes(
        ...     salient=torch.tensor([True, False, False]),
        ...     sparse=torch.tensor([[False, False, True]]),
        ...     signs=torch.tensor([[True, True, False]]),
        ...     second_signs=torch.tensor([[False, False, False]]),
        ... )
        >>> grid = BinaryGrid(scales=torch.tensor([1.0, 3.0, 4.0, 0.5]).view(4, 1, 1), means=torch.zeros(3, 1, 1))
        >>> binary_values(planes, grid).tolist()  # 4 - 0.5 in the salient column, 1 concentrated, -3 sparse
        [[3.5, 1.0, -3.0]]
    """

    salient: Tensor
    sparse: Tensor
    signs: Tensor
    second_signs: Tensor


@dataclasses.dataclass(frozen=True, eq=False)
class BiLLMWeight(PackedWeight):
    """Residual binarization of salient columns and split binarization of the others, per row and column block.

    Attributes:
        column_block: columns that share a row's scales and means; the last block may be shorter.
        n_salient: number of salient columns.
        salient: ``[ceil(in / 8)]`` uint8.
        signs: ``[out, ceil(in / 8)]`` uint8.
        second_signs: ``[out, ceil(n_salient / 8)]`` uint8, over the salient columns.
        sparse: ``[out, ceil((in - n_salient) / 8)]`` uint8, over the other columns.
        scales: ``[4, out, blocks]`` in ``scale_dtype``, see :class:`BinaryGrid`.
        means: ``[3, out, blocks]`` in ``scale_dtype``.

    Example:
        >>> columns = torch.arange(128)
        >>> plane = torch.zeros(64, 128, dtype=torch.bool)
        >>> planes = BinaryPlanes(salient=columns < 8, sparse=plane, signs=plane, second_signs=plane)
        >>> grid = BinaryGrid(scales=torch.ones(4, 64, 1), means=torch.zeros(3, 64, 1))
        >>> packed = BiLLMWeight.pack(planes, grid, column_block=128)
        >>> packed.dequantize()[0, :3], packed.dequantize()[0, -3:]  # two signs, one sign
        (tensor([-2., -2., -2.]), tensor([-1., -1., -1.]))
        >>> round(packed.bits_per_weight, 2)  # two planes of one bit each, the mask of columns, seven parameters a row
        2.89
    """

    format: ClassVar[str] = "billm"
    offsets: ClassVar[tuple[str, ...]] = ("means",)

    column_block: int
    n_salient: int
    salient: Tensor
    signs: Tensor
    second_signs: Tensor
    sparse: Tensor
    scales: Tensor
    means: Tensor

    @classmethod
    def pack(cls, planes: BinaryPlanes, grid: BinaryGrid, column_block: int, *, scale_dtype: str = "float16") -> Self:
        """Store the planes of a whole weight and the grids ``[4 or 3, out, blocks]`` of its column blocks.

        Raises:
            UserError: a scale or mean leaves the range of ``scale_dtype``.
        """
        out_features, in_features = planes.signs.shape
        return cls(
            out_features=out_features,
            in_features=in_features,
            column_block=column_block,
            n_salient=int(planes.salient.sum()),
            salient=pack_plane(planes.salient),
            signs=pack_plane(planes.signs),
            second_signs=pack_plane(planes.second_signs[:, planes.salient]),
            sparse=pack_plane(planes.sparse[:, ~planes.salient]),
            scales=stored_scale(grid.scales, scale_dtype),
            means=stored_scale(grid.means, scale_dtype),
        )

    def values(self) -> Tensor:
        """Return the weight: ``[out, in]`` float32."""
        salient = unpack_plane(self.salient, self.in_features)
        second_signs = salient.new_zeros(self.out_features, self.in_features)
        second_signs[:, salient] = unpack_plane(self.second_signs, self.n_salient)
        sparse = torch.zeros_like(second_signs)
        sparse[:, ~salient] = unpack_plane(self.sparse, self.in_features - self.n_salient)
        signs = unpack_plane(self.signs, self.in_features)
        grid = BinaryGrid(self._per_column(self.scales), self._per_column(self.means))
        return binary_values(BinaryPlanes(salient, sparse, signs, second_signs), grid)

    def operands(self) -> Operands | None:
        """Return the weight as compiled operators take it."""
        tensors = (self.salient, self.signs, self.second_signs, self.sparse, self.scales, self.means)
        settings = (self.out_features, self.in_features, self.column_block, self.n_salient)
        return Operands(self.format, tensors, settings, 2.0**self.exponent, "binary_rows")

    def _per_column(self, parameter: Tensor) -> Tensor:
        return parameter.float().repeat_interleave(self.column_block, dim=-1)[..., : self.in_features]


def binary_values(planes: BinaryPlanes, grid: BinaryGrid) -> Tensor:
    """Return what planes of ``[out, columns]`` stand for, with grids ``[4 or 3, out, columns or 1]``: float32.

    Example:
        >>> plane = torch.ones(1, 2, dtype=torch.bool)
        >>> planes = BinaryPlanes(salient=torch.tensor([True, False]), sparse=~plane, signs=plane, second_signs=plane)
        >>> grid = BinaryGrid(scales=torch.tensor([1.0, 3.0, 4.0, 0.5]).view(4, 1, 1), means=torch.ones(3, 1, 1))
        >>> binary_values(planes, grid).tolist()  # 4 + 0.5 + 1 and 1 + 1
        [[5.5, 2.0]]
    """
    concentrated, sparse, first, second = grid.scales
    signs, second_signs = (plane.float().mul_(2).sub_(1) for plane in (planes.signs, planes.second_signs))
    # Other columns: one sign around the mean of their group.
    once = signs * fast_where(planes.sparse, sparse, concentrated)
    once = once + fast_where(planes.sparse, grid.means[1], grid.means[0])
    # Salient columns: two signs of two scales around one mean.
    twice = signs * first + second_signs * second + grid.means[2]
    return fast_where(planes.salient, twice, once)
