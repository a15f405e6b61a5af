"""Random packed weights of the formats that have compiled products."""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch import Tensor

from ptq161.packed.allotted import AllottedWeight, Grid
from ptq161.packed.awq import AWQWeight
from ptq161.packed.billm import BiLLMWeight, BinaryGrid, BinaryPlanes
from ptq161.packed.fp4 import FP4Weight
from ptq161.packed.fp8 import FP8Weight
from ptq161.packed.gse import GseWeight, quantize
from ptq161.packed.nf4 import NF4Weight
from ptq161.packed.pb_llm import PBLLMWeight
from ptq161.packed.row_column_binary import RowColumnBinaryWeight
from ptq161.packed.structured_binary import StructuredBinaryWeight
from ptq161.packed.uniform import UniformWeight
from ptq161.packed.vector import Coded, Norm, VectorWeight
from ptq161.packed.weight import PackedWeight

SHAPES = [(1, 1), (3, 7), (97, 97), (192, 576), (576, 192), (130, 515), (33, 1536)]
"""Rows and columns: small ones, whole chunks, and tails of every kind."""


def structured_binary(
    rows: int, columns: int, *, bits: int = 4, ratio: float = 0.2, scale_dtype: str = "float16"
) -> StructuredBinaryWeight:
    mask = torch.rand(columns) < ratio
    salient = int(mask.sum())
    return StructuredBinaryWeight.pack(
        mask=mask,
        sign=torch.rand(rows, columns - salient) > 0.5,
        scale=torch.rand(rows, 1) + 0.5,
        mean=0.1 * torch.randn(rows, 1),
        column_angle=torch.rand(columns - salient) + 0.5,
        codes=codes(rows, salient, bits),
        salient_scale=0.1 * torch.rand(rows, 1 if salient else 0),
        salient_zero_point=codes(rows, 1 if salient else 0, bits).float(),
        salient_bits=bits,
        scale_dtype=scale_dtype,
    )


