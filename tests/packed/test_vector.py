from __future__ import annotations

import math

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch import Tensor

from ptq161.errors import UserError
from ptq161.packed.vector import Coded, Norm, VectorWeight
from ptq161.packed.weight import packed_weight_from


def drawn(groups: int, k: int, v: int, out_features: int, columns: int) -> Coded:
    rows = -(-out_features // v)
    return Coded(torch.randn(groups, k, v).half().float(), torch.randint(0, k, (rows, columns)))


def by_definition(coded: Coded, labels: Tensor, out_features: int) -> Tensor:
    """Vector by vector."""
    v, weight = coded.centroids.shape[2], torch.zeros(out_features + coded.centroids.shape[2], len(labels))
    for column, label in enumerate(labels.tolist()):
        for row, index in enumerate(coded.indices[:, column].tolist()):
            weight[row * v : (row + 1) * v, column] = coded.centroids[label, index]
    return weight[:out_features]


@given(
    st.integers(1, 13),
    st.integers(3, 11),
    st.integers(1, 6),
    st.integers(2, 40),
    st.sampled_from([0, 2, 5]),
    st.integers(1, 3),
    st.integers(0, 2),
    st.booleans(),
    st.booleans(),
    st.sampled_from(["float16", "float32"]),
    st.integers(0, 2**32),
)
def test_round_trip(
    out_features: int,
    in_features: int,
    v: int,
    k: int,
    residual: int,
    groups: int,
    outliers: int,
    ordered: bool,
    normed: bool,
    scale_dtype: str,
    seed: int,
) -> None:
    torch.manual_seed(seed)
    columns = in_features - outliers
    main = drawn(groups, k, v, out_features, columns)
    rest = drawn(groups, residual, v, out_features, columns) if residual else None
    outlier = drawn(1, 3, 2, out_features, outliers) if outliers else None
    width = max(1, columns // groups)
    labels = torch.cat([torch.full((outliers,), groups), (torch.arange(columns) // width).clamp(max=groups - 1)])
    if not ordered:
        labels = labels[torch.randperm(in_features)]
    norm = Norm(*(torch.rand(shape).half().float() for shape in [in_features, in_features, (out_features, 1)]))
    packed = VectorWeight.pack(
        main,
        (out_features, in_features),
        residual=rest,
        outlier=outlier,
        labels=None if ordered else labels,
        norm=norm if normed else None,
        scale_dtype=scale_dtype,
    )
    expected = torch.zeros(out_features, in_features)
    inner = labels < groups
    expected[:, inner] = by_definition(main, labels[inner], out_features)
    if rest is not None:
        expected[:, inner] += by_definition(rest, labels[inner], out_features)
    if outlier is not None:
        expected[:, ~inner] = by_definition(outlier, torch.zeros(outliers, dtype=torch.int64), out_features)
    if normed and norm.column_scale is not None and norm.column_offset is not None and norm.row_scale is not None:
        expected = norm.row_scale * (norm.column_scale * expected + norm.column_offset)
    values = packed.dequantize()
    assert values.shape == (out_features, in_features) and values.dtype == torch.float32
    torch.testing.assert_close(values, expected)
    again = packed_weight_from(packed.settings(), packed.state_dict())
    assert torch.equal(again.dequantize(), values) and again.nbytes == packed.nbytes
    assert torch.equal(packed.unpacked_indices(), main.indices)
    assert torch.equal(packed.column_labels(), labels)


@pytest.mark.parametrize("k", [2, 3, 16, 24, 64, 256, 512, 4096, 5000])
def test_indices_take_as_many_bits_as_the_codebook_needs(k: int) -> None:
    packed = VectorWeight.pack(drawn(1, k, 8, 64, 96), (64, 96))
    assert packed.nbytes == 8 * 96 * math.ceil(math.log2(k)) // 8 + 2 * 8 * k


def test_labels_are_stored_where_the_columns_are_in_another_order() -> None:
    main, outlier = drawn(2, 4, 2, 8, 14), drawn(1, 4, 2, 8, 2)
    labels = torch.tensor([2, 2] + [0] * 7 + [1] * 7)
    sizes = [
        VectorWeight.pack(main, (8, 16), outlier=outlier, labels=given).nbytes
        for given in (None, labels, labels.flip(0))
    ]
    assert sizes[0] == sizes[1] == sizes[2] - 16 * 2 // 8
    assert VectorWeight.pack(drawn(1, 4, 2, 8, 16), (8, 16), labels=torch.zeros(16, dtype=torch.int64)).labels is None


@pytest.mark.parametrize(
    "entry",
    [
        "centroids",
        "indices",
        "residual_centroids",
        "residual_indices",
        "outlier_centroids",
        "outlier_indices",
        "column_scale",
        "column_offset",
        "row_scale",
    ],
)
def test_a_flipped_bit_changes_the_output(entry: str) -> None:
    torch.manual_seed(0)
    packed = VectorWeight.pack(
        drawn(1, 4, 2, 8, 30),
        (8, 32),
        residual=drawn(1, 4, 2, 8, 30),
        outlier=drawn(1, 4, 2, 8, 2),
        norm=Norm(torch.ones(32), torch.ones(32), torch.ones(8, 1)),
    )
    before = packed.dequantize()
    packed.state_dict()[entry].view(torch.uint8).flatten()[1] ^= 1
    assert not torch.equal(packed.dequantize(), before)


def test_a_centroid_that_cannot_be_stored() -> None:
    with pytest.raises(UserError, match="float16"):
        VectorWeight.pack(Coded(torch.full((1, 2, 1), 1e6), torch.zeros(1, 1, dtype=torch.int64)), (1, 1))


@pytest.mark.parametrize("k", [1, 65537])
def test_a_codebook_that_no_index_reaches(k: int) -> None:
    with pytest.raises(UserError, match="2 to 65536 centroids"):
        VectorWeight.pack(Coded(torch.zeros(1, k, 1), torch.zeros(1, 1, dtype=torch.int64)), (1, 1))
