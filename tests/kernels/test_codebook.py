"""Codebooks: by hand, and the compiled operators the same as torch's on any number of threads."""

from __future__ import annotations

from collections.abc import Iterator

import pytest
import torch
from torch import Tensor

from ptq161.kernels import codebook, native
from ptq161.packed.trainable import scale_tensors
from ptq161.packed.vector import Coded, Norm, VectorWeight


def vectors_of(length: int, count: int, n: int) -> tuple[Tensor, Tensor, Tensor]:
    generator = torch.Generator().manual_seed(length)
    vectors = torch.randn(n, length, generator=generator)
    return vectors, torch.randn(count, length, generator=generator), torch.rand(n, generator=generator).double()


def weight_of(length: int, size: int, groups: int, shape: tuple[int, int], *, row_scales: bool = True) -> VectorWeight:
    generator = torch.Generator().manual_seed(length)
    rows = -(-shape[0] // length)
    indices = torch.randint(size, (rows, shape[1]), generator=generator)
    norm = Norm(row_scale=torch.rand(shape[0], 1, generator=generator)) if row_scales else None
    return VectorWeight.pack(Coded(torch.randn(groups, size, length, generator=generator), indices), shape, norm=norm)


def weight_and_gradients(packed: VectorWeight) -> list[Tensor]:
    trained = {name: tensor.float().requires_grad_() for name, tensor in scale_tensors(packed).items()}
    weight = packed.with_tensors(trained).dequantize()
    upstream = torch.arange(float(weight.numel())).view_as(weight).cos()
    return [weight.detach(), *torch.autograd.grad(weight, list(trained.values()), upstream)]


@pytest.fixture(params=[1, 2, 3])
def threads(request: pytest.FixtureRequest) -> Iterator[None]:
    before = torch.get_num_threads()
    torch.set_num_threads(request.param)
    yield
    torch.set_num_threads(before)


@pytest.mark.parametrize(("length", "count", "n"), [(1, 2, 1), (3, 7, 1000), (4, 64, 4097), (6, 512, 999), (8, 5, 33)])
def test_clusters_are_those_of_torch(length: int, count: int, n: int, request: pytest.FixtureRequest) -> None:
    assert native.load("codebook")
    vectors, centroids, weights = vectors_of(length, count, n)
    labels = codebook.nearest(vectors, centroids)
    mass, sums = codebook.cluster_sums(vectors, weights, labels, count)
    request.getfixturevalue("torch_alone")
    distances = torch.cdist(vectors.double(), centroids.double())
    assert torch.allclose(distances.gather(1, labels.unsqueeze(1)).squeeze(1), distances.amin(1))
    assert torch.equal(codebook.nearest(vectors, centroids), labels)
    expected = codebook.cluster_sums(vectors, weights, labels, count)
    torch.testing.assert_close((mass, sums), expected)


@pytest.mark.parametrize("alone", [False, True])
def test_of_equally_near_centroids_the_first_is_taken(alone: bool, request: pytest.FixtureRequest) -> None:
    if alone:
        request.getfixturevalue("torch_alone")
    centroids = torch.tensor([[5.0, 0.0], [1.0, 1.0], [1.0, 1.0], [-1.0, -1.0]])
    assert codebook.nearest(torch.tensor([[1.0, 1.0], [0.0, 0.0]]), centroids).tolist() == [1, 1]
    assert codebook.nearest(torch.zeros(0, 2), centroids).tolist() == []


def test_other_dtypes_are_left_to_torch() -> None:
    vectors, centroids, weights = vectors_of(3, 7, 100)
    labels = codebook.nearest(vectors, centroids)
    assert torch.equal(codebook.nearest(vectors.double(), centroids.double()), labels)
    found = codebook.cluster_sums(vectors.double(), weights, labels, 7)
    torch.testing.assert_close(found, codebook.cluster_sums(vectors, weights, labels, 7))


@pytest.mark.parametrize("row_scales", [False, True])
@pytest.mark.parametrize(
    ("length", "size", "groups", "shape"),
    [(1, 2, 1, (1, 1)), (4, 64, 1, (64, 48)), (6, 512, 1, (100, 33)), (8, 300, 3, (37, 30)), (5, 4, 2, (3, 8))],
)
def test_weights_and_gradients_are_those_of_torch(
    length: int,
    size: int,
    groups: int,
    shape: tuple[int, int],
    row_scales: bool,
    request: pytest.FixtureRequest,
) -> None:
    packed = weight_of(length, size, groups, shape, row_scales=row_scales)
    assert codebook.usable(packed.centroids, packed.indices)
    weight, *gradients = weight_and_gradients(packed)
    request.getfixturevalue("torch_alone")
    expected, *of_torch = weight_and_gradients(packed)
    assert torch.equal(weight, expected) and len(gradients) == 1 + row_scales
    torch.testing.assert_close(gradients, of_torch, rtol=1e-5, atol=1e-4)


def test_bits_do_not_depend_on_threads(threads: None) -> None:
    vectors, centroids, weights = vectors_of(4, 64, 20_000)
    labels = codebook.nearest(vectors, centroids)
    found = [
        labels,
        *codebook.cluster_sums(vectors, weights, labels, 64),
        *weight_and_gradients(weight_of(6, 100, 1, (600, 300))),
    ]
    torch.set_num_threads(1)
    again = [
        codebook.nearest(vectors, centroids),
        *codebook.cluster_sums(vectors, weights, labels, 64),
        *weight_and_gradients(weight_of(6, 100, 1, (600, 300))),
    ]
    assert all(torch.equal(a, b) for a, b in zip(found, again, strict=True))


def test_an_index_beyond_its_codebook_is_no_weight() -> None:
    packed = weight_of(2, 3, 1, (4, 8))
    broken = packed.with_tensors({"indices": torch.full_like(packed.indices, 255)})
    with pytest.raises(RuntimeError, match="an index is beyond its codebook"):
        broken.dequantize()
