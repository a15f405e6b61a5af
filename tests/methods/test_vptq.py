from __future__ import annotations

import functools
import itertools
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor
from transformers import PreTrainedModel

from ptq161.errors import UserError
from ptq161.kernels.codebook import nearest
from ptq161.methods.compensation import inverse_factor, weighted_error
from ptq161.methods.vptq import VPTQ, kmeans, quantize_weight
from ptq161.methods.vptq.codebooks import Codebooks, Part, Sizes, weighted_vectors
from ptq161.methods.vptq.kmeans import draw_centroids
from ptq161.methods.vptq.method import regularized
from ptq161.packed.vector import VectorWeight
from tests.conftest import TINY
from tests.methods.layers import assert_golden, layer, packed_linears

CASES: dict[str, dict[str, Any]] = {
    "plain": {"vector_length": 4, "n_centroids": 32, "column_block": 64},
    "residual": {
        "vector_length": 4,
        "n_centroids": 32,
        "residual_centroids": 16,
        "permute": True,
        "column_block": 64,
    },
    "outlier": {
        "vector_length": 4,
        "n_centroids": 32,
        "outlier_share": 0.05,
        "outlier_vector_length": 2,
        "outlier_centroids": 24,
        "groups": 2,
        "permute": True,
        "column_block": 64,
    },
    "outlier_residual": {
        "vector_length": 6,
        "n_centroids": 24,
        "residual_centroids": 12,
        "outlier_share": 0.02,
        "outlier_centroids": 8,
        "permute": True,
    },
    "padded": {"vector_length": 4, "n_centroids": 16, "column_block": 64},
    "norm": {"vector_length": 4, "n_centroids": 32, "normalize": True, "column_block": 64},
    "dead": {"vector_length": 4, "n_centroids": 32, "column_block": 64},
}


@functools.cache
def vectors_of(folder: Path, case: str) -> dict[str, Tensor]:
    with np.load(folder / "vptq" / "vectors.npz") as stored:
        return {
            key.partition(".")[2]: torch.from_numpy(np.asarray(stored[key]))
            for key in stored
            if key.startswith(f"{case}.")
        }


def as_released(given: dict[str, Tensor], case: str) -> VectorWeight:
    starts = {name: tensor for name, tensor in given.items() if "init_" in name}
    return quantize_weight(given["W"], given["hessian"], initial_centroids=starts, scale_dtype="float32", **CASES[case])


def assert_centroids(actual: Tensor, expected: Tensor) -> None:
    assert (actual - expected).abs().max() <= 1e-5 * expected.abs().max()


@pytest.mark.parametrize("case", CASES)
def test_golden_vectors(golden_dir: Path, case: str) -> None:
    given = vectors_of(golden_dir, case)
    packed = as_released(given, case)
    assert_golden(packed.dequantize(), given["q"])
    sizes = [
        weighted_error(given["W"], q, given["hessian"]) for q in (packed.dequantize(), torch.zeros_like(given["q"]))
    ]
    assert sizes[0] / sizes[1] == pytest.approx(float(given["relative_error"]), rel=1e-3)
    assert packed.outliers == int(given["outlier_size"])
    for group, centroids in enumerate(packed.centroids):
        assert_centroids(centroids, given[f"centroids_{group + 1}"])
    if packed.residual_centroids is not None:
        assert_centroids(packed.residual_centroids[0], given["res_centroids_1"])
    if packed.outlier_centroids is not None:
        assert_centroids(packed.outlier_centroids[0], given["centroids_0"])
    if packed.column_scale is not None and packed.column_offset is not None:
        torch.testing.assert_close(packed.column_scale, given["scale"])
        torch.testing.assert_close(packed.column_offset, given["offset"])


@pytest.mark.parametrize("case", CASES)
def test_golden_indices(golden_dir: Path, case: str) -> None:
    given = vectors_of(golden_dir, case)
    packed, in_features = as_released(given, case), given["W"].shape[1]
    order = given.get("perm", torch.arange(in_features)).long()
    outliers, labels = int(given["outlier_size"]), packed.column_labels()
    inner = order[outliers:]
    # The vectors have the columns in the order of quantization, group by group.
    places = torch.argsort(torch.argsort(inner))
    found = packed.unpacked_indices()[:, places]
    expected = torch.cat([given[f"indices_{i + 1}"] for i in range(len(packed.centroids))], dim=1)
    assert (found != expected).float().mean() <= 1e-3
    assert set(order[:outliers].tolist()) == set((labels == len(packed.centroids)).nonzero().flatten().tolist())


