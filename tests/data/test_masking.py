"""Masked calibration: the authors' masks, shares, prefix, seeds, and what a run says of it."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest
import torch

import ptq161
from ptq161.data.calibration import calibration_tokens
from ptq161.data.masking import mask_linearly
from ptq161.data.settings import CalibConfig
from ptq161.errors import UserError
from ptq161.run.contents import identity
from ptq161.run.preflight import checked_config
from ptq161.seeding import stage_generator
from tests.conftest import _tiny_model, _tiny_tokenizer
from tests.run.test_preflight import composed

MASK = 255


def config(file: Path, masking: str = "linear", prefix: float = 0.25, n_samples: int = 20) -> CalibConfig:
    file.write_text("All words of this text are there to be masked. " * 50)
    return CalibConfig("text_file", n_samples, 200, str(file), masking, MASK, prefix)


def test_golden_vector(golden_dir: Path) -> None:
    with np.load(golden_dir / "quant_dllm" / "vectors.npz") as vectors:
        tokens, masked = (torch.from_numpy(vectors[f"masking.{key}"]).long() for key in ("tokens", "masked"))
    found = mask_linearly(tokens, 255, 0.25, lambda i: torch.Generator().manual_seed(11 + i))
    assert torch.equal(found, masked)


def test_shares_rise_from_window_to_window_and_the_prefix_stays() -> None:
    n, seq_len, visible = 16, 4000, 1000
    tokens = torch.zeros(n, seq_len, dtype=torch.int64)
    masked = mask_linearly(tokens, MASK, 0.25, lambda i: stage_generator(0, "test", i)) == MASK
    assert not masked[:, :visible].any() and not tokens.any()
    for i, share in enumerate(masked[:, visible:].float().mean(1).tolist()):
        wanted = (i + 1) / n
        assert abs(share - wanted) <= 3 * (wanted * (1 - wanted) / (seq_len - visible)) ** 0.5
    assert masked[-1, visible:].all()


@pytest.mark.parametrize(("prefix", "visible"), [(0.0, 0), (0.25, 1), (0.5, 3), (0.99, 6)])
def test_a_prefix_is_rounded_down(prefix: float, visible: int) -> None:
    masked = mask_linearly(torch.zeros(1, 7, dtype=torch.int64), MASK, prefix, lambda i: torch.Generator())
    assert masked.tolist() == [[0] * visible + [MASK] * (7 - visible)]


def test_masks_lie_over_the_windows_that_are_drawn_without_them(tmp_path: Path) -> None:
    plain, masked = (
        calibration_tokens(_tiny_tokenizer(), config(tmp_path / "text", masking), seed=3)
        for masking in ("none", "linear")
    )
    hidden = masked == MASK
    assert hidden.any() and not (plain == MASK).any()
    assert torch.equal(masked.masked_fill(hidden, 0), plain.masked_fill(hidden, 0))


def test_masks_follow_from_the_seed(tmp_path: Path) -> None:
    drawn = [calibration_tokens(_tiny_tokenizer(), config(tmp_path / "text"), seed) for seed in (0, 0, 1)]
    assert torch.equal(drawn[0], drawn[1])
    assert not torch.equal(drawn[0] == MASK, drawn[2] == MASK)


def test_a_mask_token_without_masking_changes_nothing(tmp_path: Path) -> None:
    plain = CalibConfig("text_file", 4, 32, str(tmp_path / "text"))
    config(tmp_path / "text")
    given = CalibConfig("text_file", 4, 32, str(tmp_path / "text"), mask_token=MASK, masking_prefix=0.5)
    drawn = [calibration_tokens(_tiny_tokenizer(), settings, seed=0) for settings in (plain, given)]
    assert torch.equal(*drawn)


def test_masking_is_part_of_the_identity(tmp_path: Path, tiny_model_dir: Path) -> None:
    text = tmp_path / "text"
    text.write_text("Text to calibrate on.")

    def described(**settings: object) -> object:
        more = {f"calib.{key}": value for key, value in settings.items()}
        return identity(checked_config(composed(str(tiny_model_dir), str(text), str(text), **more), []))["calibration"]

    plain, linear = described(), described(masking="linear", mask_token=3)
    assert described(mask_token=5, masking_prefix=0.5) == plain
    assert linear == {**dict(plain), "masking": "linear", "mask_token": 3, "masking_prefix": 0.25}  # type: ignore[call-overload]
    assert described(masking="linear", mask_token=4) != linear
    assert described(masking="linear", mask_token=3, masking_prefix=0.5) != linear


def test_any_method_is_calibrated_on_masked_tokens_and_the_result_differs(tmp_path: Path) -> None:
    stored = []
    for masking in ("none", "linear"):
        tokens = calibration_tokens(_tiny_tokenizer(), config(tmp_path / "text", masking, n_samples=4), seed=0)
        model = ptq161.quantize(_tiny_model("llama", n_blocks=1), tokens, ptq161.GPTQ(bits=2))
        stored.append(model.model.layers[0].self_attn.q_proj.packed.codes)
    assert not torch.equal(*stored)


@pytest.mark.parametrize(
    "settings",
    [
        {"masking": "cosine"},
        {"masking": "linear"},
        {"masking": "linear", "mask_token": -1},
        {"masking_prefix": -0.1},
        {"masking_prefix": 1.0},
        {"masking_prefix": float("nan")},
    ],
    ids=str,
)
def test_one_sentence_names_the_setting(settings: dict[str, object]) -> None:
    with pytest.raises(UserError, match=rf"^calib\.{list(settings)[-1]}=.*\.$"):
        CalibConfig("squad", 4, 32, **settings)  # type: ignore[arg-type]