def uniform(
    rows: int, columns: int, *, bits: int, group_size: int | None = None, symmetric: bool = False
) -> UniformWeight:
    groups = 1 if group_size is None else -(-columns // group_size)
    scales, zero_points = 0.1 * torch.rand(rows, groups), codes(rows, groups, bits).float()
    settings = {"bits": bits, "group_size": group_size, "symmetric": symmetric}
    return UniformWeight.pack(codes(rows, columns, bits), scales, zero_points, **settings)


def awq(rows: int, columns: int, *, bits: int) -> AWQWeight:
    return AWQWeight.from_uniform(uniform(rows, columns, bits=bits), torch.rand(columns) + 0.5)


def allotted(rows: int, columns: int, *, tiers: list[int], scale_dtype: str = "float16") -> AllottedWeight:
    bits = torch.tensor(tiers)[torch.randint(0, len(tiers), (columns,))]
    grid = Grid(
        row=torch.rand(rows, 1) + 0.5,
        column=torch.rand(columns) + 0.5,
        scale=0.1 * torch.rand(rows, 1),
        zero_point=codes(rows, 1, 4).float(),
    )
    all_codes = (torch.rand(rows, columns) * 2.0**bits).long()
    return AllottedWeight.pack(all_codes, bits, grid, tiers=tiers, scale_dtype=scale_dtype)


def vector(
    rows: int,
    columns: int,
    *,
    v: int,
    k: int,
    residual: int = 0,
    outliers: float = 0.0,
    groups: int = 1,
    mixed: bool = False,
    scale_dtype: str = "float16",
) -> VectorWeight:
    n_outliers = int(outliers * columns)
    labels = (torch.arange(columns) - n_outliers).clamp(min=0) // max(1, (columns - n_outliers) // groups)
    labels = torch.where(torch.arange(columns) < n_outliers, groups, labels.clamp(max=groups - 1))
    scales = Norm(torch.rand(columns) + 0.5, torch.randn(columns), torch.rand(rows, 1) + 0.5)
    return VectorWeight.pack(
        coded(rows, columns - n_outliers, groups, k, v),
        (rows, columns),
        residual=coded(rows, columns - n_outliers, groups, residual, v) if residual else None,
        outlier=coded(rows, n_outliers, 1, 32, 4) if n_outliers else None,
        labels=labels[torch.randperm(columns)] if mixed else None,
        norm=scales if mixed else None,
        scale_dtype=scale_dtype,
    )


def billm(rows: int, columns: int, *, block: int, salient: float = 0.1, scale_dtype: str = "float16") -> BiLLMWeight:
    planes = [torch.rand(rows, columns) > 0.5 for _ in range(3)]
    blocks = -(-columns // block)
    grid = BinaryGrid(torch.rand(4, rows, blocks), torch.randn(3, rows, blocks))
    return BiLLMWeight.pack(BinaryPlanes(torch.rand(columns) < salient, *planes), grid, block, scale_dtype=scale_dtype)


def pb_llm(rows: int, columns: int, *, high_bit: int, scale_dtype: str = "float16") -> PBLLMWeight:
    return PBLLMWeight.pack(
        salient=torch.rand(rows, columns) < 0.1,
        signs=torch.rand(rows, columns) > 0.5,
        codes=codes(rows, columns, high_bit),
        means=torch.randn(rows, 1),
        scales=torch.rand(rows, 1),
        high_scales=0.1 * torch.rand(rows, 1),
        high_zero_points=codes(rows, 1, high_bit).float(),
        high_bit=high_bit,
        scale_dtype=scale_dtype,
    )


def row_column_binary(rows: int, columns: int, *, block: int, by_block: bool) -> RowColumnBinaryWeight:
    blocks = -(-columns // block)
    orders = torch.randint(1, 4, (blocks,)).repeat_interleave(block) if by_block else torch.randint(1, 4, (columns,))
    return RowColumnBinaryWeight.pack(
        orders=orders[:columns],
        signs=torch.rand(3, rows, columns) > 0.5,
        row_scales=torch.randn(3, rows, blocks),
        column_scales=torch.rand(3, columns),
        column_block=block,
    )


def gse(rows: int, columns: int, *, bits: int, group_size: int) -> GseWeight:
    return GseWeight.pack(*quantize(torch.randn(rows, columns), bits, group_size), bits, group_size)


def nf4(rows: int, columns: int, *, group_size: int) -> NF4Weight:
    return NF4Weight.pack(codes(rows, columns, 4), torch.rand(rows, -(-columns // group_size)), group_size)


def coded(rows: int, columns: int, groups: int, k: int, v: int) -> Coded:
    return Coded(torch.randn(groups, k, v), torch.randint(0, k, (-(-rows // v), columns)))


def codes(rows: int, columns: int, bits: int) -> Tensor:
    return torch.randint(0, 2**bits, (rows, columns))


MAKERS: dict[str, Callable[[int, int], PackedWeight]] = {
    "structured_binary": structured_binary,
    "structured_binary 3 bits": lambda o, i: structured_binary(o, i, bits=3, ratio=0.5, scale_dtype="float32"),
    "structured_binary without salient": lambda o, i: structured_binary(o, i, ratio=0.0),
    "uniform 2 bits": lambda o, i: uniform(o, i, bits=2),
    "uniform 3 bits": lambda o, i: uniform(o, i, bits=3).scaled(-3),
    "uniform 4 bits symmetric": lambda o, i: uniform(o, i, bits=4, symmetric=True),
    "uniform 2 bits groups": lambda o, i: uniform(o, i, bits=2, group_size=64),
    "uniform 3 bits groups": lambda o, i: uniform(o, i, bits=3, group_size=8),
    "awq": lambda o, i: awq(o, i, bits=3),
    "allotted": lambda o, i: allotted(o, i, tiers=[1, 2, 4]),
    "allotted four tiers": lambda o, i: allotted(o, i, tiers=[1, 2, 3, 4], scale_dtype="float32"),
    "allotted 2 bits": lambda o, i: allotted(o, i, tiers=[2]),
    "allotted 4 bits": lambda o, i: allotted(o, i, tiers=[4]),
}
"""Weights of codes of 1 to 4 bits, which activations of eight bits multiply, too."""

OTHERS: dict[str, Callable[[int, int], PackedWeight]] = {
    "vector": lambda o, i: vector(o, i, v=6, k=512),
    "vector with everything": lambda o, i: vector(o, i, v=8, k=200, residual=16, outliers=0.1, groups=3, mixed=True),
    "vector, few and long": lambda o, i: vector(o, i, v=4, k=3, groups=2, scale_dtype="float32").scaled(3),
    "vector of 17 rows": lambda o, i: vector(o, i, v=17, k=64, outliers=0.5),
    "gse 5 bits": lambda o, i: gse(o, i, bits=5, group_size=32),
    "gse 8 bits": lambda o, i: gse(o, i, bits=8, group_size=7).scaled(2),
    "nf4": lambda o, i: nf4(o, i, group_size=64),
    "nvfp4": lambda o, i: FP4Weight.rounded(torch.randn(o, i), "nvfp4"),
    "mxfp4": lambda o, i: FP4Weight.rounded(torch.randn(o, i), "mxfp4").scaled(-4),
    "fp8": lambda o, i: FP8Weight.rounded(torch.randn(o, i)),
    "fp8 groups": lambda o, i: FP8Weight.rounded(torch.randn(o, i), 48),
    "billm": lambda o, i: billm(o, i, block=128),
    "billm, odd blocks": lambda o, i: billm(o, i, block=83, salient=0.6, scale_dtype="float32").scaled(1),
    "pb_llm": lambda o, i: pb_llm(o, i, high_bit=8),
    "pb_llm 3 bits": lambda o, i: pb_llm(o, i, high_bit=3, scale_dtype="float32").scaled(-2),
    "row_column_binary": lambda o, i: row_column_binary(o, i, block=128, by_block=True),
    "row_column_binary, odd blocks": lambda o, i: row_column_binary(o, i, block=83, by_block=False),
}
"""Weights that have a product in float32 only."""
