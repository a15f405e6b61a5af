"""The storage format of PTQ1.61: exact round trips, its bytes, and its edges."""

from __future__ import annotations

import dataclasses
from typing import Any

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch import Tensor

from ptq161.errors import UserError
from ptq161.methods.ptq161 import initial_scales, pack_weight, salient_mask
from ptq161.packed.structured_binary import StructuredBinaryWeight
from ptq161.packed.weight import SCALE_DTYPES, packed_weight_from

TENSORS = {"mask", "sign", "scale", "mean", "column_angle", "codes", "salient_scale", "salient_zero_point"}


def random_parts(
    out_features: int, in_features: int, n_salient: int, bits: int, scale_dtype: str, seed: int
) -> dict[str, Any]:
    """Parts that the format holds exactly: scales are rounded to ``scale_dtype`` beforehand."""
    g = torch.Generator().manual_seed(seed)
    mask = torch.zeros(in_features, dtype=torch.bool)
    mask[torch.randperm(in_features, generator=g)[:n_salient]] = True

    def scales(*shape: int) -> Tensor:
        return torch.randn(*shape, generator=g).to(SCALE_DTYPES[scale_dtype]).float()

    width = 1 if n_salient else 0
    return {
        "mask": mask,
        "sign": torch.rand(out_features, in_features - n_salient, generator=g) < 0.5,
        "scale": scales(out_features, 1),
        "mean": scales(out_features, 1),
        "column_angle": scales(in_features - n_salient),
        "codes": torch.randint(0, 2**bits, (out_features, n_salient), generator=g),
        "salient_scale": scales(out_features, width),
        "salient_zero_point": torch.randint(0, 2**bits, (out_features, width), generator=g).float(),
    }


def dense(parts: dict[str, Any]) -> Tensor:
    """The weight by its formula, entry by entry."""
    rows, columns = parts["sign"].shape[0], parts["mask"].numel()
    weight = torch.empty(rows, columns)
    binary = salient = 0
    for i in range(columns):
        if parts["mask"][i]:
            code = parts["codes"][:, salient].float()
            weight[:, i] = parts["salient_scale"][:, 0] * (code - parts["salient_zero_point"][:, 0])
            salient += 1
        else:
            sign = torch.where(parts["sign"][:, binary], 1.0, -1.0)
            value = parts["scale"][:, 0] * sign + parts["mean"][:, 0]
            weight[:, i] = parts["column_angle"][binary] * value
            binary += 1
    return weight


@given(
    shape=st.tuples(st.integers(1, 9), st.integers(1, 40)),
    share=st.floats(0, 1),
    bits=st.sampled_from([1, 2, 3, 4, 8]),
    scale_dtype=st.sampled_from(sorted(SCALE_DTYPES)),
    seed=st.integers(0, 2**32),
)
def test_round_trip_is_exact(shape: tuple[int, int], share: float, bits: int, scale_dtype: str, seed: int) -> None:
    parts = random_parts(*shape, min(int(share * shape[1]), shape[1] - 1), bits, scale_dtype, seed)
    packed = StructuredBinaryWeight.pack(**parts, salient_bits=bits, scale_dtype=scale_dtype)
    weight = packed.dequantize()
    assert weight.dtype == torch.float32 and weight.shape == shape
    assert torch.equal(weight, dense(parts))
    assert torch.equal(packed.salient_channels(), parts["mask"])

    again = packed_weight_from(packed.settings(), packed.state_dict())
    assert type(again) is StructuredBinaryWeight
    assert torch.equal(again.dequantize(), weight)
    assert again.settings() == packed.settings()


def quantized(
    out_features: int, in_features: int, ratio: float, scale_dtype: str = "float16"
) -> StructuredBinaryWeight:
    weight = torch.randn(out_features, in_features) * 0.02
    mask = salient_mask(torch.rand(in_features), ratio)
    mean, scale = initial_scales(weight, mask)
    ones = torch.ones(out_features, 1), torch.ones(1, in_features)
    return pack_weight(weight, mask, mean, scale, *ones, scale_dtype=scale_dtype)


@pytest.mark.parametrize("shape", [(4096, 4096), (4096, 11008), (11008, 4096)])
def test_measured_bits_at_the_papers_ratio(shape: tuple[int, int]) -> None:
    packed = quantized(*shape, 0.2)
    assert 1.6 < packed.bits_per_weight <= 1.63


