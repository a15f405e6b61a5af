"""The Triton kernels of :mod:`ptq161.kernels.triton_rows`, which says what they compute and on which tensors."""

from __future__ import annotations

import triton
import triton.language as tl

MEAN, ZERO_POINT, NIBBLE, CENTER, LEVEL = map(tl.constexpr, range(5))
"""What is added to scale * code: a mean, with signs as codes; or minus scale times the code of zero, which is stored as
a float, as half a byte, or is the middle of the codes. LEVEL is CENTER with a factor per column and row, rounded first.
"""


@triton.jit
def _units(codes, row_bytes, o, u, inside, BITS: tl.constexpr):
    """Return units u of rows o."""
    if BITS != 3:
        return tl.load(codes + o * row_bytes + u, mask=inside, other=0).to(tl.int32)
    else:
        at, left = codes + o * row_bytes + 3 * u, row_bytes - 3 * u
        first = tl.load(at, mask=inside, other=0).to(tl.int32)
        second = tl.load(at + 1, mask=inside & (left > 1), other=0).to(tl.int32)
        third = tl.load(at + 2, mask=inside & (left > 2), other=0).to(tl.int32)
        return first | (second << 8) | (third << 16)


@triton.jit
def _offsets(offset, center, o, group, groups, inside, KIND: tl.constexpr):
    """Return what kind says: means, or codes of zero."""
    if KIND == NIBBLE:
        packed = tl.load(offset + o // 2, mask=inside, other=0).to(tl.int32)
        return ((packed >> (o % 2 * 4).to(tl.int32)) & 15).to(tl.float32)
    elif KIND == MEAN or KIND == ZERO_POINT:  # noqa: SIM109  # Triton compares one by one
        return tl.load(offset + o * groups + group, mask=inside, other=0).to(tl.float32)
    else:
        return center


@triton.jit
def _terms(plane, o, group, rows, KIND: tl.constexpr):
    """Return a and b of rows o."""
    _, scale, offset, center, step, _, _, groups = plane
    inside = (o < rows) & (group < groups)
    a = tl.load(scale + o * groups + group, mask=inside, other=0).to(tl.float32) * step
    b = _offsets(offset, center, o, group, groups, inside, KIND)
    if KIND == MEAN:  # scale * (2 * code - 1) + mean
        return 2 * a, b - a
    else:
        return a, -a * b


@triton.jit
def _plane(
    x,
    plane,
    start,
    n,
    rows,
    stride,
    BITS: tl.constexpr,
    KIND: tl.constexpr,
    GROUP_UNITS: tl.constexpr,
    ARRANGED: tl.constexpr,
    M: tl.constexpr,
    R: tl.constexpr,
    U: tl.constexpr,
):
    """Return what one plane adds to a tile [M, R] of y: its rows of codes are read from end to end, U units at once."""
    CODES: tl.constexpr = 8 if BITS == 3 else 8 // BITS
    o = (tl.program_id(0) * R + tl.arange(0, R)).to(tl.int64)[None, :, None]
    m = (tl.program_id(1) * M + tl.arange(0, M)).to(tl.int64)[:, None, None]
    codes, _, _, _, _, row_bytes, units, _ = plane
    dots = tl.zeros([M, R, U], tl.float32)  # of codes with x
    totals = tl.zeros([M, 1, U], tl.float32)  # of x
    first = 0
    while first < units:
        u = first + tl.arange(0, U)[None, None, :]
        unit = _units(codes, row_bytes, o, u, (o < rows) & (u < units), BITS)
        dot = tl.zeros([M, R, U], tl.float32)
        total = tl.zeros([M, 1, U], tl.float32)
        for s in tl.static_range(CODES):
            if ARRANGED:
                at, inside = start + s * units + u, u < units
            else:
                at, inside = u * CODES + s, u * CODES + s < stride
            v = tl.load(x + m * stride + at, mask=inside & (m < n), other=0).to(tl.float32)
            code = (unit >> (s * BITS)) & ((1 << BITS) - 1)
            dot += code.to(tl.float32) * v
            total += v
        if GROUP_UNITS:
            a, b = _terms(plane, o, u // GROUP_UNITS, rows, KIND)
            dots += a * dot + b * total
        else:
            dots += dot
            totals += total
        first += U
    if not GROUP_UNITS:
        a, b = _terms(plane, o, o * 0, rows, KIND)
        dots = a * dots + b * totals
    return tl.sum(dots, 2)


@triton.jit
def product_kernel(
    y,
    x,
    bias,
    planes,
    starts,
    n,
    rows,
    stride,
    factor,
    BITS: tl.constexpr,
    KINDS: tl.constexpr,
    GROUP_UNITS: tl.constexpr,
    ARRANGED: tl.constexpr,
    M: tl.constexpr,
    R: tl.constexpr,
    U: tl.constexpr,
):
    """Make a tile [M, R] of y."""
    sums = tl.zeros([M, R], tl.float32)
    for p in tl.static_range(len(BITS)):
        sums += _plane(x, planes[p], starts[p], n, rows, stride, BITS[p], KINDS[p], GROUP_UNITS, ARRANGED, M, R, U)
    o = (tl.program_id(0) * R + tl.arange(0, R)).to(tl.int64)[None, :]
    m = (tl.program_id(1) * M + tl.arange(0, M)).to(tl.int64)[:, None]
    sums *= factor
    if bias is not None:
        sums += tl.load(bias + o, mask=o < rows, other=0).to(tl.float32)
    tl.store(y + m * rows + o, sums.to(y.dtype.element_ty), mask=(m < n) & (o < rows))


@triton.jit
def dense_kernel(
    out,
    columns,
    factors,
    plane,
    rows,
    n,
    whole,
    BITS: tl.constexpr,
    KIND: tl.constexpr,
    GROUP_SIZE: tl.constexpr,
    DIVIDES: tl.constexpr,
    R: tl.constexpr,
    K: tl.constexpr,
):
    """Make a tile of a plane dense, rounded step by step as by the format's ``values()``."""
    CODES: tl.constexpr = 8 if BITS == 3 else 8 // BITS
    codes, scale, offset, center, step, row_bytes, units, groups = plane
    o = (tl.program_id(0) * R + tl.arange(0, R)).to(tl.int64)[:, None]
    k = (tl.program_id(1) * K + tl.arange(0, K))[None, :]
    u, s = k // CODES, k % CODES
    inside = (o < rows) & (u < units)
    unit = _units(codes, row_bytes, o, u, inside, BITS)
    code = ((unit >> (s * BITS)) & ((1 << BITS) - 1)).to(tl.float32)
    group = k // GROUP_SIZE if GROUP_SIZE else o * 0
    a = tl.load(scale + o * groups + group, mask=(o < rows) & (group < groups), other=0).to(tl.float32)
    b = _offsets(offset, center, o, group, groups, (o < rows) & (group < groups), KIND)
    column, f = k, 1.0
    if columns is not None:
        place = s * units + u
        column = tl.load(columns + place, mask=u < units, other=0).to(tl.int32) - 1
        f = tl.load(factors + place, mask=u < units, other=1)
    if KIND == MEAN:
        value = (a * (2 * code - 1) + b) * f
    elif KIND == LEVEL:
        value = (code - b) * step * (a * f)
    elif DIVIDES and columns is not None:
        value = tl.div_rn(a * (code - b), tl.broadcast_to(f, [R, K]))
    else:
        value = a * (code - b) * f
    tl.store(out + o * n + column, (value * whole).to(out.dtype.element_ty), mask=inside & (column >= 0) & (column < n))


@triton.jit
def arrange_kernel(
    v,
    x,
    labels,
    factor,
    n,
    slots,
    n_factors,
    starts,
    units,
    CODES: tl.constexpr,
    LABELS: tl.constexpr,
    LABEL_BITS: tl.constexpr,
    UNSCALED: tl.constexpr,
    DIVIDES: tl.constexpr,
    N: tl.constexpr,
):
    """Put one row of x in the order of the planes, times its factors."""
    m = tl.program_id(0).to(tl.int64)
    j = tl.arange(0, N)
    inside = j < n
    label = tl.zeros([N], tl.int32)
    if labels is not None:
        packed = tl.load(labels + j * LABEL_BITS // 8, mask=inside, other=0).to(tl.int32)
        label = (packed >> (j * LABEL_BITS % 8)) & ((1 << LABEL_BITS) - 1)
    value = tl.load(x + m * n + j, mask=inside, other=0).to(tl.float32)
    if factor is not None:
        scaled = inside & (label != UNSCALED)
        place = tl.cumsum(scaled.to(tl.int32), 0) - 1
        f = tl.load(factor + place, mask=scaled & (place < n_factors), other=1).to(tl.float32)
        value = tl.div_rn(value, f) if DIVIDES else value * f
    for p in tl.static_range(len(CODES)):
        member = inside & (label == LABELS[p])
        k = tl.cumsum(member.to(tl.int32), 0) - 1
        u = k // CODES[p]
        at = starts[p] + k % CODES[p] * units[p] + u
        tl.store(v + m * slots + at, value, mask=member & (u < units[p]))
