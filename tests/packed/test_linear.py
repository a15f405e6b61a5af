"""The packed linear layer: its bytes are the weight, whatever happens to the module around it."""

from __future__ import annotations

import copy
from collections.abc import Callable

import pytest
import torch
from torch import Tensor, nn
from transformers import PreTrainedModel

import ptq161
from ptq161.kernels import packed_rows
from ptq161.methods.ptq161 import PTQ161, initial_scales, pack_weight, salient_mask
from ptq161.packed.bits import pack_plane
from ptq161.packed.linear import FEW_ROWS, PackedLinear, dense_cache
from ptq161.packed.structured_binary import StructuredBinaryWeight

OUT, IN = 12, 40
TENSORS = ["mask", "sign", "scale", "mean", "column_angle", "codes", "salient_scale", "salient_zero_point"]
DTYPES = [torch.float32, torch.bfloat16, torch.float16]


def packed_weight(scale_dtype: str = "float16") -> StructuredBinaryWeight:
    weight = torch.randn(OUT, IN)
    mask = salient_mask(torch.rand(IN), 0.2)
    mean, scale = initial_scales(weight, mask)
    angles = 1 + 0.1 * torch.rand(OUT, 1), 1 + 0.1 * torch.rand(1, IN)
    return pack_weight(weight, mask, mean, scale, *angles, scale_dtype=scale_dtype)


def layer(bias: bool = True, scale_dtype: str = "float16") -> PackedLinear:
    return PackedLinear(packed_weight(scale_dtype), torch.randn(OUT) if bias else None)


def flip_first_used_bit(tensor: Tensor) -> None:
    """Flip one bit in place: the lowest of a byte, the sign of a float."""
    flat = tensor.view(-1)
    if tensor.dtype == torch.uint8:
        flat[0] ^= 1
    else:
        flat[0] = -flat[0]


@pytest.mark.parametrize("rows", [3, 30])
@pytest.mark.parametrize("bias", [False, True])
@pytest.mark.parametrize("dtype", DTYPES)
def test_forward_is_the_dense_layer(bias: bool, dtype: torch.dtype, rows: int) -> None:
    linear = layer(bias)
    x = torch.randn(2, rows, IN, dtype=dtype)
    expected = nn.functional.linear(x, linear.dequantize().to(dtype), linear.bias.to(dtype) if bias else None)
    y = linear(x)
    assert y.dtype == dtype
    if 2 * rows > FEW_ROWS or dtype == torch.float16:
        assert torch.equal(y, expected)
    else:  # from the packed bytes, in another order of sums and without rounding the weight to bfloat16
        torch.testing.assert_close(y, expected, rtol=0.02, atol=0.02 if dtype == torch.bfloat16 else 1e-5)


@pytest.mark.parametrize("name", TENSORS)
@pytest.mark.parametrize("scale_dtype", ["float16", "float32"])
def test_a_flipped_stored_bit_changes_the_output(name: str, scale_dtype: str) -> None:
    linear = layer(scale_dtype=scale_dtype)
    x = torch.randn(5, IN)
    before = linear(x)
    if name == "mask":  # the number of salient channels has to stay: move one
        bits = linear.packed.salient_channels()
        bits[[int(bits.int().argmax()), int((~bits).int().argmax())]] = torch.tensor([False, True])
        linear.mask.copy_(pack_plane(bits))
    else:
        flip_first_used_bit(getattr(linear, name))
    assert not torch.equal(linear(x), before)


def test_each_forward_dequantizes_anew(monkeypatch: pytest.MonkeyPatch) -> None:
    linear = layer()
    calls = []
    dequantize = StructuredBinaryWeight.dequantize
    monkeypatch.setattr(StructuredBinaryWeight, "dequantize", lambda self: calls.append(0) or dequantize(self))
    monkeypatch.setattr(packed_rows, "usable", lambda *_, **__: False)
    x = torch.randn(FEW_ROWS + 1, IN)
    linear(x), linear(x)
    assert len(calls) == 2
    with dense_cache(linear, torch.float32):
        linear(x), linear(x)
    assert len(calls) == 3
    linear(x)
    assert len(calls) == 4


@pytest.mark.parametrize("dtype", DTYPES)
def test_cached_and_uncached_outputs_are_equal(dtype: torch.dtype) -> None:
    model = nn.Sequential(layer(), nn.ReLU(), nn.Linear(OUT, 3)).to(dtype)
    x = torch.randn(FEW_ROWS + 1, IN, dtype=dtype)
    before = model(x)
    with dense_cache(model, dtype):
        assert torch.equal(model(x), before)
    assert torch.equal(model(x), before)