def test_bits_count_every_stored_byte() -> None:
    out_features, in_features, salient = 24, 100, 21
    packed = quantized(out_features, in_features, 0.2)
    assert int(packed.salient_channels().sum()) == salient
    binary = in_features - salient
    plane, codes, mask = out_features * ((binary + 7) // 8), out_features * ((salient * 4 + 7) // 8), 13
    scales = 2 * (4 * out_features + binary)  # scale, mean, salient scale, zero point; column angles
    assert packed.nbytes == plane + codes + mask + scales
    assert packed.nbytes == sum(t.nbytes for t in packed.state_dict().values())
    assert packed.bits_per_weight == 8 * packed.nbytes / (out_features * in_features)


def test_state_dict_holds_bytes_and_scales_and_nothing_dense() -> None:
    packed = quantized(16, 64, 0.2)
    state = packed.state_dict()
    assert set(state) == TENSORS
    assert {name for name, tensor in state.items() if tensor.dtype == torch.uint8} == {"mask", "sign", "codes"}
    assert all(t.dtype in (torch.uint8, torch.float16) and t.numel() < 16 * 64 for t in state.values())
    assert packed.settings() == {
        "format": "structured_binary",
        "version": 1,
        "out_features": 16,
        "in_features": 64,
        "salient_bits": 4,
    }


@pytest.mark.parametrize("scale_dtype", sorted(SCALE_DTYPES))
def test_without_salient_channels_no_grid_is_stored(scale_dtype: str) -> None:
    packed = quantized(8, 40, 0.0, scale_dtype)
    assert not packed.salient_channels().any()
    assert packed.codes.numel() == packed.salient_scale.numel() == packed.salient_zero_point.numel() == 0
    weight = packed.dequantize()
    assert all(len(row.unique()) == 2 for row in weight)


@pytest.mark.parametrize("ratio", [0.98, 0.999999])
def test_one_channel_at_least_stays_binary(ratio: float) -> None:
    packed = quantized(8, 40, ratio)
    assert int((~packed.salient_channels()).sum()) == 1
    assert packed.column_angle.shape == (1,) and packed.sign.shape == (8, 1)
    assert torch.isfinite(packed.dequantize()).all()


def test_scales_are_stored_in_their_dtype() -> None:
    for scale_dtype, dtype in SCALE_DTYPES.items():
        state = quantized(8, 40, 0.2, scale_dtype).state_dict()
        assert {t.dtype for t in state.values()} == {torch.uint8, dtype}


@pytest.mark.parametrize("field", ["scale", "mean", "column_angle", "salient_scale"])
@pytest.mark.parametrize("value", [1e5, float("nan"), float("inf")])
def test_scales_that_do_not_fit_are_refused(field: str, value: float) -> None:
    parts = random_parts(4, 16, 3, 4, "float16", 0)
    parts[field].view(-1)[0] = value
    with pytest.raises(UserError, match="cannot be stored as float16; use scale_dtype=float32"):
        StructuredBinaryWeight.pack(**parts, salient_bits=4, scale_dtype="float16")
    if value == 1e5:
        assert StructuredBinaryWeight.pack(**parts, salient_bits=4, scale_dtype="float32").nbytes


def test_codes_too_large_for_their_bits_are_refused() -> None:
    parts = random_parts(4, 16, 3, 4, "float16", 0)
    with pytest.raises(ValueError, match=r"\[0, 4\)"):
        StructuredBinaryWeight.pack(**{**parts, "codes": parts["codes"] + 4}, salient_bits=2, scale_dtype="float16")


def test_packed_weights_are_frozen() -> None:
    with pytest.raises(dataclasses.FrozenInstanceError):
        quantized(4, 16, 0.2).scale = torch.zeros(4, 1)  # type: ignore[misc]  # that is what is tested


def test_with_tensors_changes_what_is_named() -> None:
    packed = quantized(4, 16, 0.2)
    other = packed.with_tensors({"mean": packed.mean + 1, "scale": packed.scale})
    assert other.scale is packed.scale and torch.equal(other.mean, packed.mean + 1)
    assert not torch.equal(other.dequantize(), packed.dequantize())


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"format": "ternary"}, "weights of format 'ternary'; known are .*structured_binary"),
        ({"version": 2}, "version 2 of format 'structured_binary'; this version of ptq161 reads version 1"),
        ({"color": 1}, "color is missing in a weight of format 'structured_binary', or not part of it"),
    ],
)
def test_foreign_settings_are_refused(change: dict[str, Any], message: str) -> None:
    packed = quantized(4, 16, 0.2)
    with pytest.raises(UserError, match=message):
        packed_weight_from(packed.settings() | change, packed.state_dict())


@pytest.mark.parametrize("missing", sorted(TENSORS))
def test_a_missing_tensor_is_refused(missing: str) -> None:
    packed = quantized(4, 16, 0.2)
    state = packed.state_dict()
    del state[missing]
    with pytest.raises(UserError, match=f"{missing} is missing"):
        packed_weight_from(packed.settings(), state)
