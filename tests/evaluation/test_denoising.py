"""The denoising loss of masked-diffusion models: its masks, its value, and what quantization does to it."""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import pytest
import torch
from tokenizers import Tokenizer, models, pre_tokenizers
from torch import Tensor
from torch.nn import functional as F
from transformers import PreTrainedModel, PreTrainedTokenizerFast

import ptq161
from ptq161.data.masking import mask_linearly
from ptq161.errors import UserError
from ptq161.evaluation import denoised_sample, denoising_loss, evaluate, open_evaluation, perplexity
from ptq161.evaluation.denoising import MASK_SHARES
from ptq161.evaluation.settings import EvalConfig
from ptq161.finetune.checks import check_pair
from ptq161.methods.layerwise import InputStatistics
from ptq161.models.architectures import ARCHITECTURES, Diffusion, diffusion_of, max_seq_len
from tests.diffusion_models import (
    MASK,
    ROWS,
    SEQ_LEN,
    LladaConfig,
    TinyDiffusion,
    progressions,
    tiny_diffusion,
    tiny_llada,
    trained_diffusion,
)


@pytest.fixture(autouse=True)
def _rows(monkeypatch: pytest.MonkeyPatch) -> None:
    for name, row in ROWS.items():
        monkeypatch.setitem(ARCHITECTURES, name, row)


def masked_calibration(n: int = 64) -> tuple[Tensor, Tensor]:
    clean = progressions(n, seed=3)
    return clean, mask_linearly(clean, MASK, 0.25, lambda i: torch.Generator().manual_seed(i))


def tokenizer() -> PreTrainedTokenizerFast:
    words = {f"w{i}": i for i in range(MASK)} | {"[MASK]": MASK}
    made = Tokenizer(models.WordLevel(words, unk_token="w0"))
    made.pre_tokenizer = pre_tokenizers.WhitespaceSplit()
    return PreTrainedTokenizerFast(tokenizer_object=made, mask_token="[MASK]")


def words(tokens: Tensor) -> str:
    return " ".join(f"w{token}" for token in tokens.flatten().tolist())


class Spy(TinyDiffusion):
    """Keeps what it is called on."""

    def __init__(self, config: Any) -> None:
        super().__init__(config)
        self.seen: list[Tensor] = []

    def forward(self, input_ids: Tensor, **kwargs: Any) -> Any:
        self.seen.append(input_ids)
        return super().forward(input_ids, **kwargs)


