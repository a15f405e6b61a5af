"""Seeded weights and hessians, golden vectors, and a driver on tiny models, for the tests of layer-wise methods."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import torch
from torch import Tensor
from transformers import PreTrainedModel

import ptq161
from ptq161.methods.layerwise import LayerwiseMethod
from ptq161.packed.linear import PackedLinear


def layer(seed: int, out_features: int = 24, in_features: int = 128, dead: int = 0) -> tuple[Tensor, Tensor]:
    """Return a weight ``[out, in]`` and the hessian of correlated inputs, the first ``dead`` of which are zero."""
    generator = torch.Generator().manual_seed(seed)
    weight = torch.randn(out_features, in_features, generator=generator) * 0.1
    mixing = torch.eye(in_features) + 0.2 * torch.randn(in_features, in_features, generator=generator)
    inputs = torch.randn(2 * in_features, in_features, generator=generator) @ mixing
    inputs[:, :dead] = 0
    return weight, 2 * inputs.T @ inputs


def golden(golden_dir: Path, name: str) -> tuple[Tensor, Tensor, Tensor]:
    """Return weight, hessian and the dequantized weight of the authors' code."""
    with np.load(golden_dir / "reference_vectors.npz") as vectors:
        weight, inputs, quantized = (torch.from_numpy(vectors[f"{name}.{key}"]) for key in "WXq")
    return weight, 2 * inputs.T @ inputs, quantized


def assert_golden(actual: Tensor, expected: Tensor) -> None:
    """Hold the bar of the golden vectors: 99.9 % of the entries within 1e-4 of the largest."""
    assert actual.shape == expected.shape
    far = (actual - expected).abs() > 1e-4 * expected.abs().max()
    assert far.float().mean() <= 1e-3


def packed_linears(model: PreTrainedModel, method: LayerwiseMethod) -> dict[str, PackedLinear]:
    """Quantize a tiny model on random tokens and return its packed linears."""
    tokens = torch.randint(0, 256, (4, 32), generator=torch.Generator().manual_seed(0))
    ptq161.quantize(model, tokens, method)
    with torch.no_grad():
        assert torch.isfinite(model(tokens).logits).all()
    return {name: module for name, module in model.named_modules() if isinstance(module, PackedLinear)}
