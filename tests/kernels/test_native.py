"""Operators in C++: the same as torch's, whatever the number of threads, and torch's where nothing can be compiled."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path

import pytest
import torch
from torch import Tensor

from ptq161.kernels import latent as latents
from ptq161.kernels import native
from ptq161.kernels.divergence import divergence
from ptq161.kernels.latent import Columns, latent_weight

SHAPES = [(1, 1), (7, 97), (64, 576), (192, 1536)]


def layer(shape: tuple[int, int], *, with_mean: bool) -> tuple[list[Tensor], Columns, Tensor]:
    """Return what is learned (latent, column, row, scale, mean), and what is fixed of the columns and rows."""
    generator = torch.Generator().manual_seed(0)

    def positive(*size: int) -> Tensor:
        return torch.rand(*size, generator=generator) + 0.5

    n_rows, n = shape
    bits = torch.randint(1, 5, (n,), generator=generator)
    levels = 2.0**bits - 1
    latent = levels / 2 + levels * torch.randn(n_rows, n, generator=generator)
    mean = torch.randn(n_rows, 1, generator=generator) if with_mean else torch.zeros(n_rows, 1)
    learned = [latent, positive(n), positive(n_rows, 1), positive(n_rows, 1), mean]
    columns = Columns(levels, levels / 2, (bits == 4).float(), positive(n))
    return [part.requires_grad_() for part in learned], columns, torch.full((n_rows, 1), 8.0)


def weight_and_gradients(
    shape: tuple[int, int], dtype: torch.dtype, softness: float, *, with_mean: bool = True
) -> list[Tensor]:
    learned, columns, zero_point = layer(shape, with_mean=with_mean)
    latent, column, row, scale, mean = learned
    weight = latent_weight(latent, columns, column, row, scale, zero_point, mean, softness=softness, dtype=dtype)
    grad = torch.randn(shape, generator=torch.Generator().manual_seed(1)).to(dtype)
    return [weight.detach(), *torch.autograd.grad(weight, learned, grad)]


@pytest.mark.parametrize("softness", [0.0, 0.3, 1.0])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("shape", SHAPES)
def test_latent_weights_are_those_of_torch(
    shape: tuple[int, int], dtype: torch.dtype, softness: float, request: pytest.FixtureRequest
) -> None:
    assert native.load("latent")
    found = weight_and_gradients(shape, dtype, softness)
    request.getfixturevalue("torch_alone")
    expected = weight_and_gradients(shape, dtype, softness)
    if softness == 0:  # element by element, and so bit by bit
        assert all(torch.equal(a, b) for a, b in zip(found[:2], expected[:2], strict=True))
    for a, b in zip(found, expected, strict=True):
        torch.testing.assert_close(a, b, rtol=1e-2 if a.dtype == torch.bfloat16 else 1e-4, atol=1e-3)


def test_gradients_of_factors_are_those_of_autograd() -> None:
    learned, columns, zero_point = layer((7, 97), with_mean=True)
    latent, column, row, scale, mean = learned
    found = weight_and_gradients((7, 97), torch.float32, 0.0)[2:]
    ranged = columns.ranged > 0
    code = torch.minimum(latent.detach().clamp(min=0), columns.levels).round()
    cell = torch.where(ranged, scale, row * column * columns.step)
    weight = cell * (code - torch.where(ranged, zero_point, columns.center)) + torch.where(ranged, 0.0, mean * column)
    grad = torch.randn(7, 97, generator=torch.Generator().manual_seed(1))
    for a, b in zip(found, torch.autograd.grad(weight, learned[1:], grad), strict=True):
        torch.testing.assert_close(a, b, rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize("threads", [1, 2, 3])
def test_bits_do_not_depend_on_threads(threads: int) -> None:
    before = torch.get_num_threads()
    torch.set_num_threads(threads)
    try:
        found = weight_and_gradients((192, 1536), torch.bfloat16, 0.0)
    finally:
        torch.set_num_threads(before)
    expected = weight_and_gradients((192, 1536), torch.bfloat16, 0.0)
    assert all(torch.equal(a, b) for a, b in zip(found, expected, strict=True))


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize(("n", "vocabulary"), [(1, 1), (5, 97), (130, 4099)])
def test_divergences_are_those_of_torch(
    n: int, vocabulary: int, dtype: torch.dtype, request: pytest.FixtureRequest
) -> None:
    generator = torch.Generator().manual_seed(0)
    student, teacher = ((6 * torch.randn(n, vocabulary, generator=generator)).to(dtype) for _ in range(2))
    student[0, 0] = 300.0  # exponentials of hundreds below the largest are nothing
    assert native.load("divergence")
    total, gradient = divergence(student, teacher)
    request.getfixturevalue("torch_alone")
    expected, of_torch = divergence(student, teacher)
    torch.testing.assert_close(total, expected, rtol=1e-5, atol=1e-5)
    torch.testing.assert_close(gradient, of_torch, rtol=1e-2 if dtype == torch.bfloat16 else 1e-5, atol=1e-7)
    assert divergence(teacher, teacher)[0].abs() < 1e-6


@pytest.mark.parametrize("value", [float("nan"), float("inf")])
def test_a_logit_that_is_no_number_is_seen_in_the_divergence(value: float) -> None:
    student, teacher = torch.zeros(2, 50), torch.zeros(2, 50)
    student[1, 17] = value
    assert not divergence(student, teacher)[0].isfinite()


def test_other_dtypes_take_torch() -> None:
    learned, columns, zero_point = layer((7, 97), with_mean=False)
    latent, column, row, scale, mean = learned
    half = latent_weight(latent, columns, column, row, scale, zero_point, mean, dtype=torch.float16)
    full = latent_weight(latent, columns, column, row, scale, zero_point, mean)
    assert half.dtype == torch.float16
    torch.testing.assert_close(half.float(), full, rtol=1e-3, atol=1e-3)
    assert latents._compiled(latent, column) and not latents._compiled(latent.T, column)


PROGRAM = """
import logging, torch
logging.basicConfig(format="%(message)s")
from ptq161.kernels.divergence import divergence
for _ in range(2):
    print(float(divergence(torch.zeros(1, 2), torch.tensor([[0.0, 50.0]]))[0]))
