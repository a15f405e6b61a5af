from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest
import torch
from torch import Tensor

from ptq161.errors import UserError
from ptq161.training.arithmetic.blockfloat import FORMATS, quantize

X = torch.randn(24, 96, generator=torch.Generator().manual_seed(3)) * torch.logspace(-3, 2, 96)


def golden(golden_dir: Path, case: str) -> dict[str, Tensor]:
    with np.load(golden_dir / "metis" / "vectors.npz") as vectors:
        keys = [key for key in vectors if key.startswith(f"{case}.")]
        return {key.removeprefix(f"{case}."): torch.as_tensor(vectors[key]) for key in keys}


@pytest.mark.parametrize("format", FORMATS)
def test_golden_vectors(golden_dir: Path, format: str) -> None:
    vectors, x = golden(golden_dir, f"format.{format}"), golden(golden_dir, "format")["X"]
    found = quantize(x, format, vectors.get("uniform"))
    assert (found == vectors["value"]).float().mean() >= 0.999
    # Codes are chosen against the scale that the released code stores beside them.
    scale = vectors["scale"].repeat_interleave(16, 1) if vectors["scale"].ndim else vectors["scale"]
    factor = scale.log2().round().exp2() if format == "mxfp4e2m1b" else scale
    torch.testing.assert_close(found, vectors["code"] * factor, rtol=1e-6, atol=0)


@pytest.mark.parametrize("as_released", [True, False])
@pytest.mark.parametrize("format", FORMATS)
def test_half_everywhere_is_nearest(format: str, as_released: bool) -> None:
    half = torch.full_like(X, 0.5)
    nearest = quantize(X, format, as_released=as_released)
    assert torch.equal(quantize(X, format, half, as_released=as_released), nearest)


@pytest.mark.parametrize("format", FORMATS)
def test_random_rounding_keeps_numbers_on_average(format: str) -> None:
    generator = torch.Generator().manual_seed(0)
    x, n = X[:4], 400
    total = sum(quantize(x, format, torch.rand(x.shape, generator=generator), as_released=False) for _ in range(n))
    spread = (quantize(x, format, as_released=False) - x).abs().max()
    bias = (total / n - x).abs()
    # What is beyond the largest code of its block is cut off in MXFP4, whose scale may be too small by a third.
    kept = bias < 6 * spread / n**0.5
    assert kept.float().mean() > (0.95 if format == "mxfp4e2m1b" else 0.999)


@pytest.mark.parametrize("format", FORMATS)
def test_any_length_any_shape_any_dtype(format: str) -> None:
    x = X[:, :37]
    padded = torch.nn.functional.pad(x, (0, 11))
    assert torch.equal(quantize(x, format), quantize(padded, format)[:, :37])
    assert torch.equal(quantize(x.view(4, 6, 37), format, block=8), quantize(x, format, block=8).view(4, 6, 37))
    assert quantize(x.bfloat16(), format).dtype == torch.float32
    assert quantize(torch.empty(0, 16), format).shape == (0, 16)


@pytest.mark.parametrize("as_released", [True, False])
@pytest.mark.parametrize("format", FORMATS)
def test_zeros_stay_zeros_and_what_is_not_finite_stays_so(format: str, as_released: bool) -> None:
    assert not quantize(torch.zeros(2, 32), format, as_released=as_released).any()
    for value in (float("nan"), float("inf")):
        x = X.clone()
        x[0, 0] = value
        assert not quantize(x, format, as_released=as_released).isfinite().all()


def test_the_stated_formats_hold_tiny_gradients() -> None:
    """The constants that the released code adds to scales are as large as a gradient may be."""
    tiny = X * 1e-9
    for format in ("fp8e4m3", "nvfp4e2m1b", "mxfp4e2m1b"):
        scaled = quantize(tiny * 2.0**30, format, as_released=False) / 2.0**30
        torch.testing.assert_close(quantize(tiny, format, as_released=False), scaled, rtol=1e-5, atol=0)
    assert not quantize(tiny / 1e3, "fp8e4m3").any()


def test_the_slips_of_the_released_code_are_kept_out() -> None:
    def error(format: str, as_released: bool) -> float:
        found = quantize(X, format, block=16, as_released=as_released)
        return float((found - X).norm() / X.norm())

    assert error("mxfp4e2m1b", True) > 2 * error("mxfp4e2m1b", False)
    # NVFP4 with scales in float32 is better than the format can be: it is the format with float scales.
    torch.testing.assert_close(quantize(X, "nvfp4e2m1b"), quantize(X, "fp4e2m1b"), rtol=1e-6, atol=0)
    assert error("nvfp4e2m1b", True) < error("nvfp4e2m1b", False) < 1.2 * error("nvfp4e2m1b", True)


def test_the_scales_of_nvfp4_are_stored_ones() -> None:
    found = quantize(X, "nvfp4e2m1b", as_released=False).view(24, -1, 16)
    scale = X.abs().max() / (6 * 448)
    steps = found / scale
    block = (X.view(24, -1, 16).abs().amax(-1) / 6 / scale).to(torch.float8_e4m3fn).float()
    codes = steps / block.clamp(min=1e-9).unsqueeze(-1)
    grid = torch.tensor([0, 0.5, 1, 1.5, 2, 3, 4, 6])
    assert (codes.abs().unsqueeze(-1) - grid).abs().amin(-1).max() < 1e-5


def test_a_block_of_mxfp4_has_a_power_of_two() -> None:
    found = quantize(X, "mxfp4e2m1b", as_released=False)
    exponent = X.view(24, -1, 32).abs().amax(-1).log2().floor() - 2
    codes = found.view(24, -1, 32) / exponent.exp2().unsqueeze(-1)
    grid = torch.tensor([0, 0.5, 1, 1.5, 2, 3, 4, 6])
    assert torch.isin(codes.abs(), grid).all()


def test_an_unknown_format_is_refused() -> None:
    with pytest.raises(UserError, match="format=fp3: use one of fp4e2m1, "):
        quantize(X, "fp3")
