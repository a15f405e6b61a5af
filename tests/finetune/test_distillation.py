"""Hyperparameters that are refused."""

from __future__ import annotations

from typing import Any

import pytest

import ptq161
from ptq161.errors import UserError
from ptq161.finetune.distillation import Distillation, check_learnable


@pytest.mark.parametrize(
    ("values", "sentence"),
    [
        ({"update": "lora"}, "finetune.update=lora: use one of scales, codes."),
        ({"objective": "lm"}, "finetune.objective=lm: use one of kl, kl_hidden."),
        ({"text": "squad"}, "finetune.text=squad: use one of corpora, self."),
        ({"compute_dtype": "float16"}, "finetune.compute_dtype=float16: use one of float32, bfloat16."),
        ({"corpora": ["text_file"]}, "finetune.corpora=[text_file] needs a file: set finetune.text_file=FILE."),
        ({"corpora": []}, "finetune.corpora is empty: use one or more of squad, drop, coqa, passages, "),
        *(
            ({name: 0}, f"finetune.{name}=0: use at least 1.")
            for name in ("steps", "batch_size", "accumulation", "checkpoint_every", "held_out_every", "patience")
        ),
        ({"held_out": -1}, "finetune.held_out=-1: use at least 0."),
        ({"seq_len": 1}, "finetune.seq_len=1: use at least 2."),
        *(
            ({name: 0.0}, f"finetune.{name}=0.0: use a finite number above 0.")
            for name in ("lr", "code_lr", "hidden_weight", "max_grad_norm")
        ),
        ({"warmup_share": 1.0}, "finetune.warmup_share=1.0: use a share in [0, 1)."),
    ],
)
def test_one_sentence_names_the_setting(values: dict[str, Any], sentence: str) -> None:
    with pytest.raises(UserError) as caught:
        Distillation(**values)
    assert str(caught.value).startswith(sentence)


def test_codes_of_a_method_are_refused_by_its_format() -> None:
    with pytest.raises(UserError) as caught:
        check_learnable(ptq161.RTN(), "rtn")
    assert str(caught.value) == (
        "finetune.update=codes: the codes of method=rtn (format uniform) cannot be learned; use finetune=scales, or a "
        "method of another format, such as waterfill or ptq161."
    )
    check_learnable(ptq161.PTQ161(), "ptq161")
    foreign: Any = object()
    check_learnable(foreign, "mine")  # what it stores is seen when it is there