"""


@pytest.mark.parametrize(
    ("environment", "says"),
    [
        ({"CXX": "", "PATH": "/nowhere"}, "no C++ compiler is on the path"),
        ({"CXX": "false"}, "the compiler ends with 1"),
        ({"PTQ161_CACHE": "/proc/nowhere"}, "No such file or directory: '/proc/nowhere"),
    ],
)
def test_without_a_compiler_torch_takes_over_and_one_line_says_so(
    environment: dict[str, str], says: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    for name, value in ({"PTQ161_CACHE": str(tmp_path)} | environment).items():
        monkeypatch.setenv(name, value)
    done = subprocess.run([sys.executable, "-c", PROGRAM], capture_output=True, text=True, check=True)
    assert [round(float(line), 4) for line in done.stdout.split()] == [0.6931, 0.6931]
    (line,) = (line for line in done.stderr.splitlines() if "is not compiled" in line)
    assert line.startswith("divergence.cpp") and says in line


def test_a_source_that_does_not_compile_is_named_with_the_first_error(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    monkeypatch.setenv("PTQ161_CACHE", str(tmp_path))
    monkeypatch.setattr(native, "__file__", str(tmp_path / "native.py"))
    (tmp_path / "broken.cpp").write_text("int main() { return nothing; }\n")
    assert not native.load("broken")
    (line,) = caplog.messages
    assert line.startswith("broken.cpp is not compiled") and "'nothing' was not declared" in line
    assert [path.name for path in (tmp_path / "kernels").iterdir()] == []  # nothing half-made is left