def test_the_cache_ends_with_its_context_even_after_an_error() -> None:
    linear = layer()
    with pytest.raises(RuntimeError, match="stop"), dense_cache(linear, torch.float32):
        assert linear._dense is not None
        raise RuntimeError("stop")
    x = torch.randn(2, IN)
    before = linear(x)
    linear.sign[0, 0] ^= 1
    assert not torch.equal(linear(x), before)


def test_the_cache_is_in_no_state_dict() -> None:
    linear = layer()
    with dense_cache(linear, torch.float32):
        assert set(linear.state_dict()) == {*TENSORS, "bias"}


def test_nothing_dense_is_a_parameter_or_a_state() -> None:
    linear = layer()
    assert set(dict(linear.named_parameters())) == {"bias"}
    assert set(linear.state_dict()) == {*TENSORS, "bias"}
    for tensor in [*linear.state_dict().values(), *linear.parameters(), *linear.buffers()]:
        assert not (tensor.is_floating_point() and tensor.numel() >= OUT * IN)
    assert not any(parameter.requires_grad for parameter in linear.parameters())
    # nor is one hidden among the attributes
    assert not any(isinstance(value, Tensor) and value.numel() >= OUT * IN for value in vars(linear).values())


def test_a_model_has_no_dense_linear_left(tiny_model: Callable[..., PreTrainedModel]) -> None:
    model = tiny_model("llama")
    shapes = {tuple(m.weight.shape) for b in model.model.layers for m in b.modules() if isinstance(m, nn.Linear)}
    ptq161.quantize(model, torch.randint(0, 256, (2, 16)), PTQ161(epochs=0))
    for block in model.model.layers:
        for name, tensor in [*block.state_dict().items(), *block.named_parameters()]:
            assert not (tensor.is_floating_point() and tuple(tensor.shape) in shapes), name


@pytest.mark.parametrize("scale_dtype", ["float16", "float32"])
@pytest.mark.parametrize(
    "cast",
    [
        lambda m: m.to(torch.bfloat16),
        lambda m: m.half(),
        lambda m: m.bfloat16(),
        lambda m: m.float(),
        lambda m: m.double(),
        lambda m: m.to("cpu", torch.float16),
    ],
)
def test_casting_a_model_keeps_the_packed_bytes(cast: Callable[[nn.Module], nn.Module], scale_dtype: str) -> None:
    model = nn.Sequential(layer(scale_dtype=scale_dtype), nn.Linear(OUT, 4))
    before = {name: tensor.clone() for name, tensor in model[0].packed.state_dict().items()}
    cast(model)
    after = model[0].packed.state_dict()
    for name, tensor in before.items():
        assert after[name].dtype == tensor.dtype and torch.equal(after[name], tensor)
    assert model[0].bias.dtype == model[1].weight.dtype


def test_a_move_to_another_device_moves_every_tensor() -> None:
    linear = layer().to("meta")
    assert {tensor.device.type for tensor in linear.packed.state_dict().values()} == {"meta"}
    without_salient = PackedLinear(
        pack_weight(
            torch.randn(OUT, IN),
            mask=torch.zeros(IN, dtype=torch.bool),
            mean=torch.zeros(OUT, 1),
            scale=torch.ones(OUT, 1),
            row_angle=torch.ones(OUT, 1),
            column_angle=torch.ones(1, IN),
            scale_dtype="float32",
        )
    ).to("meta")
    assert {tensor.device.type for tensor in without_salient.packed.state_dict().values()} == {"meta"}


def test_deepcopy_shares_nothing() -> None:
    linear = layer()
    x = torch.randn(3, IN)
    before = linear(x)
    clone = copy.deepcopy(linear)
    assert torch.equal(clone(x), before)
    clone.sign[0, 0] ^= 1
    clone.scale.neg_()
    assert not torch.equal(clone(x), before)
    assert torch.equal(linear(x), before)


def test_load_state_dict_replaces_the_bytes() -> None:
    one, other = layer(), layer()
    other.load_state_dict(one.state_dict())
    x = torch.randn(3, IN)
    assert torch.equal(one(x), other(x))


def test_gradients_reach_the_input() -> None:
    linear = layer()
    x = torch.randn(3, IN, requires_grad=True)
    linear(x).sum().backward()
    assert x.grad is not None
    torch.testing.assert_close(x.grad, linear.dequantize().sum(0).expand(3, IN))


def test_printing_names_format_and_bits() -> None:
    linear = layer()
    text = repr(linear)
    assert "format=structured_binary" in text and f"bits_per_weight={linear.packed.bits_per_weight:.2f}" in text
