import pytest
import torch
from torch import Tensor
from torch.nn import functional as F

from ptq161.kernels.attention import FastCausalAttention, causal_attention


def relative(ours: Tensor, reference: Tensor) -> float:
    return float((ours.float() - reference.float()).detach().norm() / reference.detach().float().norm())


def inputs(seq: int, kv_heads: int) -> list[Tensor]:
    generator = torch.Generator().manual_seed(seq)
    return [torch.randn(2, heads, seq, 16, generator=generator).requires_grad_() for heads in (4, kv_heads, kv_heads)]


@pytest.mark.parametrize("seq", [1, 7, 128, 129, 300])
@pytest.mark.parametrize("kv_heads", [4, 2])
def test_output_and_gradients_are_those_of_torch(seq: int, kv_heads: int) -> None:
    tensors = inputs(seq, kv_heads)
    grad = torch.randn(2, 4, seq, 16, generator=torch.Generator().manual_seed(1))
    reference = F.scaled_dot_product_attention(*tensors, is_causal=True, enable_gqa=True)
    expected = torch.autograd.grad(reference, tensors, grad)
    ours = causal_attention(*tensors)
    assert ours.dtype == torch.bfloat16
    assert relative(ours, reference) < 0.01
    for gradient, exact in zip(torch.autograd.grad(ours.float(), tensors, grad), expected, strict=True):
        # With one token the gradient of queries and keys is zero.
        assert relative(gradient, exact) < 0.02 or float(gradient.abs().max()) < 1e-2 * float(grad.abs().max())


def test_the_future_is_not_seen() -> None:
    query, key, value = inputs(200, 4)
    before = causal_attention(query, key, value)
    with torch.no_grad():
        key[:, :, 150:] += 5
        value[:, :, 150:] += 5
    assert torch.equal(causal_attention(query, key, value)[:, :, :150], before[:, :, :150])


def test_only_causal_bfloat16_attention_is_taken_over(monkeypatch: pytest.MonkeyPatch) -> None:
    calls = []
    monkeypatch.setattr("ptq161.kernels.attention.causal_attention", lambda *args: calls.append(args))
    tensors = inputs(8, 4)
    mask = torch.ones(8, 8, dtype=torch.bool)
    with FastCausalAttention():
        F.scaled_dot_product_attention(*tensors, is_causal=True)
        with torch.autocast("cpu", torch.bfloat16):
            F.scaled_dot_product_attention(*tensors)
            F.scaled_dot_product_attention(*tensors, attn_mask=mask)
            F.scaled_dot_product_attention(*tensors, is_causal=True, dropout_p=0.5)
            assert not calls
            F.scaled_dot_product_attention(*tensors, is_causal=True, scale=0.3)
    assert len(calls) == 1
    assert calls[0][3] == 0.3


def test_compiled_softmax_and_its_gradient_are_those_of_torch(request: pytest.FixtureRequest) -> None:
    found = []
    for _ in range(2):
        tensors = inputs(300, 2)
        output = causal_attention(*tensors, 0.3)
        found.append([output, *torch.autograd.grad(output.float().square().sum(), tensors)])
        request.getfixturevalue("torch_alone")
    assert all(relative(ours, of_torch) < 0.01 for ours, of_torch in zip(*found, strict=True))


def test_scores_that_are_no_numbers_are_passed_on() -> None:
    query, key, value = inputs(40, 4)
    with torch.no_grad():
        key[0, 0, 20] = float("nan")
    output = causal_attention(query, key, value)
    assert bool(output[0, 0, :20].isfinite().all())
    assert not bool(output[0, 0, 20:].isfinite().any())
    assert bool(output[1].isfinite().all())
