from __future__ import annotations

from functools import partial
from pathlib import Path

import pytest
import torch
from torch import Tensor

from ptq161.errors import UserError
from ptq161.training.arithmetic.blockfloat import quantize
from ptq161.training.arithmetic.spectral import (
    NEAREST,
    SCHEDULES,
    Rounding,
    Spectrum,
    Uniforms,
    dual_range,
    project,
    quantize_spectral,
    sampled_subspace,
    split,
    split_linear,
    subspace_iteration,
    truncated_svd,
)
from tests.training.arithmetic.test_blockfloat import golden


def rounding(format: str, as_released: bool = True) -> Rounding:
    return lambda x, uniform: quantize(x, format, uniform, as_released=as_released)


def identity(x: Tensor, uniform: Tensor | None) -> Tensor:
    return x


def assert_near(found: Tensor, expected: Tensor, bar: float = 1e-5, share: float = 0.99) -> None:
    near = (found - expected).abs() <= bar * expected.abs().max()
    assert near.float().mean() >= share


def flat(m: int = 256, n: int = 128) -> Tensor:
    return torch.randn(m, n, generator=torch.Generator().manual_seed(1))


def with_large_singular_values(m: int = 256, n: int = 128, power: int = 1) -> Tensor:
    """A flat matrix and three large singular values; the vectors of a high power have a few large entries each."""
    generator = torch.Generator().manual_seed(0)
    left, right = (torch.linalg.qr(torch.randn(k, 3, generator=generator) ** power).Q for k in (m, n))
    return flat(m, n) + (left * torch.tensor([400.0, 200.0, 100.0])) @ right.T


@pytest.mark.parametrize(
    ("case", "format", "schedule"),
    [
        ("tensor_fp4", "fp4e2m1", "none"),
        ("tensor_fp8", "fp8e4m3", "none"),
        ("tensor_fp4_scheduled", "fp4e2m1", "ysche"),
        ("block_fp4", "fp4e2m1b", "none"),
    ],
)
def test_golden_vectors_of_the_product(golden_dir: Path, case: str, format: str, schedule: str) -> None:
    vectors = golden(golden_dir, "spectral")
    spectrum = Spectrum(vectors["U"], vectors["S"], vectors["V"])
    parts = (vectors.get(f"{case}.uniform_{part}") for part in ("U", "V", "residual"))
    found = quantize_spectral(vectors["M"], spectrum, rounding(format), Uniforms(*parts), schedule=schedule)
    assert_near(found, vectors[case])


def test_the_golden_vectors_of_the_product_are_of_the_truncated_svd(golden_dir: Path) -> None:
    vectors = golden(golden_dir, "spectral")
    found = truncated_svd(vectors["M"], 6)
    assert_near(found.matrix(), Spectrum(vectors["U"], vectors["S"], vectors["V"]).matrix(), share=1)


@pytest.mark.parametrize("iterations", [1, 2, 3])
def test_golden_vectors_of_subspace_iterations(golden_dir: Path, iterations: int) -> None:
    vectors = golden(golden_dir, "power")
    found = subspace_iteration(golden(golden_dir, "spectral")["M"], vectors["V0"], iterations)
    expected = Spectrum(*(vectors[f"{part}{iterations}"] for part in "USV"))
    assert_near(found.matrix(), expected.matrix(), share=1)
    assert_near(found.values, expected.values, share=1)


def test_golden_vectors_of_the_split(golden_dir: Path) -> None:
    vectors = golden(golden_dir, "split")
    residual, spectrum = split(vectors["W"], int(vectors["rank"]))
    assert_near(residual, vectors["residual"])
    assert_near(spectrum.matrix(), Spectrum(vectors["U"], vectors["S"], vectors["V"].T).matrix())
    assert_near(residual + spectrum.matrix(), vectors["W"], bar=1e-6, share=1)
    assert_near(split_linear(vectors["X"], residual, spectrum, rounding("fp4e2m1")), vectors["y_fp4"])


def test_golden_vector_of_the_regulariser(golden_dir: Path) -> None:
    vectors, weight = golden(golden_dir, "regulariser"), golden(golden_dir, "split")["W"]
    assert float(dual_range(weight, *vectors["arguments"].tolist())) == pytest.approx(float(vectors["value"]), rel=1e-3)


def test_the_regulariser_has_a_gradient() -> None:
    weight = torch.tensor([0.5, -2.0], dtype=torch.float64, requires_grad=True)
    assert torch.autograd.gradcheck(partial(dual_range, alpha1=2.0, alpha2=0.1, strength=3.0), weight)


def test_without_rounding_the_product_is_the_matrix() -> None:
    matrix = with_large_singular_values()
    for spectrum in (truncated_svd(matrix, 5), project(matrix, sampled_subspace(matrix, 5))):
        torch.testing.assert_close(quantize_spectral(matrix, spectrum, identity), matrix, rtol=1e-4, atol=1e-4)


def errors(matrix: Tensor, format: str) -> tuple[Tensor, Tensor]:
    """What is lost directly and by the product."""
    direct = quantize(matrix, format, as_released=False)
    spectrum = project(matrix, sampled_subspace(matrix, 5))
    return direct - matrix, quantize_spectral(matrix, spectrum, rounding(format, as_released=False)) - matrix


def test_one_scale_loses_less_by_the_product_where_a_few_singular_values_are_large() -> None:
    direct, spectral = errors(with_large_singular_values(power=5), "fp4e2m1")
    assert spectral.norm() < 0.5 * direct.norm()


