"""Random numbers of a stage, and indices drawn by them."""

from __future__ import annotations

import pytest
import torch

from ptq161.errors import UserError
from ptq161.seeding import draw, stage_generator


def test_indices_are_drawn_as_often_as_their_probabilities_say() -> None:
    probabilities = torch.tensor([0.0, 0.2, 0.5, 0.0, 0.3, 0.0])
    drawn = draw(probabilities.repeat(200_000, 1), stage_generator(0, "draw"))
    shares = torch.bincount(drawn, minlength=6) / len(drawn)
    assert (shares[probabilities == 0] == 0).all()
    torch.testing.assert_close(shares, probabilities, atol=0.005, rtol=0)  # five standard errors


def test_rows_are_drawn_independently_and_by_the_seed() -> None:
    probabilities = torch.full((1000, 8), 1 / 8)
    first, second = (draw(probabilities, stage_generator(seed, "draw")) for seed in (0, 1))
    assert torch.equal(first, draw(probabilities, stage_generator(0, "draw")))
    assert 50 < (first == second).sum() < 200  # an eighth of them
    assert len(first.unique()) == 8


def test_a_sum_other_than_one_changes_nothing() -> None:
    probabilities = torch.rand(500, 40, generator=torch.Generator().manual_seed(0))
    assert torch.equal(draw(probabilities, stage_generator(0)), draw(8 * probabilities, stage_generator(0)))


@pytest.mark.parametrize("bad", [float("nan"), float("inf")])
def test_probabilities_that_are_not_finite_are_refused(bad: float) -> None:
    with pytest.raises(UserError, match="NaN or infinite"):
        draw(torch.tensor([[0.5, 0.5], [bad, 0.5]]), stage_generator(0))
