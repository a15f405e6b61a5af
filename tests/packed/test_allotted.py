"""The format of allotted channel bits."""

from __future__ import annotations

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from ptq161.errors import UserError
from ptq161.packed.allotted import TIERS, AllottedWeight, Grid, tier_centers, tier_steps
from ptq161.packed.weight import packed_weight_from


def drawn(out: int, bits: torch.Tensor, seed: int) -> tuple[torch.Tensor, Grid]:
    """Random codes of the channels' bits, and a random grid."""
    generator = torch.Generator().manual_seed(seed)
    n = len(bits)
    codes = (torch.rand(out, n, generator=generator) * 2**bits).long()
    row, column, scale = (torch.rand(shape, generator=generator) + 0.1 for shape in ((out, 1), (n,), (out, 1)))
    return codes, Grid(row, column, scale, torch.randint(0, 16, (out, 1), generator=generator).float())


@settings(deadline=None, max_examples=60)
@given(
    tiers=st.sampled_from([[1, 2, 4], [1, 4], [1, 2, 3, 4], [2], [1], [4], [3, 4]]),
    out=st.integers(1, 9),
    n=st.integers(1, 40),
    scale_dtype=st.sampled_from(["float16", "float32"]),
    seed=st.integers(0, 2**32),
)
def test_pack_then_dequantize_is_exact(tiers: list[int], out: int, n: int, scale_dtype: str, seed: int) -> None:
    choice = torch.randint(len(tiers), (n,), generator=torch.Generator().manual_seed(seed))
    bits = torch.tensor(tiers)[choice]
    codes, grid = drawn(out, bits, seed)
    packed = AllottedWeight.pack(codes, bits, grid, tiers=tiers, scale_dtype=scale_dtype)
    stored = grid.stored(scale_dtype)
    scaled = (codes - tier_centers(bits)) * tier_steps(bits) * (stored.row * stored.column)
    expected = torch.where(bits == 4, (codes - stored.zero_point) * stored.scale, scaled)
    assert torch.allclose(packed.dequantize(), expected, rtol=1e-6, atol=1e-7)
    assert torch.equal(packed.channel_bits(), bits)
    again = packed_weight_from(packed.settings(), packed.state_dict())
    assert torch.equal(again.dequantize(), packed.dequantize()) and again.nbytes == packed.nbytes


def test_everything_that_is_stored_is_counted() -> None:
    bits = torch.tensor([1] * 40 + [2] * 20 + [4] * 4)
    codes, grid = drawn(16, bits, 0)
    packed = AllottedWeight.pack(codes, bits, grid, tiers=[1, 2, 4])
    labels, factors, ranged = 64 * 2 / 8, 16 * 2 + 60 * 2, 16 * 2 + 8
    assert packed.nbytes == labels + 16 * (5 + 5 + 2) + factors + ranged
    assert packed.code_bits() == (40 + 40 + 16) / 64
    # Nothing is stored for what is not there.
    one = AllottedWeight.pack(codes[:, :40], bits[:40], Grid(grid.row, grid.column[:40], *grid[2:]), tiers=[1])
    assert set(one.state_dict()) == {"codes_1", "row", "column"}
    four = AllottedWeight.pack(codes[:, 60:], bits[60:], Grid(grid.row, grid.column[60:], *grid[2:]), tiers=[4])
    assert set(four.state_dict()) == {"codes_4", "ranged_scale", "zero_point"}


def test_a_bit_flipped_changes_the_weight() -> None:
    bits = torch.tensor([1, 2, 3, 4] * 4)
    codes, grid = drawn(8, bits, 0)
    packed = AllottedWeight.pack(codes, bits, grid, tiers=list(TIERS))
    for name, tensor in packed.state_dict().items():
        changed = tensor.clone()
        changed.view(torch.uint8)[(0,) * tensor.dim()] ^= 1
        if name == "labels":
            continue  # another label has other codes behind it
        assert not torch.equal(packed.with_tensors({name: changed}).dequantize(), packed.dequantize()), name


@pytest.mark.parametrize("tiers", [[], [0, 1], [5], [2, 1], [1, 1], [1.5]])
def test_tiers_out_of_range(tiers: list[int]) -> None:
    codes, grid = drawn(2, torch.tensor([1, 1]), 0)
    with pytest.raises(UserError, match=r"^method\.tiers=.*: use one or more of 1, 2, 3, 4 in rising order\.$"):
        AllottedWeight.pack(codes, torch.tensor([1, 1]), grid, tiers=tiers)
