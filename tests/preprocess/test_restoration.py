"""Hyperparameters that are refused."""

from __future__ import annotations

from typing import Any

import pytest

from ptq161.errors import UserError
from ptq161.models.architectures import ARCHITECTURES
from ptq161.preprocess.restoration import Restoration
from ptq161.training.targets import ROLES


@pytest.mark.parametrize(
    ("values", "sentence"),
    [
        ({"update": "ia3"}, "preprocess.update=ia3: use one of lora, full."),
        ({"objective": "mse"}, "preprocess.objective=mse: use one of lm, kl, kl_hidden."),
        ({"mask": "second"}, "preprocess.mask=second: use one of first, fresh."),
        ({"compute_dtype": "float16"}, "preprocess.compute_dtype=float16: use one of float32, bfloat16."),
        ({"targets": ["q", "x"]}, "preprocess.targets=x: use one of q, k, v, o, gate, up, down."),
        ({"targets": []}, "preprocess.targets is empty: use one or more of q, k, v, o, gate, up, down."),
        (
            {"corpora": ["boolq"]},
            "preprocess.corpora=boolq: use one of squad, drop, coqa, passages, wikitext2, c4, ptb, redpajama, "
            "text_file.",
        ),
        ({"corpora": ["text_file"]}, "preprocess.corpora=[text_file] needs a file: set preprocess.text_file=FILE."),
        *(
            ({name: 0}, f"preprocess.{name}=0: use at least 1.")
            for name in ("rank", "steps", "batch_size", "accumulation", "rounds", "checkpoint_every")
        ),
        ({"arithmetic": "int8"}, "preprocess.arithmetic=int8: use one of float, gse, metis, nvfp4, mxfp4, fp8."),
        ({"base": "int4"}, "preprocess.base=int4: use one of packed, nf4."),
        (
            {"base": "nf4", "update": "full"},
            "preprocess.base=nf4: a full update has no base; use preprocess.update=lora.",
        ),
        ({"format": "fp4"}, "preprocess.format=fp4: use one of nvfp4, mxfp4, fp8."),
        ({"spectral_rank": -1}, "preprocess.spectral_rank=-1: use at least 0."),
        ({"refresh_every": 0}, "preprocess.refresh_every=0: use at least 1."),
        ({"spectral_factors": "half"}, "preprocess.spectral_factors=half: use one of format, float."),
        (
            {"spectral_schedule": "linear", "spectral_rank": 2},
            "preprocess.spectral_schedule=linear: use one of none, ysche, amplified.",
        ),
        (
            {"spectral_schedule": "ysche"},
            "preprocess.spectral_schedule=ysche: it changes singular values that are split off; set "
            "preprocess.spectral_rank to at least 1.",
        ),
        ({"regulariser": -0.1, "update": "full"}, "preprocess.regulariser=-0.1: use at least 0."),
        ({"regulariser": 0.1}, "preprocess.regulariser=0.1: it is of whole weights; use preprocess.update=full."),
        ({"bits": 9}, "preprocess.bits=9: use 2 to 8."),
        ({"group_size": 0}, "preprocess.group_size=0: use at least 1."),
        ({"seq_len": 1}, "preprocess.seq_len=1: use at least 2."),
        ({"lr": 0.0}, "preprocess.lr=0.0: use a finite number above 0."),
        ({"alpha": -1.0}, "preprocess.alpha=-1.0: use a finite number above 0."),
        ({"hidden_weight": 0.0}, "preprocess.hidden_weight=0.0: use a finite number above 0."),
        ({"max_grad_norm": float("inf")}, "preprocess.max_grad_norm=inf: use a finite number above 0."),
        ({"dropout": 1.0}, "preprocess.dropout=1.0: use a share in [0, 1)."),
        ({"warmup_share": -0.1}, "preprocess.warmup_share=-0.1: use a share in [0, 1)."),
    ],
)
def test_one_sentence_names_the_setting(values: dict[str, Any], sentence: str) -> None:
    with pytest.raises(UserError) as caught:
        Restoration(**values)
    assert str(caught.value) == sentence


def test_every_quantized_linear_has_a_role() -> None:
    ends = [end for ends in ROLES.values() for end in ends]
    assert len(ends) == len(set(ends))
    for architecture in ARCHITECTURES.values():
        for group in architecture.linears:
            for path in group:
                assert path.rpartition(".")[2] in ends
