"""The whole reconstruction of a block, against the authors' loop with the same batches and masks."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path

import numpy as np
import pytest
import torch
from torch import Tensor, nn

from ptq161.methods.qdrop import ActivationQuantizer, RoundedLinear, reconstruct
from ptq161.methods.qdrop.layers import DrawKept
from tests.methods.qdrop.test_ranges import golden


def rounded(vectors: dict[str, Tensor], number: int) -> RoundedLinear:
    weight, bias = vectors[f"W{number}"], vectors[f"bias{number}"]
    linear = nn.Linear(weight.shape[1], weight.shape[0])
    with torch.no_grad():
        linear.weight.copy_(weight)
        linear.bias.copy_(bias)
    linear.requires_grad_(False)
    return RoundedLinear(linear, vectors[f"w_scale{number}"].view(-1, 1), vectors[f"w_zero{number}"].view(-1, 1), 2)


def masks(vectors: dict[str, Tensor], name: str, steps: int, batch: int, width: int) -> DrawKept | None:
    if name not in vectors:
        return None
    bits = np.unpackbits(vectors[name].numpy())[: steps * batch * width].astype(bool)
    rows = iter(torch.from_numpy(bits).view(steps, batch, width))
    return lambda shape: next(rows)


@pytest.mark.parametrize("case", ["qdrop", "no_drop"])
def test_golden_reconstruction(golden_dir: Path, case: str) -> None:
    vectors = golden(golden_dir, case)
    steps, batch, width, inner = vectors["shape"].tolist()
    first, second = rounded(vectors, 1), rounded(vectors, 2)
    middle, out = (
        ActivationQuantizer(
            vectors[f"a_scale_{name}0"],
            vectors[f"a_zero_{name}"],
            4,
            masks(vectors, f"keep_{name}", steps, batch, size),
        )
        for name, size in (("mid", inner), ("out", width))
    )
    kept = masks(vectors, "keep_input", steps, batch, width)

    def batches() -> Iterator[tuple[Tensor, Tensor]]:
        for chosen in vectors["batch"].long():
            x = vectors["quant_input"][chosen]
            if kept is not None:
                x = torch.where(kept(x.shape), x, vectors["full_input"][chosen])
            yield x, vectors["full_output"][chosen]

    found: list[tuple[float, float]] = []
    reconstruct(
        lambda x: out(second(middle(torch.relu(first(x)))) + x),
        [first, second],
        [middle, out],
        batches(),
        steps=steps,
        alpha_lr=1e-3,
        scale_lrs=[4e-3, 4e-3],
        rounding_weight=0.01,
        warmup=0.2,
        on_step=lambda *terms: found.append(terms),
    )
    reconstruction, rounding = np.array(found).T
    # Where an activation lies on the edge of two codes, processors whose sums differ in the last bit part.
    for last, rtol in ((80, 1e-3), (steps, 5e-2)):
        np.testing.assert_allclose(reconstruction[:last], vectors["reconstruction_loss"][:last], rtol=rtol)
        np.testing.assert_allclose((reconstruction + rounding)[:last], vectors["loss"][:last], rtol=rtol)
    for number, layer in ((1, first), (2, second)):
        torch.testing.assert_close(layer.alpha.detach(), vectors[f"alpha{number}"], rtol=1e-3, atol=5e-3)
        same = (layer.pack("float32").dequantize() - vectors[f"hard{number}"]).abs() < 1e-6
        assert same.float().mean() >= 0.995
    for name, quantizer in (("mid", middle), ("out", out)):
        torch.testing.assert_close(quantizer.scale.detach(), vectors[f"a_scale_{name}"], rtol=5e-3, atol=0)


def test_linears_that_share_an_input_share_its_mask_within_a_step() -> None:
    generator = torch.Generator().manual_seed(0)
    quantizer = ActivationQuantizer(
        torch.ones(1), torch.zeros(1), 4, lambda s: torch.rand(s, generator=generator) < 0.5
    )
    x = torch.full((50,), 0.6)
    quantizer.begin_step()
    first, second = quantizer(x), quantizer(x)
    quantizer.begin_step()
    assert torch.equal(first, second) and not torch.equal(first, quantizer(x))
    assert sorted(first.unique().tolist()) == pytest.approx([0.6, 1.0])


def test_a_negative_scale_becomes_positive() -> None:
    quantizer = ActivationQuantizer(torch.tensor([-0.5]), torch.zeros(1), 4)
    quantizer.begin_step()
    assert quantizer.scale.item() == 0.5
    with torch.no_grad():
        quantizer.scale.zero_()
    quantizer.begin_step()
    assert quantizer.scale.item() == pytest.approx(1e-8)