@pytest.mark.parametrize("format", ["nvfp4e2m1b", "mxfp4e2m1b", "fp4e2m1", "fp8e4m3"])
def test_the_small_singular_values_lose_what_they_lose_without_the_large_ones(format: str) -> None:
    """What the product loses lies along the large ones: there, with scales in blocks, it loses more than directly."""
    matrix = with_large_singular_values()
    exact = truncated_svd(matrix, 3)

    def apart(error: Tensor) -> float:
        error = error - exact.left @ (exact.left.T @ error)
        return float((error - error @ exact.right @ exact.right.T).norm())

    direct, spectral = (apart(error) for error in errors(matrix, format))
    alone = float(errors(flat(), format)[0].norm())
    assert spectral < 1.1 * alone < 0.6 * direct


@pytest.mark.parametrize("format", ["nvfp4e2m1b", "mxfp4e2m1b", "fp4e2m1", "fp8e4m3"])
def test_factors_in_float_lose_what_the_residual_does(format: str) -> None:
    """So the product is nearer than direct rounding, which one with rounded factors is not in every format."""
    matrix, fp = with_large_singular_values(), rounding(format, as_released=False)
    spectrum = truncated_svd(matrix, 3)
    found = quantize_spectral(matrix, spectrum, fp, factors="float")
    rest = matrix - spectrum.matrix()
    torch.testing.assert_close(found - matrix, fp(rest, None) - rest, rtol=1e-3, atol=1e-3)
    direct, spectral = errors(matrix, format)
    assert (found - matrix).norm() < 0.6 * min(direct.norm(), spectral.norm())


@pytest.mark.parametrize("format", ["nvfp4e2m1b", "mxfp4e2m1b", "fp4e2m1", "fp8e4m3"])
def test_a_flat_matrix_loses_the_same_by_the_product(format: str) -> None:
    direct, spectral = errors(flat(), format)
    assert float(spectral.norm()) == pytest.approx(float(direct.norm()), rel=0.1)


def test_random_numbers_of_the_parts() -> None:
    """One half is nearest, and random numbers keep the matrix on average."""
    matrix = with_large_singular_values(32, 64)
    spectrum = truncated_svd(matrix, 3)
    half = Uniforms(torch.full((3, 32), 0.5), torch.full((3, 64), 0.5), torch.full((32, 64), 0.5))
    fp4 = rounding("nvfp4e2m1b", as_released=False)
    nearest = quantize_spectral(matrix, spectrum, fp4, NEAREST)
    assert torch.equal(quantize_spectral(matrix, spectrum, fp4, half), nearest)
    draws = [
        quantize_spectral(matrix, spectrum, fp4, Uniforms(*(torch.rand(u.shape) for u in half if u is not None)))
        for _ in range(200)
    ]
    assert (torch.stack(draws).mean(0) - matrix).norm() < 0.3 * (nearest - matrix).norm()


def test_schedules() -> None:
    """The released one makes the singular values from the sixth on smaller; what is stated makes them larger."""
    matrix = torch.diag(torch.arange(10, 0, -1.0))
    spectrum = truncated_svd(matrix, 8)
    found = {name: quantize_spectral(matrix, spectrum, identity, schedule=name).diagonal() for name in SCHEDULES}
    factors = {name: (values / matrix.diagonal()).tolist() for name, values in found.items()}
    assert factors["none"] == pytest.approx([1.0] * 10)
    assert factors["ysche"] == pytest.approx([1.0] * 5 + [0.5] * 3 + [2.0] * 2)
    assert factors["amplified"] == pytest.approx([1.0] * 5 + [1.5] * 3 + [2.0] * 2)


def test_a_cached_subspace_without_iterations_is_a_projection() -> None:
    matrix = with_large_singular_values()
    right = truncated_svd(matrix, 4).right
    found = subspace_iteration(matrix, right * torch.tensor([1.0, -3.0, 0.5, 2.0]), iterations=0)
    torch.testing.assert_close(found.matrix(), matrix @ right @ right.T, rtol=1e-3, atol=1e-3)
    assert not subspace_iteration(torch.zeros(4, 3), torch.eye(3)[:, :2]).matrix().any()


def test_a_hundredth_of_the_rows_finds_the_large_singular_values() -> None:
    matrix = with_large_singular_values(3000, 96)
    exact = truncated_svd(matrix, 3)
    basis = sampled_subspace(matrix, 3)
    torch.testing.assert_close(basis.T @ basis, torch.eye(3), rtol=1e-5, atol=1e-5)
    kept = project(matrix, basis).matrix().norm() / exact.matrix().norm()
    assert kept > 0.99


@pytest.mark.parametrize("rank", [0, 5])
def test_ranks_out_of_range(rank: int) -> None:
    with pytest.raises(UserError, match=rf"rank={rank}: use 1 to 4 for a matrix of \[4, 6\]"):
        truncated_svd(torch.ones(4, 6), rank)


def test_arguments_out_of_range() -> None:
    with pytest.raises(UserError, match="iterations=-1: use at least 0"):
        subspace_iteration(torch.ones(4, 6), torch.ones(6, 2), -1)
    with pytest.raises(UserError, match="factors=half: use one of format, float"):
        quantize_spectral(torch.eye(4), truncated_svd(torch.eye(4), 1), identity, factors="half")
    with pytest.raises(UserError, match="schedule=linear: use one of none, ysche, amplified"):
        quantize_spectral(torch.eye(4), truncated_svd(torch.eye(4), 1), identity, schedule="linear")