@pytest.mark.parametrize("shifted", [False, True])
def test_the_loss_is_the_mean_over_the_shares_of_the_mean_over_masked_places(
    shifted: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    row = dataclasses.replace(ROWS["tiny_diffusion"], diffusion=Diffusion(MASK, shifted))
    monkeypatch.setitem(ARCHITECTURES, "tiny_diffusion", row)
    model, windows = Spy(tiny_diffusion().config).eval(), progressions(3, seed=1)
    found = denoising_loss(model, windows.flatten(), SEQ_LEN, batch_size=2)
    assert len(model.seen) == 2 * len(MASK_SHARES)  # two batches
    losses = []
    for i, inputs in enumerate(list(model.seen)):
        texts = windows[:2] if i < len(MASK_SHARES) else windows[2:]
        hidden = inputs == MASK
        assert torch.equal(inputs[~hidden], texts[~hidden])
        assert hidden.sum(1).tolist() == [round(MASK_SHARES[i % 8] * SEQ_LEN)] * len(texts)  # exactly so many
        logits = model(inputs).logits.detach()
        if shifted:
            logits = torch.cat([logits[:, :1], logits[:, :-1]], dim=1)
        for text, places, rows in zip(texts, hidden, logits, strict=True):
            losses.append(F.cross_entropy(rows[places], text[places]))
    assert found.value == pytest.approx(float(torch.stack(losses).mean()), rel=1e-5)
    assert (found.n_windows, found.n_tokens, found.seq_len, found.mask_shares) == (3, 3 * SEQ_LEN, SEQ_LEN, 8)
    assert found.standard_error is not None and found.standard_error > 0


def test_masks_do_not_depend_on_the_batch_size_and_any_place_can_be_masked() -> None:
    model, text = Spy(tiny_diffusion().config).eval(), progressions(8, seed=1).flatten()
    values = [denoising_loss(model, text, SEQ_LEN, batch_size=size).value for size in (1, 8)]
    assert values[0] == pytest.approx(values[1], rel=1e-6)
    least = torch.cat([seen for seen in model.seen if len(seen) == 8])[:16] == MASK
    assert least[:8].sum() < least[8:].sum() and bool((least[:8] <= least[8:]).all())  # masks grow with the share
    assert bool((torch.cat(model.seen) == MASK).any(0).all())


def test_windows_can_be_left_out() -> None:
    text = progressions(4, seed=1).flatten()
    model = tiny_diffusion()
    found = denoising_loss(model, text, SEQ_LEN, max_windows=2)
    assert found.n_windows == 2
    assert found.value == pytest.approx(denoising_loss(model, text[: 2 * SEQ_LEN], SEQ_LEN).value)
    assert denoising_loss(model, text[:SEQ_LEN], SEQ_LEN).standard_error is None


def test_a_model_that_was_trained_fills_in_and_a_random_one_does_not() -> None:
    text = progressions(16, seed=7).flatten()
    assert denoising_loss(tiny_diffusion(), text, SEQ_LEN, batch_size=16).value > 3.5  # the logarithm of 40 is 3.7
    assert denoising_loss(trained_diffusion(), text, SEQ_LEN, batch_size=16).value < 1.0


@pytest.mark.parametrize(
    "method", [ptq161.QuantDLLM(column_block=16, mixed_ratio=0.0), ptq161.GPTQ(bits=2)], ids=["quant_dllm", "gptq"]
)
def test_masked_calibration_leaves_less_loss_and_less_error_on_masked_text(method: Any) -> None:
    text = progressions(16, seed=7).flatten()
    held_out = mask_linearly(progressions(32, seed=11), MASK, 0.0, lambda i: torch.Generator().manual_seed(1000 + i))
    full = trained_diffusion()
    before = denoising_loss(full, text, SEQ_LEN, batch_size=16).value
    losses, errors = [], []
    for tokens in masked_calibration():
        model = ptq161.quantize(trained_diffusion(), tokens, method)
        losses.append(denoising_loss(model, text, SEQ_LEN, batch_size=16).value)
        with torch.no_grad():
            errors.append(float(F.mse_loss(model(held_out).logits, full(held_out).logits)))
    clean, masked = losses
    assert before < masked < clean < 3.7
    assert errors[1] < errors[0]


def test_statistics_of_masked_text_are_others() -> None:
    @dataclasses.dataclass(frozen=True)
    class Keeping(ptq161.GPTQ):
        found: list[Tensor] = dataclasses.field(default_factory=list)

        def quantize_group(
            self, weights: Mapping[str, Tensor], statistics: InputStatistics | None, window: Any
        ) -> dict[str, Any]:
            assert statistics is not None
            self.found.append(statistics.hessian.clone())
            return super().quantize_group(weights, statistics, window)

    hessians = []
    for tokens in masked_calibration(8):
        method = Keeping(bits=4)
        ptq161.quantize(tiny_diffusion(), tokens, method)
        hessians.append(method.found[0])
    difference = (hessians[0] - hessians[1]).norm() / hessians[0].norm()
    assert difference > 0.1


@pytest.mark.parametrize("make", [tiny_diffusion, tiny_llada])
def test_every_method_finds_the_linears_of_models_whose_places_see_each_other(
    make: Callable[[], PreTrainedModel],
) -> None:
    text = progressions(4, seed=7).flatten()
    full = denoising_loss(make(), text, SEQ_LEN).value
    for method in (ptq161.RTN(bits=8), ptq161.GPTQ(bits=8), ptq161.PTQ161(epochs=1, scale_lr=1e-3, angle_lr=1e-2)):
        model = ptq161.quantize(make(), masked_calibration(4)[1], method)
        assert len(ptq161.packed.model.packed_linears(model)) == 14
        found = denoising_loss(model, text, SEQ_LEN).value
        assert found != full
        assert found == pytest.approx(full, rel=1e-3 if "bits" in vars(method) else 0.2)


def test_the_mask_token_of_the_config_comes_before_that_of_the_table() -> None:
    model = tiny_llada()
    assert diffusion_of(model.config) == Diffusion(MASK)
    del model.config.mask_token_id
    assert diffusion_of(model.config) == Diffusion(126336)
    assert ARCHITECTURES["Dream"].diffusion == Diffusion(151666, shifted=True)
    assert ARCHITECTURES["llada"].own_code and ARCHITECTURES["Dream"].own_code


def test_each_measure_refuses_the_other_kind_of_model(tiny_model: Callable[..., PreTrainedModel]) -> None:
    text = torch.arange(64) % MASK
    with pytest.raises(UserError, match=r"TinyDiffusion is a masked-diffusion model.*denoising_loss\.$"):
        perplexity(tiny_diffusion(), text, 16)
    with pytest.raises(UserError, match=r"LlamaForCausalLM is a causal language model.*use perplexity\.$"):
        denoising_loss(tiny_model("llama"), text, 16)


def test_what_trains_on_the_next_token_is_refused() -> None:
    clean, _ = masked_calibration(4)
    with pytest.raises(UserError, match=r"a tiny_diffusion is a masked-diffusion model, but preprocess trains"):
        ptq161.preprocess.restore(
            tiny_diffusion(), clean, clean, ptq161.RTN(bits=2), ptq161.preprocess.Restoration(seq_len=SEQ_LEN)
        )
    packed = ptq161.quantize(tiny_diffusion(), clean, ptq161.RTN(bits=2))
    with pytest.raises(UserError, match=r"a tiny_diffusion is a masked-diffusion model, but finetune distils"):
        check_pair(packed, tiny_diffusion())


def test_the_longest_sequence_by_its_name_in_llada() -> None:
    assert max_seq_len(LladaConfig(max_sequence_length=16)) == 16 and max_seq_len(LladaConfig()) is None


def test_a_loss_that_is_not_finite() -> None:
    model = tiny_diffusion()
    model.lm_head.weight.data[0, 0] = torch.nan
    with pytest.raises(UserError, match=r"the loss of window 0 is not finite: .*\.$"):
        denoising_loss(model, torch.arange(64) % MASK, 16)


def test_a_protocol_measures_it_in_the_place_of_the_perplexity(tmp_path: Path) -> None:
    file = tmp_path / "text"
    file.write_text(words(progressions(6, seed=7)))
    config = EvalConfig("test", ["text_file"], SEQ_LEN, [], text_file=str(file), max_windows=5)
    opened = open_evaluation(tokenizer(), config, 2 * SEQ_LEN, MASK + 1)
    model = trained_diffusion()
    scores = evaluate(model, tokenizer(), opened)
    name = f"denoising_loss/text_file@{SEQ_LEN}"
    assert list(scores.metrics) == [name]
    wanted = denoising_loss(model, progressions(6, seed=7).flatten(), SEQ_LEN, max_windows=5, batch_size=16)
    assert scores.metrics[name] == wanted.value
    facts = scores.protocol[name]
    assert facts["n_windows"] == 5 and facts["mask_shares"] == 8 and facts["mask_seed"] == 0
    assert facts["standard_error"] == wanted.standard_error and facts["corpus_tokens"] == 6 * SEQ_LEN


def test_a_sample_fills_masks_in() -> None:
    text = progressions(1, seed=7)[0]
    prompt = words(text[:24])
    first, again = (denoised_sample(trained_diffusion(), tokenizer(), prompt, n_tokens=8) for _ in range(2))
    assert first == again and first.startswith(prompt)
    found = first.split()
    assert len(found) == SEQ_LEN and "[MASK]" not in found
    assert sum(a == b for a, b in zip(found[24:], words(text[24:]).split(), strict=True)) >= 4