@pytest.mark.parametrize("case", ["plain", "padded", "dead"])
def test_golden_clusters(golden_dir: Path, case: str) -> None:
    given = vectors_of(golden_dir, case)
    vectors, weights = weighted_vectors(given["W"], given["hessian"].diagonal(), given["init_1"].shape[1])
    centroids = kmeans(vectors, weights, given["init_1"], iterations=1000)
    labels, used = nearest(vectors, centroids), weights > 0
    assert (labels != given["kmeans_labels_1"])[used].float().mean() <= 1e-3
    inertia = float((weights * (vectors - centroids[labels]).square().sum(1)).sum())
    assert inertia == pytest.approx(float(given["inertia_1"]), rel=1e-4)


def test_kmeans_never_raises_the_error_and_comes_to_rest() -> None:
    vectors, weights = torch.randn(500, 3), torch.rand(500)
    centroids, errors = vectors[:20], []
    for _ in range(100):
        errors.append(float((weights * (vectors - centroids[nearest(vectors, centroids)]).square().sum(1)).sum()))
        centroids = kmeans(vectors, weights, centroids, iterations=1)
    assert all(after <= before + 1e-4 for before, after in itertools.pairwise(errors))
    assert errors[-1] == errors[-2] < 0.9 * errors[0]
    torch.testing.assert_close(kmeans(vectors, weights, vectors[:20], iterations=1000), centroids)


def test_kmeans_stops_early_where_little_is_won() -> None:
    vectors, weights = torch.randn(500, 3), torch.ones(500)
    early, late = (kmeans(vectors, weights, vectors[:20], tolerance=t) for t in (0.5, 0.0))
    assert not torch.equal(early, late)


def test_centroids_without_weight_stay() -> None:
    vectors, far = torch.tensor([[0.0], [1.0], [50.0]]), torch.tensor([[0.5], [100.0]])
    assert kmeans(vectors, torch.tensor([1.0, 1.0, 0.0]), far).tolist() == far.tolist()


def test_vectors_weights_and_centroids_that_do_not_belong_together() -> None:
    with pytest.raises(UserError, match=r"give \[n, v\], \[n\] and \[k, v\]"):
        kmeans(torch.zeros(4, 2), torch.zeros(4, 2), torch.zeros(2, 2))


def test_a_start_has_no_vector_twice_while_there_are_enough() -> None:
    vectors, weights = torch.arange(10.0).unsqueeze(1), torch.ones(10).index_fill(0, torch.tensor([4]), 0.0)
    start = draw_centroids(vectors, weights, 9, torch.Generator())
    assert sorted(start.flatten().tolist()) == [0, 1, 2, 3, 5, 6, 7, 8, 9]
    assert draw_centroids(vectors, weights, 12, torch.Generator()).shape == (12, 1)
    assert not draw_centroids(vectors, torch.zeros(10), 3, torch.Generator()).any()


def test_bytes_and_nominal_bits() -> None:
    weight, hessian = layer(0, out_features=24, in_features=100)
    settings: dict[str, Any] = {"vector_length": 4, "n_centroids": 32, "residual_centroids": 8}
    packed = quantize_weight(weight, regularized(hessian), **settings)
    n = 6 * 100
    assert packed.nbytes == n * 5 // 8 + -(-n * 3 // 8) + 2 * 4 * (32 + 8)
    assert VPTQ(vector_length=4, centroids=32, residual_centroids=8).nominal_bits() == 2.0
    assert (VPTQ().nominal_bits(), VPTQ(vector_length=8, centroids=256).nominal_bits()) == (2.0, 1.0)
    permuted = quantize_weight(weight, regularized(hessian), permute=True, **settings)
    assert permuted.labels is None and permuted.nbytes == packed.nbytes
    options = {"outlier_share": 0.02, "outlier_vector_length": 2, "outlier_centroids": 16}
    with_outliers = quantize_weight(weight, regularized(hessian), permute=True, **settings, **options)
    assert with_outliers.labels is not None and len(with_outliers.labels) == 13  # a bit for each column


