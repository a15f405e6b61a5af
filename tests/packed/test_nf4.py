"""NormalFloat codes: the nearest level of each group, counted bits, and a rounding that repeats itself."""

from __future__ import annotations

import pytest
import torch

from ptq161.errors import UserError
from ptq161.methods.nf4 import quantize_weight
from ptq161.packed.nf4 import LEVELS, NF4Weight, nf4_parameters


def test_the_levels_are_quantiles_of_a_normal_distribution() -> None:
    """QLoRA, Appendix E: 8 positive and 7 negative quantiles from 0.9677 down, and zero."""
    top = 0.9677083
    normal = torch.distributions.Normal(0.0, 1.0)
    positive = normal.icdf(torch.linspace(top, 0.5, 9)[:-1])
    negative = -normal.icdf(torch.linspace(top, 0.5, 8)[:-1])
    levels = torch.cat([positive, negative, torch.zeros(1)]).sort().values
    torch.testing.assert_close(torch.tensor(LEVELS), levels / levels.max(), rtol=0, atol=1e-5)


def test_codes_are_the_nearest_levels() -> None:
    weight = torch.randn(6, 150)
    codes, scales = nf4_parameters(weight)
    assert scales.shape == (6, 3) and torch.equal(scales, scales.half().float())
    size = scales.repeat_interleave(64, 1)[:, :150]
    nearest = (weight.unsqueeze(-1) - size.unsqueeze(-1) * torch.tensor(LEVELS)).abs().argmin(-1)
    assert torch.equal(codes.long(), nearest)
    found = NF4Weight.pack(codes, scales).dequantize()
    assert torch.equal(found, torch.tensor(LEVELS)[nearest] * size)


def test_bits_and_repetition() -> None:
    weight = torch.randn(64, 576)
    packed = quantize_weight(weight)
    assert packed.bits_per_weight == 4.25
    again = quantize_weight(packed.dequantize())
    assert torch.equal(again.codes, packed.codes) and torch.equal(again.scales, packed.scales)


def test_zeros_stay_and_what_cannot_be_stored_is_refused() -> None:
    weight = torch.randn(2, 70)
    weight[0] = 0
    assert not quantize_weight(weight).dequantize()[0].any()
    with pytest.raises(UserError, match="cannot be stored as float16"):
        quantize_weight(weight * 1e6)
    with pytest.raises(UserError, match=r"^method.group_size=0: use at least 1.$"):
        quantize_weight(weight, 0)
