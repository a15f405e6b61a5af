"""The allotment of bits against brute force, and its refusals."""

from __future__ import annotations

import itertools
import math

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from ptq161.errors import UserError
from ptq161.methods.waterfill.allotment import DISTORTION, allot, channel_energy

TIERS = [[1, 2, 4], [1, 4], [1, 2, 3, 4], [2, 3], [1, 2]]


def error(energy: list[float], bits: tuple[int, ...]) -> float:
    return math.fsum(e * DISTORTION[b] for e, b in zip(energy, bits, strict=True))


def price(cost: list[int], bits: tuple[int, ...]) -> int:
    return sum(c * b for c, b in zip(cost, bits, strict=True))


@settings(deadline=None, max_examples=200)
@given(
    channels=st.lists(
        st.tuples(st.one_of(st.just(0.0), st.floats(1e-6, 1e6)), st.integers(1, 5)), min_size=1, max_size=6
    ),
    tiers=st.sampled_from(TIERS),
    share=st.floats(0, 1),
)
def test_no_allotment_that_costs_as_little_has_less_error(
    channels: list[tuple[float, int]], tiers: list[int], share: float
) -> None:
    energy, cost = [e for e, _ in channels], [c for _, c in channels]
    budget = tiers[0] + share * (tiers[-1] - tiers[0])
    found = tuple(allot(torch.tensor(energy), budget, tiers, torch.tensor(cost)).tolist())
    spent, least = price(cost, found), error(energy, found)
    assert spent <= budget * sum(cost) * (1 + 1e-9)
    for other in itertools.product(tiers, repeat=len(energy)):
        if price(cost, other) <= spent:
            assert error(energy, other) >= least * (1 - 1e-9)


@settings(deadline=None, max_examples=60)
@given(n=st.integers(1, 60), share=st.floats(0, 1), seed=st.integers(0, 2**32), equal=st.booleans())
def test_less_than_one_step_is_left_of_the_budget(n: int, share: float, seed: int, equal: bool) -> None:
    energy = torch.ones(n) if equal else torch.rand(n, generator=torch.Generator().manual_seed(seed)) + 0.01
    budget = 1 + 3 * share
    bits = allot(energy, budget)
    left = budget * n - int(bits.sum())
    assert left >= -1e-6
    assert left < 2 or bool((bits == 4).all())


def test_more_energy_never_has_fewer_bits() -> None:
    energy = torch.rand(200, generator=torch.Generator().manual_seed(0)).sort().values
    for budget in (1.0, 1.25, 1.6, 2.0, 2.5, 4.0):
        bits = allot(energy, budget)
        assert torch.equal(bits, bits.sort().values)
        assert abs(float(bits.double().mean()) - budget) < 0.02


def test_a_cheap_channel_comes_first() -> None:
    assert allot(torch.tensor([1.0, 1.0]), 1.5, [1, 2], torch.tensor([3, 1])).tolist() == [1, 2]


def test_the_mask_of_the_paper_is_the_case_of_two_tiers() -> None:
    energy = torch.rand(100, generator=torch.Generator().manual_seed(0))
    bits = allot(energy, 1.6, [1, 4])
    assert int((bits == 4).sum()) == 20
    assert set(bits[energy >= energy.sort(descending=True).values[19]].tolist()) == {4}


def test_energy_is_homogeneous_and_counts_gradients() -> None:
    weight, mean_square = torch.randn(6, 5), torch.rand(5)
    gradient = torch.rand(6)
    expected = [float(mean_square[j] * (gradient * weight[:, j] ** 2).sum()) for j in range(5)]
    assert channel_energy(weight, mean_square, gradient).tolist() == pytest.approx(expected, rel=1e-5)
    assert torch.allclose(channel_energy(3 * weight, mean_square), 9 * channel_energy(weight, mean_square))


@pytest.mark.parametrize("budget", [0.9, 4.1, math.nan])
def test_budgets_that_the_tiers_cannot_reach(budget: float) -> None:
    with pytest.raises(UserError, match=r"^method\.bits=\S+: tiers of 1, 2, 4 bits reach from 1 to 4; choose a budget"):
        allot(torch.ones(3), budget)


def test_energies_that_are_not_finite() -> None:
    with pytest.raises(UserError, match="the energy of a channel is NaN or infinite"):
        allot(torch.tensor([1.0, math.nan]), 1.6)
