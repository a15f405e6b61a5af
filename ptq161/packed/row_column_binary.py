"""The storage format of Quant-dLLM: sums of sign planes, each with a scale per row and one per column.

A block of columns has terms of order 1, 2 and 3; every column takes part in the terms up to its own order. What is
stored of a term covers the columns that have it, and the blocks that have such columns.
"""

from __future__ import annotations

import dataclasses
from typing import ClassVar, Self

import torch
from torch import Tensor

from ptq161.kernels.packed_rows import Operands
from ptq161.packed.bits import pack_codes, pack_plane, unpack_codes, unpack_plane
from ptq161.packed.weight import PackedWeight, stored_scale

ORDERS = (1, 2, 3)
_ORDER_BITS = 2


@dataclasses.dataclass(frozen=True, eq=False)
class RowColumnBinaryWeight(PackedWeight):
    """``W[o, i] = sum over k of row_scale_k[o, block of i] * column_scale_k[i] * sign_k[o, i]``, k up to i's order.

    With ``n`` columns over all orders (those of order 2 counted twice, of order 3 three times) and ``t`` terms over all
    blocks, both in the order: first terms, second terms, third terms, each from left to right:

    Attributes:
        column_block: columns that share a row's scales; the last block may be shorter.
        order_block: columns that share an order: ``column_block``, or 1.
        orders: ``[ceil(in / order_block * 2 / 8)]`` uint8, the orders less one, in two bits each.
        signs: ``[out, ceil(n / 8)]`` uint8, set bits are +1.
        row_scales: ``[out, t]`` in ``scale_dtype``.
        column_scales: ``[n]`` in ``scale_dtype``.

    Example:
        >>> packed = RowColumnBinaryWeight.pack(
        ...     orders=torch.tensor([1, 2]),
        ...     signs=torch.tensor([[[True, False]], [[True, True]]]),
        ...     row_scales=torch.tensor([[[2.0, 3.0]], [[0.0, 0.5]]]),  # two blocks of one column
        ...     column_scales=torch.tensor([[1.0, 2.0], [0.0, 4.0]]),
        ...     column_block=1,
        ... )
        >>> packed.dequantize().tolist()  # 2, and -3 * 2 + 0.5 * 4
        [[2.0, -4.0]]
        >>> packed.nbytes  # a byte of orders, one of three signs, three row scales and three column scales
        14
    """

    format: ClassVar[str] = "row_column_binary"
    by_row: ClassVar[tuple[str, ...]] = ("signs", "row_scales")

    column_block: int
    order_block: int
    orders: Tensor
    signs: Tensor
    row_scales: Tensor
    column_scales: Tensor

    @classmethod
    def pack(
        cls,
        *,
        orders: Tensor,
        signs: Tensor,
        row_scales: Tensor,
        column_scales: Tensor,
        column_block: int,
        scale_dtype: str = "float16",
    ) -> Self:
        """Store the terms of a whole weight; what lies beyond a column's order is left out.

        Args:
            orders: ``[in]`` integers of ``ORDERS``, the terms of each column.
            signs: ``[terms, out, in]`` bool, True for +1.
            row_scales: ``[terms, out, blocks]``.
            column_scales: ``[terms, in]``.
            column_block: columns that share a row's scales.
            scale_dtype: ``float16`` or ``float32``, for both kinds of scales.

        Raises:
            UserError: a scale is not finite or leaves the range of ``scale_dtype``.
        """
        spread = orders[::column_block].repeat_interleave(column_block)[: orders.numel()]
        order_block = column_block if torch.equal(spread, orders) else 1
        columns, blocks = _columns(orders), _blocks(orders, column_block)
        return cls(
            out_features=signs.shape[1],
            in_features=orders.numel(),
            column_block=column_block,
            order_block=order_block,
            orders=pack_codes(orders[::order_block] - 1, _ORDER_BITS),
            signs=pack_plane(torch.cat([signs[k][:, own] for k, own in enumerate(columns)], dim=1)),
            row_scales=stored_scale(
                torch.cat([row_scales[k][:, own] for k, own in enumerate(blocks)], dim=1), scale_dtype
            ),
            column_scales=stored_scale(
                torch.cat([column_scales[k][own] for k, own in enumerate(columns)]), scale_dtype
            ),
        )

    def column_orders(self) -> Tensor:
        """Return the order of each column: ``[in]`` int64."""
        n = -(-self.in_features // self.order_block)
        orders = unpack_codes(self.orders, n, _ORDER_BITS).long() + 1
        return orders.repeat_interleave(self.order_block)[: self.in_features]

    def values(self) -> Tensor:
        """Return ``[out, in]`` float32."""
        orders = self.column_orders()
        columns = _columns(orders)
        widths = [own.numel() for own in columns]
        planes = unpack_plane(self.signs, sum(widths)).float().mul_(2).sub_(1).split(widths, dim=1)
        column_scales = self.column_scales.float().split(widths)
        terms = [own.numel() for own in _blocks(orders, self.column_block)]
        row_scales = self.row_scales.float().split(terms, dim=1)
        values = torch.zeros(self.out_features, self.in_features, device=planes[0].device)
        for k, own in enumerate(columns):
            _, block = torch.unique_consecutive(own // self.column_block, return_inverse=True)
            term = planes[k] * (row_scales[k].index_select(1, block) * column_scales[k])
            # A column is there once, so that the sum does not depend on the order in which entries are added.
            values = values.index_add(1, own, term)
        return values

    def operands(self) -> Operands | None:
        """Return the weight as compiled operators take it."""
        tensors = (self.orders, self.signs, self.row_scales, self.column_scales)
        settings = (self.out_features, self.in_features, self.column_block, self.order_block)
        return Operands(self.format, tensors, settings, 2.0**self.exponent, "binary_rows")


def _columns(orders: Tensor) -> list[Tensor]:
    """Return for each term the columns that have it."""
    return [(orders >= order).nonzero().flatten() for order in range(1, int(orders.max()) + 1)]


def _blocks(orders: Tensor, column_block: int) -> list[Tensor]:
    """Return for each term the blocks with a column that has it."""
    return [torch.unique_consecutive(own // column_block) for own in _columns(orders)]
