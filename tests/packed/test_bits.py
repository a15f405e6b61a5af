"""Bit packing: property-based round trips, the layout byte by byte, refusals."""

from __future__ import annotations

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch import Tensor

from ptq161.packed.bits import (
    CODE_BITS,
    INDEX_BITS,
    pack_codes,
    pack_indices,
    pack_plane,
    packed_width,
    unpack_codes,
    unpack_indices,
    unpack_plane,
)

BITS = st.sampled_from(CODE_BITS)
DTYPES = st.sampled_from([torch.uint8, torch.int16, torch.int32, torch.int64])


@st.composite
def codes_of(draw: st.DrawFn, bits: int, *, leading: bool = True) -> Tensor:
    shape = draw(st.lists(st.integers(1, 4), max_size=2)) if leading else []
    shape = [*shape, draw(st.integers(0, 40))]
    generator = torch.Generator().manual_seed(draw(st.integers(0, 2**32)))
    codes = torch.randint(0, 2**bits, shape, generator=generator)
    return codes.to(draw(DTYPES))


@given(st.data(), BITS)
def test_round_trip(data: st.DataObject, bits: int) -> None:
    codes = data.draw(codes_of(bits))
    packed = pack_codes(codes, bits)
    assert packed.dtype == torch.uint8
    assert packed.shape == (*codes.shape[:-1], packed_width(codes.shape[-1], bits))
    unpacked = unpack_codes(packed, codes.shape[-1], bits)
    assert unpacked.dtype == torch.uint8
    assert torch.equal(unpacked, codes.to(torch.uint8))


@given(st.data(), BITS)
def test_the_layout_is_a_stream_of_bits_lowest_first(data: st.DataObject, bits: int) -> None:
    codes = data.draw(codes_of(bits, leading=False))
    stream = sum(code << (i * bits) for i, code in enumerate(codes.tolist()))
    expected = stream.to_bytes(packed_width(len(codes), bits), "little")
    assert bytes(pack_codes(codes, bits).tolist()) == expected


@given(st.data(), BITS)
def test_every_byte_string_is_some_row_of_codes(data: st.DataObject, bits: int) -> None:
    """What the format can hold, it gives back: whole bytes unpack and pack to themselves."""
    packed = data.draw(codes_of(8))
    n = packed.shape[-1] * 8 // bits
    if packed_width(n, bits) != packed.shape[-1] or n * bits != 8 * packed.shape[-1]:
        return  # the last bits would be padding
    packed = packed.to(torch.uint8)
    assert torch.equal(pack_codes(unpack_codes(packed, n, bits), bits), packed)


@given(st.data())
def test_planes(data: st.DataObject) -> None:
    plane = data.draw(codes_of(1)).bool()
    packed = pack_plane(plane)
    assert packed.shape[-1] == (plane.shape[-1] + 7) // 8
    unpacked = unpack_plane(packed, plane.shape[-1])
    assert unpacked.dtype == torch.bool
    assert torch.equal(unpacked, plane)


@given(BITS, st.integers(1, 300))
def test_width_is_the_fewest_whole_bytes(bits: int, n: int) -> None:
    assert 8 * (packed_width(n, bits) - 1) < n * bits <= 8 * packed_width(n, bits)


def test_unpacking_makes_a_tensor_of_its_own() -> None:
    codes = torch.tensor([[1, 2, 3]], dtype=torch.uint8)
    packed = pack_codes(codes, 8)
    codes[0, 0] = 9
    assert packed.tolist() == [[1, 2, 3]]
    unpack_codes(packed, 3, 8)[0, 0] = 9
    assert packed.tolist() == [[1, 2, 3]]


def test_strided_codes() -> None:
    codes = torch.arange(32).remainder(8).reshape(4, 8).T
    assert torch.equal(unpack_codes(pack_codes(codes, 3), 4, 3), codes.to(torch.uint8))


@pytest.mark.parametrize("bits", CODE_BITS)
@pytest.mark.parametrize("too_far", [-1, None])
def test_codes_out_of_range_are_refused(bits: int, too_far: int | None) -> None:
    code = 2**bits if too_far is None else too_far
    with pytest.raises(ValueError, match=rf"\[0, {2**bits}\)"):
        pack_codes(torch.tensor([[0, code]]), bits)


@pytest.mark.parametrize("bits", [0, 5, 6, 7, 16])
def test_other_widths_of_a_code_are_refused(bits: int) -> None:
    with pytest.raises(ValueError, match="bits"):
        pack_codes(torch.zeros(1, 8, dtype=torch.uint8), bits)
    with pytest.raises(ValueError, match="bits"):
        unpack_codes(torch.zeros(1, 8, dtype=torch.uint8), 8, bits)


@pytest.mark.parametrize(("n", "bits"), [(9, 1), (7, 4), (17, 3), (1, 8)])
@pytest.mark.parametrize("error", [-1, 1])
def test_a_row_of_the_wrong_width_is_refused(n: int, bits: int, error: int) -> None:
    width = packed_width(n, bits) + error
    with pytest.raises(ValueError, match=rf"{n} codes of {bits} bits take {width - error} bytes a row, not {width}"):
        unpack_codes(torch.zeros(2, width, dtype=torch.uint8), n, bits)


@given(st.data(), st.integers(0, INDEX_BITS))
def test_indices_of_any_width(data: st.DataObject, bits: int) -> None:
    indices = data.draw(codes_of(bits)).long() if bits in CODE_BITS else torch.randint(0, 2**bits, (3, 7))
    packed = pack_indices(indices, bits)
    assert packed.dtype == torch.uint8 and packed.ndim == 1
    assert len(packed) - indices.numel() * bits / 8 < 4  # each of at most four parts is filled up to whole bytes
    assert torch.equal(unpack_indices(packed, indices.numel(), bits), indices.flatten())


def test_indices_that_do_not_fit() -> None:
    with pytest.raises(ValueError, match="packed to 5 bits"):
        pack_indices(torch.tensor([32]), 5)
    with pytest.raises(ValueError, match="0 to 16 bits"):
        pack_indices(torch.tensor([0]), 17)
    with pytest.raises(ValueError, match="take 3 bytes"):
        unpack_indices(torch.zeros(2, dtype=torch.uint8), n=4, bits=5)