def test_what_is_stored_is_what_was_compensated_for() -> None:
    weight, hessian = layer(1, out_features=16, in_features=40)
    packed = quantize_weight(weight, regularized(hessian), vector_length=4, n_centroids=16)
    factor, stored = inverse_factor(regularized(hessian)), packed.dequantize()
    work = weight.clone()
    for j in range(40):
        vectors = work[:, j].view(4, 4)
        expected = packed.centroids[0].float()[nearest(vectors, packed.centroids[0].float())].flatten()
        torch.testing.assert_close(stored[:, j], expected)
        work[:, j:] -= torch.outer((work[:, j] - stored[:, j]) / factor.upper[j, j], factor.upper[j, j:])


def test_the_error_falls_with_bits_residuals_and_compensation() -> None:
    errors = dict.fromkeys(["k 16", "k 64", "k 16 + 16", "k 16, not compensated"], 0.0)
    for seed in range(5):
        weight, hessian = layer(seed, out_features=48)
        hessian = regularized(hessian)
        found = {
            "k 16": quantize_weight(weight, hessian, vector_length=4, n_centroids=16),
            "k 64": quantize_weight(weight, hessian, vector_length=4, n_centroids=64),
            "k 16 + 16": quantize_weight(weight, hessian, vector_length=4, n_centroids=16, residual_centroids=16),
            "k 16, not compensated": quantize_weight(
                weight, hessian.diagonal().diag(), vector_length=4, n_centroids=16
            ),
        }
        for name, packed in found.items():
            errors[name] += weighted_error(weight, packed.dequantize(), hessian)
    assert errors["k 16 + 16"] < errors["k 64"] < errors["k 16"] < 0.8 * errors["k 16, not compensated"]


def test_rows_of_very_different_size_gain_from_row_scales() -> None:
    weight, hessian = layer(2, out_features=48)
    weight *= torch.logspace(-1, 1, 48).unsqueeze(1)
    errors = [
        float(((packed.dequantize() - weight) / weight.norm(dim=1, keepdim=True)).norm())
        for packed in (
            quantize_weight(weight, regularized(hessian), vector_length=4, n_centroids=64, row_scales=given)
            for given in (False, True)
        )
    ]
    assert errors[1] < 0.7 * errors[0]


def test_a_matched_hessian_is_that_of_the_normalized_weight() -> None:
    """Normalization then changes the codebooks alone; without it, the loss is made good in other units."""
    weight, hessian = layer(3, out_features=48)
    weight *= torch.logspace(-1, 1, 128)
    errors = [
        weighted_error(
            weight,
            quantize_weight(
                weight, regularized(hessian), vector_length=4, n_centroids=64, normalize=True, match_hessian=given
            ).dequantize(),
            hessian,
        )
        for given in (False, True)
    ]
    assert errors[1] < errors[0]


def test_dead_channels_and_weights_of_zero() -> None:
    weight, hessian = layer(4, dead=4)
    for options in ({}, {"normalize": True}, {"row_scales": True}):
        given: dict[str, Any] = {"vector_length": 4, "n_centroids": 8, **options}
        assert torch.isfinite(quantize_weight(weight, hessian, **given).dequantize()).all()
        assert not quantize_weight(torch.zeros(6, 10), torch.eye(10), **given).dequantize().any()
        assert torch.isfinite(quantize_weight(weight, torch.zeros(128, 128), **given).dequantize()).all()
    weight[3] = 0
    packed = quantize_weight(weight, regularized(hessian), vector_length=4, n_centroids=8, row_scales=True)
    assert not packed.dequantize()[3].any()


def test_a_seed_decides_everything() -> None:
    weight, hessian = layer(5)
    before = weight.clone(), hessian.clone()
    first, again, other = (
        quantize_weight(
            weight, hessian, vector_length=4, n_centroids=16, generator=torch.Generator().manual_seed(seed)
        ).dequantize()
        for seed in (1, 1, 2)
    )
    assert torch.equal(first, again) and not torch.equal(first, other)
    assert torch.equal(weight, before[0]) and torch.equal(hessian, before[1])


