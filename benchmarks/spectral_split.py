"""The loss of the embedded model in Metis' arithmetic, with the spectral split and without it; nothing is trained.

    python benchmarks/spectral_split.py                       # NVFP4, rank 9, two sequences of 256 tokens
    python benchmarks/spectral_split.py --format mxfp4 --sequences 8

Inputs and weights of all linears of the decoder blocks are quantized, to nearest and at random.
"""

from __future__ import annotations

import argparse

import torch
from torch import Tensor
from transformers import PreTrainedModel

from ptq161.models.architectures import decoder_blocks, quantized_linears
from ptq161.models.loading import load_model
from ptq161.models.settings import ModelConfig
from ptq161.preprocess.restoration import Restoration
from ptq161.training.arithmetic.linears import TrainedLinear
from ptq161.training.arithmetic.metis import FORMATS
from ptq161.training.text import training_tokens

SEQ_LEN = 256


def main() -> None:
    """Print a loss for each way to quantize."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--format", choices=FORMATS, default="nvfp4")
    parser.add_argument("--rank", type=int, default=9)
    parser.add_argument("--sequences", type=int, default=2)
    options = parser.parse_args()
    model, tokenizer = load_model(ModelConfig(name="smollm2_135m", asset="smollm2_135m"))
    model = model.float().eval()
    text = Restoration(update="full", steps=4, accumulation=1, seq_len=SEQ_LEN, corpora=["squad", "drop", "coqa"])
    tokens = training_tokens(tokenizer, text, 0)[: options.sequences]
    print(f"float: {loss_of(model, tokens):.3f}", flush=True)
    linears = dict(quantized_linears(model))
    for name, changes in {
        "direct": {"spectral_rank": 0},
        "split, U and V in the format": {"spectral_rank": options.rank},
        "split, U and V in float": {"spectral_rank": options.rank, "spectral_factors": "float"},
    }.items():
        for stochastic in (False, True):
            settings = Restoration(
                update="full",
                arithmetic="metis",
                format=options.format,
                refresh_every=1,
                stochastic_rounding=stochastic,
                **changes,
            )
            torch.manual_seed(0)
            for path, linear in linears.items():
                decoder_blocks(model).set_submodule(path, TrainedLinear(linear, settings))
            rounding = "at random" if stochastic else "to nearest"
            print(f"{options.format}, {name}, {rounding}: {loss_of(model, tokens):.3f}", flush=True)


@torch.no_grad()
def loss_of(model: PreTrainedModel, tokens: Tensor) -> float:
    """Return the mean loss of the next token, over sequences one at a time."""
    return sum(float(model(row, labels=row).loss) for row in tokens.split(1)) / len(tokens)


if __name__ == "__main__":
    main()
