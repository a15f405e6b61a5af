from __future__ import annotations

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from ptq161.errors import UserError
from ptq161.packed.row_column_binary import RowColumnBinaryWeight
from ptq161.packed.weight import packed_weight_from


def random_parts(seed: int, orders: Tensor, out_features: int, column_block: int) -> dict[str, Tensor]:
    generator = torch.Generator().manual_seed(seed)
    terms, in_features = int(orders.max()), orders.numel()
    n_blocks = -(-in_features // column_block)
    return {
        "orders": orders,
        "signs": torch.rand(terms, out_features, in_features, generator=generator) < 0.5,
        "row_scales": torch.rand(terms, out_features, n_blocks, generator=generator).half().float(),
        "column_scales": torch.rand(terms, in_features, generator=generator).half().float(),
    }


def expected_values(parts: dict[str, Tensor], column_block: int) -> Tensor:
    block = torch.arange(parts["orders"].numel()) // column_block
    total = torch.zeros(parts["signs"].shape[1:])
    for k, signs in enumerate(parts["signs"]):
        term = parts["row_scales"][k][:, block] * parts["column_scales"][k]
        total += torch.where(signs, term, -term) * (parts["orders"] > k)
    return total


@settings(deadline=None, max_examples=60)
@given(
    shape=st.tuples(st.integers(1, 5), st.integers(1, 40)),
    column_block=st.integers(1, 50),
    by_column=st.booleans(),
    scale_dtype=st.sampled_from(["float16", "float32"]),
    seed=st.integers(0, 2**32),
)
def test_round_trip(shape: tuple[int, int], column_block: int, by_column: bool, scale_dtype: str, seed: int) -> None:
    out_features, in_features = shape
    width = 1 if by_column else column_block
    generator = torch.Generator().manual_seed(seed)
    orders = torch.randint(1, 4, (-(-in_features // width),), generator=generator)
    parts = random_parts(seed, orders.repeat_interleave(width)[:in_features], out_features, column_block)
    packed = RowColumnBinaryWeight.pack(**parts, column_block=column_block, scale_dtype=scale_dtype)
    expected = expected_values(parts, column_block)
    assert torch.equal(packed.dequantize(), expected)
    assert torch.equal(packed.column_orders(), parts["orders"])
    again = packed_weight_from(packed.settings(), packed.state_dict())
    assert torch.equal(again.dequantize(), expected)
    assert torch.equal(packed.scaled(-3).dequantize(), expected / 8)


def test_each_stored_sign_is_one_weight() -> None:
    orders = torch.tensor([1] * 8 + [2] * 8 + [3] * 8)
    packed = RowColumnBinaryWeight.pack(**random_parts(0, orders, 3, 8), column_block=8)
    assert packed.signs.shape == (3, 6)
    before = packed.dequantize()
    for row in range(3):
        for i in range(48):
            flipped = packed.signs.clone()
            flipped[row, i // 8] ^= 1 << (i % 8)
            changed = packed.with_tensors({"signs": flipped}).dequantize() != before
            assert int(changed.sum()) == 1 and changed[row].any()


def test_what_is_stored() -> None:
    """A block of each order: its planes, a scale a row and term, a scale a column and term, two bits of order."""
    orders = torch.tensor([1, 2, 3]).repeat_interleave(64)
    packed = RowColumnBinaryWeight.pack(**random_parts(0, orders, 32, 64), column_block=64)
    assert packed.nbytes == 32 * 6 * 64 // 8 + 2 * 32 * 6 + 2 * 6 * 64 + 1
    by_column = RowColumnBinaryWeight.pack(**random_parts(0, orders.roll(1), 32, 64), column_block=64)
    # The first block has columns of order 3 and 1, the second of 1 and 2, the third of 2 and 3.
    assert by_column.nbytes == 32 * 6 * 64 // 8 + 2 * 32 * 8 + 2 * 6 * 64 + 192 * 2 // 8


def test_a_scale_beyond_its_dtype_is_refused() -> None:
    parts = random_parts(0, torch.ones(8, dtype=torch.long), 2, 8)
    parts["row_scales"] *= 1e6
    with pytest.raises(UserError, match="cannot be stored as float16"):
        RowColumnBinaryWeight.pack(**parts, column_block=8)