def test_a_shared_codebook_is_that_of_the_stacked_weight() -> None:
    weight, hessian = layer(0, out_features=24, in_features=32)
    factor, columns = inverse_factor(regularized(hessian)), [slice(0, 0), slice(0, 32)]
    starts = {"init_1": torch.randn(8, 2), "res_init_1": 0.1 * torch.randn(3, 2)}
    sizes = Sizes(2, 8, 3, 2, 0, 100, 0.0, 16, "float32")
    together, stacked = (Codebooks(sizes, torch.Generator(), starts) for _ in range(2))
    found = together.quantize([Part(weight[:16], factor, columns), Part(weight[16:], factor, columns)])
    (expected,) = stacked.quantize([Part(weight, factor, columns)])
    for stage, other in zip(together.stages, stacked.stages, strict=True):
        torch.testing.assert_close(stage[1], other[1])
    for i in (1, 2):
        assert torch.equal(torch.cat([indices[i] for indices in found]), expected[i])


@pytest.mark.parametrize("per", ["linear", "input", "block"])
@pytest.mark.parametrize("architecture", TINY)
def test_every_architecture(architecture: str, per: str, tiny_model: Callable[..., PreTrainedModel]) -> None:
    method = VPTQ(vector_length=5, centroids=24, residual_centroids=6, permute=True, iterations=3, codebook_per=per)
    first, second = (packed_linears(tiny_model(architecture), method) for _ in range(2))
    assert first and all(torch.equal(first[name].dequantize(), second[name].dequantize()) for name in first)


@pytest.mark.parametrize(
    ("options", "sentence"),
    [
        ({"vector_length": 0}, "method.vector_length=0: use at least 1"),
        ({"outlier_vector_length": 0}, "method.outlier_vector_length=0: use at least 1"),
        ({"groups": 0}, "method.groups=0: use at least 1"),
        ({"iterations": -1}, "method.iterations=-1: use at least 0"),
        ({"tolerance": -1.0}, "method.tolerance=-1.0: use at least 0"),
        ({"refit_steps": -1}, "method.refit_steps=-1: use at least 0"),
        ({"refit_lr": float("nan")}, "method.refit_lr=nan: use a finite learning rate"),
        ({"refit_scale_lr": -1.0}, "method.refit_scale_lr=-1.0: use a finite learning rate"),
        ({"centroids": 1}, "method.centroids=1: use 2 to 65536 centroids"),
        ({"centroids": 65537}, "method.centroids=65537: use 2 to 65536 centroids"),
        ({"residual_centroids": 1}, "method.residual_centroids=1: use 2 to 65536 centroids"),
        ({"outlier_centroids": -2}, "method.outlier_centroids=-2: use 2 to 65536 centroids"),
        ({"outlier_share": 1.0, "outlier_centroids": 4}, r"method.outlier_share=1.0: use a share in \[0, 1\)"),
        ({"outlier_share": -0.1}, "method.outlier_share=-0.1: use a share"),
        ({"outlier_share": 0.1}, "set method.outlier_centroids, or method.outlier_share=0"),
        ({"match_hessian": True}, "set method.normalize=true"),
    ],
)
def test_values_out_of_range(options: dict[str, Any], sentence: str) -> None:
    with pytest.raises(UserError, match=sentence):
        VPTQ(**options)


def test_groups_that_do_not_divide() -> None:
    weight, hessian = layer(6, in_features=10)
    settings: dict[str, Any] = {"vector_length": 4, "n_centroids": 4, "groups": 3}
    with pytest.raises(UserError, match=r"method\.groups=3: 10 columns do not fall into as many equal groups"):
        quantize_weight(weight, hessian, **settings)
    packed = quantize_weight(weight, hessian, outlier_centroids=4, **settings)
    assert packed.outliers == 1 and packed.labels is None
    with pytest.raises(UserError, match=r"method\.groups=11: 10 columns"):
        quantize_weight(weight, hessian, outlier_centroids=4, **{**settings, "groups": 11})


def test_a_start_of_another_shape() -> None:
    weight, hessian = layer(7)
    with pytest.raises(UserError, match="do not belong together"):
        quantize_weight(
            weight, hessian, vector_length=4, n_centroids=8, initial_centroids={"init_1": torch.zeros(8, 3)}
        )


def test_weights_and_hessians_that_are_not_finite() -> None:
    weight, hessian = layer(8)
    with pytest.raises(UserError, match="a weight is NaN"):
        quantize_weight(weight * torch.nan, hessian, vector_length=4, n_centroids=8)
    with pytest.raises(UserError, match="no damping mends"):
        quantize_weight(weight, hessian * torch.inf, vector_length=4, n_centroids=8)
    with pytest.raises(UserError, match="does not belong to a weight"):
        quantize_weight(weight, hessian[:5, :5], vector_length=4, n_centroids=8)
