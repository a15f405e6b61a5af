"""Products of a few rows with a packed weight on a GPU, from its bytes, and the weight's dense form, in Triton.

The same operators as those of ``packed_rows.cpp``, in float32, bfloat16 and float16; sums are in float32. A weight is
some planes of codes of 1 to 4 bits, each the columns of one label:

    W[o, j] = (a[o] * code[o, j] + b[o]) * factor[j]

A product has up to two kernels. The first puts the columns of x in the order in which planes hold their codes, times
their factors; the second reads each byte once for all rows of x. Labels and factors that do not fit the planes give
wrong numbers, but no access beside the tensors.

Imported on first use of a GPU, by :mod:`ptq161.kernels.packed_rows`: Triton comes with torch's CUDA builds alone.
"""

from __future__ import annotations

import itertools
from typing import Any, NamedTuple

import torch
import triton
from torch import Tensor

from ptq161.kernels import triton_kernels as kernels

_TILES = {1: (4, 256), 2: (4, 256), 4: (4, 128), 8: (2, 128), 16: (1, 128)}
"""Rows and units of codes that one program takes at once, by its rows of x: what registers hold."""
_DENSE_TILE = (8, 256)
"""Rows and codes that one program makes dense."""


class Plane(NamedTuple):
    """Some columns of a weight.

    Attributes:
        codes: ``[rows, row_bytes]`` uint8. A unit is a byte, or 3 of them for 3-bit codes.
        bits: of a code.
        scale: ``[rows, groups]``.
        kind: MEAN to LEVEL.
        offset: mean or zero point, if the kind has one.
        center: of CENTER and LEVEL.
        step: of LEVEL, times scale.
        group_size: columns with one scale.
    """

    codes: Tensor
    bits: int
    scale: Tensor
    kind: int
    offset: Tensor | None = None
    center: float = 0.0
    step: float = 1.0
    group_size: int = 0

    @property
    def codes_of_unit(self) -> int:
        """Codes of a unit."""
        return 8 if self.bits == 3 else 8 // self.bits

    @property
    def units(self) -> int:
        """Units of a row."""
        return -(-self.codes.shape[1] // (3 if self.bits == 3 else 1))

    @property
    def slots(self) -> int:
        """Codes of a row, those that only fill its last unit among them."""
        return self.units * self.codes_of_unit


class Weight(NamedTuple):
    """A weight of planes.

    Attributes:
        columns: of the weight.
        planes: one or more.
        labels: ``[ceil(columns * label_bits / 8)]`` uint8, which plane a column belongs to; None where there is one.
        label_of: the label of each plane.
        factor: of those columns whose label is not ``unscaled``; None for no factor.
        unscaled: a label.
        divides: whether columns are divided by their factors.
    """

    columns: int
    planes: list[Plane]
    labels: Tensor | None = None
    label_of: tuple[int, ...] = (0,)
    label_bits: int = 1
    factor: Tensor | None = None
    unscaled: int = -1
    divides: bool = False

    @property
    def rows(self) -> int:
        """Rows of the weight."""
        return self.planes[0].codes.shape[0]

    @property
    def starts(self) -> tuple[int, ...]:
        """Slots in front of each plane."""
        return tuple(itertools.accumulate((plane.slots for plane in self.planes[:-1]), initial=0))

    @property
    def in_order(self) -> bool:
        """Whether the only plane holds the columns as they are."""
        return self.labels is None and self.factor is None


def structured_binary(
    mask: Tensor,
    sign: Tensor,
    scale: Tensor,
    mean: Tensor,
    column_angle: Tensor,
    codes: Tensor,
    salient_scale: Tensor,
    salient_zero_point: Tensor,
    in_features: int,
    salient_bits: int,
) -> Weight:
    """Return the two planes of :class:`ptq161.packed.structured_binary.StructuredBinaryWeight`."""
    salient = in_features - column_angle.numel()
    _check(mask, _width(in_features, 1))
    _check(sign, sign.shape[0], _width(column_angle.numel(), 1))
    planes, label_of = [Plane(sign, 1, scale, kernels.MEAN.value, mean)], [0]
    if salient:
        _check(codes, sign.shape[0], _width(salient, salient_bits))
        planes.append(Plane(codes, salient_bits, salient_scale, kernels.ZERO_POINT.value, salient_zero_point))
        label_of.append(1)
    return Weight(in_features, planes, mask, tuple(label_of), 1, column_angle, unscaled=1)


def uniform(
    codes: Tensor,
    scales: Tensor,
    zero_points: Tensor | None,
    input_scales: Tensor | None,
    in_features: int,
    bits: int,
    group_size: int,
) -> Weight:
    """Return the one plane of :class:`ptq161.packed.uniform.UniformWeight`."""
    _check(codes, codes.shape[0], _width(in_features, bits))
    _check(scales, codes.shape[0], -(-in_features // group_size))
    kind = kernels.CENTER if zero_points is None else kernels.ZERO_POINT
    size = group_size if scales.shape[1] > 1 else 0
    plane = Plane(codes, bits, scales, kind.value, zero_points, center=float(2 ** (bits - 1)), group_size=size)
    return Weight(in_features, [plane], factor=input_scales, divides=True)


def allotted(
    labels: Tensor | None,
    codes: list[Tensor],
    row: Tensor | None,
    column: Tensor | None,
    ranged_scale: Tensor | None,
    zero_point: Tensor | None,
    tiers: list[int],
    steps: list[float],
    in_features: int,
) -> Weight:
    """Return a plane for each tier of :class:`ptq161.packed.allotted.AllottedWeight` that has channels."""
    planes, label_of = [], []
    rows = codes[0].shape[0]
    for label, (bits, part) in enumerate(zip(tiers, codes, strict=True)):
        if not part.numel():
            continue
        _check(part, rows, part.shape[1])
        if bits == 4:
            assert ranged_scale is not None and zero_point is not None, "codes of 4 bits have a grid"
            _check(zero_point, _width(rows, 4))
            planes.append(Plane(part, bits, ranged_scale, kernels.NIBBLE.value, zero_point))
        else:
            assert row is not None and column is not None, "codes of 1 to 3 bits have factors"
            center = (2**bits - 1) / 2
            planes.append(Plane(part, bits, row, kernels.LEVEL.value, center=center, step=steps[bits - 1]))
        label_of.append(label)
    label_bits = 1 if len(tiers) <= 2 else 2
    if labels is not None:
        _check(labels, _width(in_features, label_bits))
    unscaled = tiers.index(4) if 4 in tiers else -1
    return Weight(in_features, planes, labels, tuple(label_of), label_bits, column, unscaled)


def product(weight: Weight, x: Tensor, bias: Tensor | None, factor: float) -> Tensor:
    """Return ``factor * x @ W.T + bias``: ``[..., rows]`` in the dtype of ``x``, ``[..., columns]``."""
    _check(x, *x.shape[:-1], weight.columns)
    y = x.new_empty((*x.shape[:-1], weight.rows))
    if not y.numel():
        return y
    x, n = x.view(-1, weight.columns), y.numel() // weight.rows
    if bias is not None:
        _check(bias, weight.rows)
    with torch.cuda.device_of(x):
        vectors = x if weight.in_order else _arranged(x, weight)
        block = min(max(_TILES), triton.next_power_of_2(n))
        tile, units = _TILES[block]
        kernels.product_kernel[(triton.cdiv(weight.rows, tile), triton.cdiv(n, block))](
            y,
            vectors,
            bias,
            _described(weight.planes),
            weight.starts,
            n,
            weight.rows,
            vectors.shape[1],
            factor,
            BITS=tuple(plane.bits for plane in weight.planes),
            KINDS=tuple(plane.kind for plane in weight.planes),
            GROUP_UNITS=_group_units(weight),
            ARRANGED=not weight.in_order,
            M=block,
            R=tile,
            U=units,
        )
    return y


def dense(weight: Weight, dtype: torch.dtype, factor: float) -> Tensor:
    """Return ``factor * W``: ``[rows, columns]`` in ``dtype``, with the bits that torch gives."""
    out = torch.empty(weight.rows, weight.columns, dtype=dtype, device=weight.planes[0].codes.device)
    if not out.numel():
        return out
    with torch.cuda.device_of(out):
        columns = factors = None
        if not weight.in_order:
            numbers = torch.arange(1.0, weight.columns + 1, device=out.device).unsqueeze(0)
            columns = _arranged(numbers, weight, scaled=False)
            factors = _arranged(torch.ones_like(numbers), weight, inverse=False)
        for plane, start, described in zip(weight.planes, weight.starts, _described(weight.planes), strict=True):
            grid = triton.cdiv(weight.rows, _DENSE_TILE[0]), triton.cdiv(plane.slots, _DENSE_TILE[1])
            kernels.dense_kernel[grid](
                out,
                None if columns is None else columns[0, start:],
                None if factors is None else factors[0, start:],
                described,
                weight.rows,
                weight.columns,
                factor,
                BITS=plane.bits,
                KIND=plane.kind,
                GROUP_SIZE=plane.group_size,
                DIVIDES=weight.divides,
                R=_DENSE_TILE[0],
                K=_DENSE_TILE[1],
                enable_fp_fusion=False,  # products and sums are rounded one by one, as torch's are
            )
    return out


def _arranged(x: Tensor, weight: Weight, *, scaled: bool = True, inverse: bool = True) -> Tensor:
    """Return the columns of x in the order of the planes: ``[n, slots]`` float32, zero where there is no column.

    Behind one another stand the planes, and in a plane the first codes of its units, their second ones, and so on.
    """
    slots = sum(plane.slots for plane in weight.planes)
    v = torch.zeros(x.shape[0], slots, device=x.device)
    wide = triton.next_power_of_2(weight.columns)
    kernels.arrange_kernel[(x.shape[0],)](
        v,
        x,
        weight.labels,
        weight.factor if scaled else None,
        weight.columns,
        slots,
        0 if weight.factor is None else weight.factor.numel(),
        weight.starts,
        tuple(plane.units for plane in weight.planes),
        CODES=tuple(plane.codes_of_unit for plane in weight.planes),
        LABELS=weight.label_of,
        LABEL_BITS=weight.label_bits,
        UNSCALED=weight.unscaled,
        DIVIDES=weight.divides and inverse,
        N=wide,
        num_warps=8 if wide <= 8192 else 16,
    )
    return v


def _described(planes: list[Plane]) -> tuple[tuple[Any, ...], ...]:
    """Return the arguments of kernels for each plane."""
    return tuple(
        (p.codes, p.scale, p.offset, p.center, p.step, p.codes.shape[1], p.units, p.scale.shape[1]) for p in planes
    )


def _group_units(weight: Weight) -> int:
    """Return the units with one scale, which a group fills; 0 for one group."""
    plane = weight.planes[0]
    return plane.group_size // plane.codes_of_unit


def _width(n: int, bits: int) -> int:
    return (n * bits + 7) // 8


def _check(tensor: Tensor, *shape: int) -> None:
    if tensor.shape != shape or not tensor.is_contiguous():
        raise RuntimeError(f"a tensor of {list(tensor.shape)} is not one of {list(shape)}, as the weight has it")
