"""The search of ranges: the authors' results, and those of a search that computes every candidate."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest
import torch
from torch import Tensor

from ptq161.errors import UserError
from ptq161.methods.qdrop import search_range
from ptq161.methods.qdrop.layers import searched_grid


def golden(golden_dir: Path, case: str) -> dict[str, Tensor]:
    with np.load(golden_dir / "qdrop" / "vectors.npz") as vectors:
        names = [key for key in vectors if key.startswith(f"{case}.")]
        return {key.removeprefix(f"{case}."): torch.from_numpy(vectors[key]) for key in names}


def every_candidate(x: Tensor, bits: int, per_channel: bool) -> tuple[Tensor, Tensor]:
    """The authors' loops, line by line, with ``torch``'s own fake quantization per tensor."""
    rows = x.reshape(x.shape[0] if per_channel else 1, -1)
    largest = 2**bits - 1
    side = "positive" if x.min() >= 0 else "negative" if x.max() <= 0 else "both"
    scales, zero_points = [], []
    for row in rows:
        low, high = row.amin().clamp(max=0), row.amax().clamp(min=0)
        best, found = torch.tensor(torch.inf), (0.0, 0)
        for i in range(1, 101):
            size = torch.maximum(-low, high) / 100 * i if side != "both" else (high - low) / 100 * i
            step = size / largest
            if side == "both":
                ranges = [(0 - z * step, size - z * step) for z in range(largest + 1)]
            else:
                ranges = [(0 * size, size) if side == "positive" else (-size, 0 * size)]
            for begin, end in ranges:
                begin, end = begin.clamp(max=0), end.clamp(min=0)
                scale = ((end - begin) / largest).clamp(min=1e-8)
                zero_point = int((-torch.round(begin / scale)).clamp(0, largest))
                q = torch.fake_quantize_per_tensor_affine(row, float(scale), zero_point, 0, largest)
                error = (q - row).abs().pow(2.4).mean()
                if error < best:
                    best, found = error, (float(scale), zero_point)
        scales.append(found[0])
        zero_points.append(found[1])
    return torch.tensor(scales), torch.tensor(zero_points, dtype=torch.int32)


@pytest.mark.parametrize("bits", [2, 3, 4])
def test_golden_weights(golden_dir: Path, bits: int) -> None:
    vectors = golden(golden_dir, f"weight{bits}")
    scale, zero_point = search_range(vectors["W"], bits)
    assert scale.shape == zero_point.shape == vectors["scale"].shape
    torch.testing.assert_close(scale, vectors["scale"], rtol=1e-6, atol=0)
    assert torch.equal(zero_point, vectors["zero_point"].int())


@pytest.mark.parametrize("bits", [2, 4])
@pytest.mark.parametrize("kind", ["two_sided", "positive"])
def test_golden_activations(golden_dir: Path, kind: str, bits: int) -> None:
    vectors = golden(golden_dir, f"act_{kind}{bits}")
    scale, zero_point = search_range(vectors["X"], bits, per_channel=False)
    assert scale.shape == zero_point.shape == (1,)
    torch.testing.assert_close(scale, vectors["scale"], rtol=1e-6, atol=0)
    assert torch.equal(zero_point, vectors["zero_point"].int())


@pytest.mark.parametrize("per_channel", [True, False])
@pytest.mark.parametrize("kind", ["normal", "long tails", "one row of one sign", "positive", "negative"])
@pytest.mark.parametrize(("bits", "width"), [(2, 40), (2, 1), (3, 300), (4, 12)])
def test_it_finds_what_the_authors_loops_find(bits: int, width: int, kind: str, per_channel: bool) -> None:
    x = torch.randn(2, width, generator=torch.Generator().manual_seed(bits + width))
    x[0, 0], x[1, 0] = -0.5, 0.5
    if kind == "long tails":
        x = x**3
    elif kind == "one row of one sign":
        x[1].abs_()
    elif kind != "normal":
        x = x.abs() * (1 if kind == "positive" else -1)
    for found, expected in zip(search_range(x, bits, per_channel), every_candidate(x, bits, per_channel), strict=True):
        torch.testing.assert_close(found, expected, rtol=1e-6, atol=0)


@pytest.mark.parametrize("bits", [6, 8])
def test_more_bits_leave_little_error(bits: int) -> None:
    x = torch.randn(4, 200, generator=torch.Generator().manual_seed(bits)) + 0.3
    scale, zero_point = (part.unsqueeze(1) for part in search_range(x, bits))
    q = ((x / scale).round() + zero_point).clamp(0, 2**bits - 1).sub(zero_point) * scale
    assert (q - x).square().mean() < ((x.amax() - x.amin()) / 2**bits) ** 2 / 6  # twice that of even rounding


def test_the_first_of_equal_candidates_wins() -> None:
    # By symmetry a zero point of 2 is as good as one of 1.
    scale, zero_point = search_range(torch.tensor([[-1.0, 1.0], [-3.0, 3.0]]), bits=2)
    assert zero_point.tolist() == [1, 1]
    assert scale[1] == 3 * scale[0]


@pytest.mark.parametrize("bits", [2, 8])
def test_a_channel_of_zeros_takes_the_least_scale(bits: int) -> None:
    x = torch.zeros(3, 8)
    x[1, :2] = torch.tensor([-1.0, 2.0])
    scale, zero_point = search_range(x, bits)
    assert scale[0] == scale[2] == torch.tensor(1e-8) and scale[1] > 0.001
    assert zero_point[[0, 2]].tolist() == [0, 0]
    assert search_range(torch.zeros(2, 2), bits)[0].tolist() == [torch.tensor(1e-8).item()] * 2


def test_other_dimensions_and_dtypes() -> None:
    x = torch.randn(4, 3, 5).half()
    assert torch.equal(search_range(x, 3)[0], search_range(x.float().flatten(1), 3)[0])
    assert torch.equal(search_range(x, 3, per_channel=False)[0], search_range(x.flatten(), 3, per_channel=False)[0])


def test_long_rows_are_searched_in_full() -> None:
    x = torch.randn(1, 6000, generator=torch.Generator().manual_seed(3))
    for found, expected in zip(search_range(x, 2), every_candidate(x, 2, True), strict=True):
        torch.testing.assert_close(found, expected, rtol=1e-6, atol=0)


def test_groups_are_rows_of_their_own() -> None:
    weight = torch.randn(4, 20)
    scale, zero_point = searched_grid(weight, 2, 8, "float32")
    assert scale.shape == zero_point.shape == (4, 3)
    expected = search_range(torch.cat([weight[:, 8:16], weight[:, :8], torch.ones(1, 8), -torch.ones(1, 8)]), 2)[0]
    torch.testing.assert_close(torch.cat([scale[:, 1], scale[:, 0]]), expected[:8])


def test_what_has_no_range() -> None:
    with pytest.raises(UserError, match=r"^bits=9: use 2 to 8\.$"):
        search_range(torch.ones(2, 2), 9)
    with pytest.raises(UserError, match="NaN or infinite"):
        search_range(torch.tensor([[1.0, float("nan")]]), 2)
    with pytest.raises(UserError, match="no values"):
        search_range(torch.ones(2, 0), 2)
