"""How well a restoration goes in the arithmetics of a training, beside floats."""

from __future__ import annotations

from collections.abc import Callable

import pytest
from transformers import PreTrainedModel, PreTrainedTokenizerFast

from ptq161.methods.rtn import RTN
from ptq161.preprocess.rounds import restore
from tests.preprocess.conftest import short, text_tokens

COARSE = RTN(bits=2)


def test_integers_restore_about_as_well_as_floats(
    pretrained: Callable[[], PreTrainedModel], tiny_tokenizer: PreTrainedTokenizerFast
) -> None:
    """Of 8 bits within a few percent of the loss in float; of 5 bits it still falls."""
    model, calibration = pretrained(), text_tokens(tiny_tokenizer, 500, 8)
    training = text_tokens(tiny_tokenizer, 100, 160)
    losses = {}
    for name, changes in (
        ("float", {}),
        ("8 bits", {"arithmetic": "gse", "bits": 8}),
        ("5 bits", {"arithmetic": "gse", "bits": 5}),
    ):
        emitted: dict[str, list[float]] = {}
        restoration = short(lr=3e-3, steps=40, batch_size=4, seq_len=64, rank=16, base="nf4", **changes)
        restore(model, training, calibration, COARSE, restoration, on_metric=appending(emitted))
        curve = emitted["preprocess_loss"]
        losses[name] = sum(curve[-5:]) / 5
        assert losses[name] < 0.8 * sum(curve[:3]) / 3, name
        assert len(emitted["preprocess_trained_bytes"]) == len(emitted["preprocess_base_bytes"]) == 1
    assert losses["8 bits"] == pytest.approx(losses["float"], rel=0.03)
    assert losses["float"] < losses["5 bits"] < 1.3 * losses["float"], losses


def test_floats_of_few_bits_restore_less_than_float_and_more_with_the_spectral_split(
    pretrained: Callable[[], PreTrainedModel], tiny_tokenizer: PreTrainedTokenizerFast
) -> None:
    """FP8 within a few percent of float; FP4 with singular vectors in float between float and FP4 without a split."""
    model, calibration = pretrained(), text_tokens(tiny_tokenizer, 500, 8)
    training = text_tokens(tiny_tokenizer, 100, 160)
    losses = {}
    for name, changes in {
        "float": {},
        "fp8": {"arithmetic": "metis", "format": "fp8"},
        "direct": {"arithmetic": "metis"},
        "spectral": {"arithmetic": "metis", "spectral_rank": 6, "spectral_factors": "float"},
    }.items():
        emitted: dict[str, list[float]] = {}
        restoration = short(update="full", lr=1e-3, steps=40, batch_size=4, seq_len=64, **changes)
        restore(model, training, calibration, COARSE, restoration, on_metric=appending(emitted))
        curve = emitted["preprocess_loss"]
        losses[name] = sum(curve[-5:]) / 5
        assert losses[name] < 0.5 * sum(curve[:3]) / 3, name
    assert losses["fp8"] == pytest.approx(losses["float"], rel=0.05)
    assert 1.02 * losses["float"] < losses["spectral"] < 0.95 * losses["direct"], losses


def appending(emitted: dict[str, list[float]]) -> Callable[..., None]:
    def on_metric(name: str, value: float, /, **where: int | str) -> None:
        emitted.setdefault(name, []).append(value)

    return on_metric
