"""Scores of salient channels: each against its formula on small weights, and what must not enter it."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor

from ptq161.errors import UserError
from ptq161.methods.base import ActivationScale
from ptq161.methods.ptq161 import channel_saliency, salient_mask
from ptq161.methods.ptq161.saliency import SALIENCIES, owq_sensitivity


def activation(x: Tensor) -> ActivationScale:
    return ActivationScale(x.abs().amax(0), x.abs().mean(0), x.square().mean(0))


@pytest.fixture
def weight() -> Tensor:
    return torch.randn(12, 20, generator=torch.Generator().manual_seed(3))


@pytest.fixture
def inputs() -> Tensor:
    return torch.randn(50, 20, generator=torch.Generator().manual_seed(4))


@pytest.mark.parametrize("kind", SALIENCIES)
def test_a_score_per_channel(kind: str, weight: Tensor, inputs: Tensor) -> None:
    scores = channel_saliency(kind, weight, activation(inputs), torch.Generator().manual_seed(0))
    assert scores.shape == (20,) and scores.dtype == torch.float32
    assert (scores >= 0).all() and len(scores.unique()) == 20


@pytest.mark.parametrize(("kind", "expected"), [("max", "maximum"), ("mean", "mean")])
def test_the_size_of_the_inputs(kind: str, expected: str, weight: Tensor, inputs: Tensor) -> None:
    assert torch.equal(channel_saliency(kind, weight, activation(inputs)), getattr(activation(inputs), expected))


@pytest.mark.parametrize("kind", ["max", "mean"])
def test_dead_channels_tie(kind: str) -> None:
    """The released code clamps from below: of two channels that are as good as dead, neither is ahead."""
    scores = channel_saliency(kind, torch.ones(2, 4), activation(torch.tensor([[1.0, 1e-6, 0.0, 1e-7]])))
    assert salient_mask(scores, 0.3).tolist() == [True, True, True, False]


def test_the_sensitivity_is_the_hessian_times_the_error_of_binarization(weight: Tensor, inputs: Tensor) -> None:
    mean = weight.mean(1, keepdim=True)
    scale = weight.abs().mean(1, keepdim=True)
    binary = torch.where(weight >= mean, scale, -scale) + mean
    hessian = 2 / 5 * inputs.T @ inputs  # of five sequences of ten tokens
    expected = hessian.diagonal() * (weight - binary).square().sum(0)
    scores = channel_saliency("hessian", weight, activation(inputs))
    torch.testing.assert_close(scores / scores.sum(), expected / expected.sum())


def test_the_sensitivity_grows_with_either_factor(weight: Tensor) -> None:
    even = owq_sensitivity(weight, torch.ones(20))
    louder = torch.ones(20)
    louder[7] = 3.0
    torch.testing.assert_close(owq_sensitivity(weight, louder), even * louder)
    outlier = weight.clone()
    outlier[2, 5] = 100.0
    assert owq_sensitivity(outlier, torch.ones(20)).argmax() == 5


def test_small_sensitivities_keep_their_order() -> None:
    """Squares of small numbers are far below the clamp of the activations."""
    weight = torch.randn(4, 10, generator=torch.Generator().manual_seed(0)) * 1e-3
    scores = owq_sensitivity(weight, torch.full((10,), 1e-4))
    assert float(scores.max()) < 1e-5 and int(salient_mask(scores, 0.2).sum()) == 3


def test_magnitude_is_the_norm_of_a_column(weight: Tensor, inputs: Tensor) -> None:
    scores = channel_saliency("magnitude", weight, activation(inputs))
    torch.testing.assert_close(scores, weight.square().sum(0).sqrt())


def test_an_unknown_kind_is_refused(weight: Tensor, inputs: Tensor) -> None:
    with pytest.raises(UserError, match=r"^method\.saliency=median: use one of max, mean, hessian, "):
        channel_saliency("median", weight, activation(inputs))
