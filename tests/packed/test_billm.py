from __future__ import annotations

import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from ptq161.packed.billm import BiLLMWeight, BinaryGrid, BinaryPlanes
from ptq161.packed.weight import packed_weight_from


def random_parts(seed: int, shape: tuple[int, int], column_block: int, share: float) -> tuple[BinaryPlanes, BinaryGrid]:
    generator = torch.Generator().manual_seed(seed)
    n_blocks = -(-shape[1] // column_block)
    planes = [torch.rand(shape, generator=generator) < 0.5 for _ in range(3)]
    salient = torch.rand(shape[1], generator=generator) < share
    scales = torch.rand(4, shape[0], n_blocks, generator=generator).half().float()
    means = torch.randn(3, shape[0], n_blocks, generator=generator).half().float()
    return BinaryPlanes(salient, *planes), BinaryGrid(scales, means)


@settings(deadline=None, max_examples=60)
@given(
    shape=st.tuples(st.integers(1, 5), st.integers(1, 40)),
    column_block=st.integers(1, 50),
    share=st.sampled_from([0.0, 0.2, 1.0]),
    scale_dtype=st.sampled_from(["float16", "float32"]),
    seed=st.integers(0, 2**32),
)
def test_round_trip(shape: tuple[int, int], column_block: int, share: float, scale_dtype: str, seed: int) -> None:
    planes, grid = random_parts(seed, shape, column_block, share)
    packed = BiLLMWeight.pack(planes, grid, column_block, scale_dtype=scale_dtype)
    block = torch.arange(shape[1]) // column_block
    scales, means = grid.scales[:, :, block], grid.means[:, :, block]
    sign, second = (torch.where(plane, 1.0, -1.0) for plane in (planes.signs, planes.second_signs))
    group = planes.sparse.long().unsqueeze(0)
    once = sign * scales[:2].gather(0, group)[0] + means[:2].gather(0, group)[0]
    twice = sign * scales[2] + second * scales[3] + means[2]
    expected = torch.where(planes.salient, twice, once)
    assert torch.equal(packed.dequantize(), expected)
    again = packed_weight_from(packed.settings(), packed.state_dict())
    assert torch.equal(again.dequantize(), expected)


def test_each_stored_sign_is_one_weight() -> None:
    planes, grid = random_parts(0, (3, 16), 8, 0.0)
    planes.salient[:8] = True
    packed = BiLLMWeight.pack(planes, grid, 8)
    before = packed.dequantize()
    for name in ("signs", "second_signs", "sparse"):
        plane = packed.state_dict()[name]
        for row in range(3):
            for i in range(8 * plane.shape[1]):
                flipped = plane.clone()
                flipped[row, i // 8] ^= 1 << (i % 8)
                assert int((packed.with_tensors({name: flipped}).dequantize() != before).sum()) == 1


def test_two_bits_a_weight_and_seven_numbers_a_row_and_block() -> None:
    planes, grid = random_parts(0, (32, 256), 128, 0.0)
    planes.salient[:16] = True
    packed = BiLLMWeight.pack(planes, grid, 128)
    assert packed.nbytes == 32 * 256 * 2 // 8 + 256 // 8 + 7 * 2 * 32 * 2
