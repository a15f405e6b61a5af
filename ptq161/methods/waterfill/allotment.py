"""Allotting bits to input channels: reverse water-filling on the energy that each channel contributes.

A channel j of a linear contributes ``e_j = H_jj ||W_:j||^2`` to the squared error of the output, were it left out, and
about ``e_j D(b)`` when it has codes of b bits, with ``D(b)`` the distortion of a b-bit code of a unit Gaussian. Least
error at a mean of ``budget`` bits is a convex allocation: for a water level ``lambda`` each channel takes the bits that
minimize ``e_j D(b) + lambda c_j b``, where ``c_j`` is what a bit of it costs (the weights in it); the level follows
from the budget. This is the reverse water-filling of rate-distortion theory (Cover and Thomas, Section 10.3.3) on
scalar codes with a few levels; the one-dimensional mask of PTQ1.61 (Section 3.2) is the case of two tiers, 1 and 4.
"""

from __future__ import annotations

import itertools
from collections.abc import Sequence

import torch
from torch import Tensor

from ptq161.errors import UserError
from ptq161.packed.allotted import check_tiers

DISTORTION = {1: 0.363, 2: 0.1175, 3: 0.0345, 4: 0.0115}
"""Mean squared error of a code of so many bits of a unit Gaussian: Lloyd-Max (Max 1960), and a range for 4 bits."""


def channel_energy(weight: Tensor, hessian_diagonal: Tensor, output_gradient_energy: Tensor | None = None) -> Tensor:
    """Return the energy of each input channel: ``H_jj sum_i G_ii W_ij^2``.

    Args:
        weight: ``[out, in]``.
        hessian_diagonal: ``[in]``, mean square of each input, up to a factor that all channels share.
        output_gradient_energy: ``[out]``, ``G_ii = E[g_i^2]`` of the loss's gradient at each output, which makes
            linears comparable with each other; None is one everywhere.

    Returns:
        ``[in]`` float64, not negative.

    Example:
        >>> weight, mean_square = torch.tensor([[1.0, 2.0], [0.0, 1.0]]), torch.tensor([4.0, 1.0])
        >>> channel_energy(weight, mean_square).tolist()
        [4.0, 5.0]
        >>> channel_energy(weight, mean_square, torch.tensor([1.0, 3.0])).tolist()
        [4.0, 7.0]
    """
    squares = weight.double().square()
    if output_gradient_energy is not None:
        squares = squares * output_gradient_energy.double().unsqueeze(1)
    return squares.sum(0) * hessian_diagonal.double()


def allot(energy: Tensor, budget: float, tiers: Sequence[int] = (1, 2, 4), cost: Tensor | None = None) -> Tensor:
    """Allot bits to channels: the least ``sum(energy * D(bits))`` that their mean of at most ``budget`` bits allows.

    The result is an exact optimum of the Lagrangian: no allotment that costs as little has less error. Less than one
    step of one channel is left of the budget. Channels of equal merit get their bits in their order.

    Args:
        energy: ``[n]``, not negative.
        budget: bits per weight, from the lowest to the highest tier.
        tiers: bits that a channel may have, rising.
        cost: ``[n]``, weights in each channel; None is the same for all.

    Returns:
        ``[n]`` int64.

    Raises:
        UserError: the tiers cannot reach the budget, or an energy is not finite.

    Example:
        >>> energy = torch.tensor([8.0, 4.0, 2.0, 1.0, 10.0])
        >>> allot(energy, budget=1.6).tolist(), allot(energy, budget=1.6, tiers=[1, 4]).tolist()
        ([2, 2, 1, 1, 2], [1, 1, 1, 1, 4])
        >>> allot(torch.ones(5), budget=1.6, tiers=[1, 2]).tolist()
        [2, 2, 2, 1, 1]
        >>> allot(torch.ones(2), budget=1.6, tiers=[2, 4])
        Traceback (most recent call last):
            ...
        ptq161.errors.UserError: method.bits=1.6: tiers of 2, 4 bits reach from 2 to 4; choose a budget between them.
    """
    tiers = list(tiers)
    check_tiers(tiers)
    check_budget(budget, tiers)
    if not bool(torch.isfinite(energy).all()):
        raise UserError("the energy of a channel is NaN or infinite; check the weights and the activations.")
    energy = energy.double().flatten()
    cost = torch.ones_like(energy) if cost is None else cost.double().flatten()
    # Each step to the next tier gains an amount per bit that falls from step to step, as D is convex: the steps with
    # the largest gains come in their order, until one does not fit. The gain of the last one is the water level.
    pairs = list(itertools.pairwise(tiers))
    steps = energy.new_tensor([after - before for before, after in pairs])
    fall = energy.new_tensor([DISTORTION[before] - DISTORTION[after] for before, after in pairs])
    gain = (energy / cost).unsqueeze(1) * (fall / steps)
    price = cost.unsqueeze(1) * steps
    order = gain.flatten().argsort(descending=True, stable=True)
    # Half of the smallest step, against what summing in float64 loses.
    room = (budget - tiers[0]) * cost.sum() + 0.5 * cost.min() * 1e-6
    taken = torch.zeros_like(gain, dtype=torch.bool).flatten()
    taken[order] = price.flatten()[order].cumsum(0) <= room
    return torch.tensor(tiers, device=energy.device)[taken.view_as(gain).sum(1)]


def check_budget(budget: float, tiers: Sequence[int]) -> None:
    """Check that a mean of ``budget`` bits lies between the tiers.

    Raises:
        UserError: it does not.

    Example:
        >>> check_budget(1.6, [1, 2, 4])
    """
    if not tiers[0] <= budget <= tiers[-1]:
        raise UserError(
            f"method.bits={budget:g}: tiers of {', '.join(map(str, tiers))} bits reach from {tiers[0]} to {tiers[-1]}; "
            "choose a budget between them."
        )
