"""Quantize a model of your own, save it, load it again, and compare bits and perplexity before and after.

Usage::

    python examples/quantize_your_own_model.py --model FOLDER --text FILE    # a Hugging Face folder and a UTF-8 text
    python examples/quantize_your_own_model.py --tiny --text README.md       # a random model made on the spot: seconds

The first half of the text calibrates, the second half is scored. Supported: Llama, Mistral, Qwen2/3, OPT, Gemma 2/3.
The perplexity needs the extra ``run`` (``pip install '.[run]'``), everything else the library's core alone.
"""

from __future__ import annotations

import argparse
import logging
import tempfile
from pathlib import Path

import torch
from tokenizers import Tokenizer, decoders, models, pre_tokenizers
from torch import Tensor
from transformers import (
    AutoModelForCausalLM,
    AutoTokenizer,
    LlamaConfig,
    LlamaForCausalLM,
    PreTrainedModel,
    PreTrainedTokenizerBase,
    PreTrainedTokenizerFast,
)

import ptq161
from ptq161.evaluation import perplexity
from ptq161.packed.model import measure


def main() -> None:
    """Quantize, save, load, measure."""
    options = parse()
    model, tokenizer = tiny_model() if options.tiny else load_folder(options.model)
    calibration, scored = split_text(tokenizer, options.text, options.samples, options.seq_len)
    before = perplexity(model, scored, options.seq_len, max_windows=options.windows)

    method = ptq161.PTQ161(mask_ratio=0.2, epochs=options.epochs, scale_lr=0.001, angle_lr=0.01, batch_size=4)
    model = ptq161.quantize(model, calibration, method, progress=True)

    folder = options.out or Path(tempfile.mkdtemp(prefix="ptq161-")) / "checkpoint"
    file = ptq161.save(model, tokenizer, folder, nominal_bits=method.nominal_bits())
    model, tokenizer = ptq161.load(folder)
    after = perplexity(model, scored, options.seq_len, max_windows=options.windows)

    size = measure(model)
    print(f"perplexity: {before.value:.2f} in full precision, {after.value:.2f} packed")
    print(f"bits per weight: {size.bits_per_weight:.2f} measured, {method.nominal_bits():.2f} nominal")
    print(f"bytes: {size.linear_bytes:,} of packed linears, {size.other_bytes:,} of everything else")
    print(f"checkpoint: {file}")


def load_folder(folder: Path) -> tuple[PreTrainedModel, PreTrainedTokenizerBase]:
    """Load a Hugging Face folder in float32."""
    model = AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32)
    return model.eval(), AutoTokenizer.from_pretrained(folder)


def split_text(tokenizer: PreTrainedTokenizerBase, file: Path, n_samples: int, seq_len: int) -> tuple[Tensor, Tensor]:
    """Return calibration windows ``[n_samples, seq_len]`` of the first half of a text, and the second half ``[n]``."""
    # The whole text is longer than the model holds, which tokenizers warn of; it is cut into windows below.
    logging.getLogger("transformers").setLevel(logging.ERROR)
    tokens = tokenizer(file.read_text(encoding="utf-8"), return_tensors="pt").input_ids[0]
    half = len(tokens) // 2
    if half < seq_len:
        raise SystemExit(f"{file} has {len(tokens)} tokens: give a text of at least {2 * seq_len}.")
    starts = torch.randint(half - seq_len + 1, (n_samples,), generator=torch.Generator().manual_seed(0))
    return torch.stack([tokens[start : start + seq_len] for start in starts.tolist()]), tokens[half:]


def tiny_model() -> tuple[PreTrainedModel, PreTrainedTokenizerBase]:
    """Make a random Llama of two blocks and a tokenizer of bytes: enough to see every step at work."""
    symbols = sorted(pre_tokenizers.ByteLevel.alphabet())
    backend = Tokenizer(models.BPE(vocab={symbol: i for i, symbol in enumerate(symbols)}, merges=[]))
    backend.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    backend.decoder = decoders.ByteLevel()
    config = LlamaConfig(
        vocab_size=len(symbols),
        hidden_size=64,
        intermediate_size=96,
        num_hidden_layers=2,
        num_attention_heads=4,
        max_position_embeddings=512,
    )
    torch.manual_seed(0)
    return LlamaForCausalLM(config).eval(), PreTrainedTokenizerFast(tokenizer_object=backend)


def parse() -> argparse.Namespace:
    """Read the command line."""
    parser = argparse.ArgumentParser(description=(__doc__ or "").partition("\n")[0])
    source = parser.add_mutually_exclusive_group(required=True)
    source.add_argument("--model", type=Path, metavar="FOLDER", help="a Hugging Face folder")
    source.add_argument("--tiny", action="store_true", help="a random model made on the spot")
    parser.add_argument("--text", type=Path, required=True, metavar="FILE", help="a UTF-8 text")
    parser.add_argument("--out", type=Path, metavar="FOLDER", help="where the checkpoint goes (a temporary folder)")
    parser.add_argument("--samples", type=int, default=8, metavar="N", help="calibration windows (8)")
    parser.add_argument("--seq-len", type=int, default=128, metavar="N", help="tokens per window (128)")
    parser.add_argument("--windows", type=int, default=16, metavar="N", help="windows scored (16)")
    parser.add_argument("--epochs", type=int, default=4, metavar="N", help="passes over the calibration windows (4)")
    return parser.parse_args()


if __name__ == "__main__":
    main()
