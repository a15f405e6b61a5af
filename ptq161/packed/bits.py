"""Codes of 1, 2, 3, 4 and 8 bits in bytes, and indices of up to 16: the innermost layer of every packed weight.

A row of ``n`` codes of ``b`` bits takes ``ceil(n * b / 8)`` bytes; each row starts on a byte. Bits are
written in the order of the codes, the least significant bit of a code and of a byte first. Indices of other widths are
cut into parts of these widths.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

CODE_BITS = (1, 2, 3, 4, 8)
INDEX_BITS = 16
"""Bits of the widest index."""


def packed_width(n: int, bits: int) -> int:
    """Bytes that a row of ``n`` codes of ``bits`` bits takes.

    Example:
        >>> packed_width(10, bits=3)  # 30 bits
        4
    """
    return (n * bits + 7) // 8


def pack_codes(codes: Tensor, bits: int) -> Tensor:
    """Pack integer codes, each below ``2**bits``, into bytes.

    Args:
        codes: ``[..., n]``, bool or any integer dtype.
        bits: one of ``CODE_BITS``.

    Returns:
        ``[..., ceil(n * bits / 8)]`` uint8.

    Raises:
        ValueError: a code does not fit in ``bits`` bits, or ``bits`` is not supported.

    Example:
        >>> pack_codes(torch.tensor([[1, 0, 3, 2, 1]]), bits=2).tolist()  # 0b10_11_00_01 and 0b01
        [[177, 1]]
    """
    _check_bits(bits)
    if codes.numel() and (int(codes.min()) < 0 or int(codes.max()) >= 2**bits):
        raise ValueError(f"codes must lie in [0, {2**bits}) to be packed to {bits} bits")
    codes = codes.to(torch.uint8)
    if bits == 8:
        return codes.clone()
    # A row as one stream of bits, filled up to whole bytes, eight of which are weighed into one.
    n = codes.shape[-1]
    shifts = torch.arange(bits, dtype=torch.uint8, device=codes.device)
    planes: Tensor = (codes.unsqueeze(-1) >> shifts) & 1
    stream = planes.flatten(-2)
    stream = torch.nn.functional.pad(stream, (0, packed_width(n, bits) * 8 - n * bits))
    weights = torch.tensor([1, 2, 4, 8, 16, 32, 64, 128], dtype=torch.uint8, device=codes.device)
    packed: Tensor = (stream.unflatten(-1, (-1, 8)) * weights).sum(-1, dtype=torch.uint8)
    return packed


def unpack_codes(packed: Tensor, n: int, bits: int) -> Tensor:
    """Undo :func:`pack_codes`.

    Args:
        packed: ``[..., ceil(n * bits / 8)]`` uint8.
        n: codes per row.
        bits: one of ``CODE_BITS``.

    Returns:
        ``[..., n]`` uint8.

    Raises:
        ValueError: the row's width is not that of ``n`` codes, or ``bits`` is not supported.

    Example:
        >>> unpack_codes(torch.tensor([[177, 1]], dtype=torch.uint8), n=5, bits=2).tolist()
        [[1, 0, 3, 2, 1]]
    """
    _check_bits(bits)
    if packed.shape[-1] != packed_width(n, bits):
        raise ValueError(f"{n} codes of {bits} bits take {packed_width(n, bits)} bytes a row, not {packed.shape[-1]}")
    if bits == 8:
        return packed.clone()
    if bits in (1, 2, 4):  # no code crosses a byte
        shifts = torch.arange(0, 8, bits, dtype=torch.uint8, device=packed.device)
        fields: Tensor = (packed.unsqueeze(-1) >> shifts) & (2**bits - 1)
        return fields.flatten(-2)[..., :n].contiguous()
    # Codes of 3 bits cross bytes: through the stream of bits.
    shifts = torch.arange(8, dtype=torch.uint8, device=packed.device)
    stream: Tensor = ((packed.unsqueeze(-1) >> shifts) & 1).flatten(-2)[..., : n * bits]
    places = 2 ** torch.arange(bits, dtype=torch.uint8, device=packed.device)
    codes: Tensor = (stream.unflatten(-1, (n, bits)) * places).sum(-1, dtype=torch.uint8)
    return codes


def pack_plane(plane: Tensor) -> Tensor:
    """Pack a bool plane ``[..., n]`` eight to a byte: ``[..., ceil(n / 8)]`` uint8.

    Example:
        >>> pack_plane(torch.tensor([[True, False, True]])).tolist()  # 0b101
        [[5]]
    """
    return pack_codes(plane, 1)


def unpack_plane(packed: Tensor, n: int) -> Tensor:
    """Undo :func:`pack_plane`: ``[..., n]`` bool.

    Example:
        >>> unpack_plane(torch.tensor([[5]], dtype=torch.uint8), n=3).tolist()
        [[True, False, True]]
    """
    return unpack_codes(packed, n, 1).bool()


def index_bits(count: int) -> int:
    """Return the bits of an index into ``count`` entries: none where there is nothing to choose.

    Example:
        >>> index_bits(1), index_bits(24), index_bits(32)
        (0, 5, 5)
    """
    return (count - 1).bit_length()


def pack_indices(indices: Tensor, bits: int) -> Tensor:
    """Pack indices of any width in exactly ``bits`` bits each: parts of 8, 4, 2 and 1 bits, the lowest first.

    Args:
        indices: any shape and integer dtype, each below ``2**bits``.
        bits: from 0 to ``INDEX_BITS``.

    Returns:
        uint8, one row of bytes for all indices: each part is filled up to whole bytes.

    Raises:
        ValueError: an index does not fit in ``bits`` bits, or ``bits`` is not supported.

    Example:
        >>> pack_indices(torch.tensor([[5, 31], [16, 0]]), bits=5).tolist()  # low halves 5, 15, 0, 0; high bits 0b0110
        [245, 0, 6]
    """
    widths = _index_widths(bits)
    flat = indices.flatten().to(torch.int64)
    if flat.numel() and (int(flat.min()) < 0 or int(flat.max()) >= 2**bits):
        raise ValueError(f"indices must lie in [0, {2**bits}) to be packed to {bits} bits")
    parts = [pack_codes((flat >> shift) & (2**width - 1), width) for shift, width in widths]
    return torch.cat(parts) if parts else torch.zeros(0, dtype=torch.uint8, device=indices.device)


def unpack_indices(packed: Tensor, n: int, bits: int) -> Tensor:
    """Undo :func:`pack_indices`.

    Args:
        packed: uint8, one row.
        n: number of indices.
        bits: from 0 to ``INDEX_BITS``.

    Returns:
        ``[n]`` int64.

    Raises:
        ValueError: the bytes are not those of ``n`` indices, or ``bits`` is not supported.

    Example:
        >>> unpack_indices(torch.tensor([245, 0, 6], dtype=torch.uint8), n=4, bits=5).tolist()
        [5, 31, 16, 0]
    """
    widths = _index_widths(bits)
    sizes = [packed_width(n, width) for _, width in widths]
    if packed.shape != (sum(sizes),):
        raise ValueError(f"{n} indices of {bits} bits take {sum(sizes)} bytes, not {list(packed.shape)}")
    indices = torch.zeros(n, dtype=torch.int64, device=packed.device)
    for part, (shift, width) in zip(packed.split(sizes), widths, strict=True):
        indices |= unpack_codes(part, n, width).long() << shift
    return indices


def merge_columns(parts: Sequence[tuple[Tensor, Tensor]]) -> Tensor:
    """Return the columns of several tensors in one: ``[out, in]`` float32.

    Args:
        parts: pairs of ``[out, n]``, of any dtype, and the ``[in]`` bool mask of the columns that it holds; every
            column belongs to one.

    Example:
        >>> odd = torch.tensor([False, True, False])
        >>> merge_columns([(torch.tensor([[1, 2]]), ~odd), (torch.tensor([[9]]), odd)]).tolist()
        [[1.0, 9.0, 2.0]]
    """
    # Many times as fast as assigning to the columns under each mask, with gradients or without.
    order = torch.cat([columns.nonzero().flatten() for _, columns in parts])
    return torch.cat([part.float() for part, _ in parts], dim=1).index_select(1, order.argsort())


def _index_widths(bits: int) -> list[tuple[int, int]]:
    """Return shift and width of each part of an index, the lowest first."""
    if not 0 <= bits <= INDEX_BITS:
        raise ValueError(f"indices have 0 to {INDEX_BITS} bits, not {bits}")
    widths, shift = [], 0
    while shift < bits:
        width = next(w for w in (8, 4, 2, 1) if w <= bits - shift)
        widths.append((shift, width))
        shift += width
    return widths


def _check_bits(bits: int) -> None:
    if bits not in CODE_BITS:
        raise ValueError(f"codes have {CODE_BITS} bits, not {bits}")
