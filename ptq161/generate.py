"""Text from a packed checkpoint, as it arises.

::

    ptq161 generate CHECKPOINT "The capital of France is"
    ptq161 generate CHECKPOINT "Once upon a time" --temperature 0.8 --max-new-tokens 200
    ptq161 generate CHECKPOINT "Once upon a time" --int8 --threads 4

The text goes to stdout; tokens per second and the memory of the process go to stderr at the end. The weights stay
packed: products of few rows are computed from their bytes.
"""

from __future__ import annotations

import argparse
import math
import os
import sys
import time
from collections.abc import Sequence
from contextlib import nullcontext
from typing import TYPE_CHECKING, Any, NamedTuple

import psutil
import torch
from torch import Tensor
from transformers import GenerationConfig, TextStreamer

from ptq161.errors import UserError
from ptq161.files.streams import never_fail_to_print
from ptq161.models.architectures import max_seq_len
from ptq161.packed.checkpoint import load
from ptq161.packed.linear import int8_activations

if TYPE_CHECKING:
    from transformers import PreTrainedModel, PreTrainedTokenizerBase


class Generated(NamedTuple):
    """What was generated, and how fast.

    Attributes:
        tokens: ``[n]`` int64, the new tokens.
        prompt_tokens: number of tokens of the prompt.
        prompt_seconds: until the first new token.
        seconds: from the first new token to the last.
    """

    tokens: Tensor
    prompt_tokens: int
    prompt_seconds: float
    seconds: float

    @property
    def tokens_per_second(self) -> float:
        """Of the tokens behind the first one; NaN where there is none."""
        return (len(self.tokens) - 1) / self.seconds if len(self.tokens) > 1 else math.nan


def main(arguments: Sequence[str] | None = None) -> int:
    """Run the command.

    Args:
        arguments: of the command line; None takes the process's own.

    Returns:
        the exit status: 0, or 1 with one sentence on stderr.
    """
    options = _parser().parse_args(arguments)
    try:
        _check(options)
        if options.threads is not None:
            torch.set_num_threads(options.threads)
        model, tokenizer = load(options.checkpoint)
        with int8_activations(model) if options.int8 else nullcontext():
            found = generate(
                model,
                tokenizer,
                options.prompt,
                max_new_tokens=options.max_new_tokens,
                temperature=options.temperature,
                seed=options.seed,
            )
    except UserError as error:
        print(error, file=sys.stderr)
        return 1
    except KeyboardInterrupt:
        return 130
    memory = psutil.Process().memory_info().rss / 1e6
    print(
        f"{found.prompt_tokens} tokens of prompt in {found.prompt_seconds:.2f} s, {len(found.tokens)} new at "
        f"{found.tokens_per_second:.1f} tokens per second, {torch.get_num_threads()} threads, "
        f"{memory:.0f} MB resident.",
        file=sys.stderr,
    )
    return 0


def generate(
    model: PreTrainedModel,
    tokenizer: PreTrainedTokenizerBase,
    prompt: str,
    *,
    max_new_tokens: int = 100,
    temperature: float | None = None,
    seed: int = 0,
) -> Generated:
    """Continue a prompt, and print the text to stdout as it arises.

    Args:
        model: a causal language model.
        tokenizer: its tokenizer.
        prompt: any text of at least one token.
        max_new_tokens: at most; a token of the model that ends a text ends it earlier.
        temperature: of sampling from all tokens; None takes the most probable token each time.
        seed: of the sampling.

    Raises:
        UserError: the prompt has no token or is too long for the model, or the model gives no tokens.
    """
    if not model.can_generate():
        raise UserError(f"{type(model).__name__} has no head that gives tokens: use a causal language model.")
    encoded = tokenizer(prompt, return_tensors="pt")
    tokens: Tensor = encoded["input_ids"].to(model.device)
    n = tokens.shape[-1]
    longest = max_seq_len(model.config)
    if n == 0:
        raise UserError("the prompt is empty: give some text to continue.")
    if longest is not None and n + max_new_tokens > longest:
        raise UserError(
            f"{n} tokens of prompt and --max-new-tokens {max_new_tokens} are more than the {longest} of the model."
        )
    ends = model.generation_config.eos_token_id
    first_end = ends[0] if isinstance(ends, list) else ends
    settings = GenerationConfig(
        max_new_tokens=max_new_tokens,
        do_sample=temperature is not None,
        temperature=temperature,
        top_k=0 if temperature is not None else None,
        eos_token_id=ends,
        pad_token_id=first_end,
    )
    streamer = _TimedStreamer(tokenizer, skip_prompt=True)
    with torch.random.fork_rng(devices=[model.device] if model.device.type == "cuda" else []):
        torch.manual_seed(seed)
        run: Any = model.generate
        found: Tensor = run(
            tokens, attention_mask=torch.ones_like(tokens), generation_config=settings, streamer=streamer
        )
    began, first, *_ = times = streamer.times
    return Generated(found[0, n:], n, first - began, times[-1] - first)


class _TimedStreamer(TextStreamer):
    """Prints tokens, and notes when each came: the prompt first."""

    def __init__(self, tokenizer: PreTrainedTokenizerBase, skip_prompt: bool) -> None:
        super().__init__(tokenizer, skip_prompt=skip_prompt)
        self.times: list[float] = []

    def put(self, value: Tensor) -> None:
        self.times.append(time.perf_counter())
        super().put(value)  # type: ignore[no-untyped-call]  # transformers leaves it without annotations


def _check(options: argparse.Namespace) -> None:
    for name in ("threads", "max_new_tokens"):
        value = getattr(options, name)
        if value is not None and value < 1:
            raise UserError(f"--{name.replace('_', '-')} {value}: use at least 1.")
    if options.temperature is not None and not 0 < options.temperature < math.inf:
        raise UserError(f"--temperature {options.temperature:g}: use a positive number, or --greedy.")


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(
        prog="python -m ptq161.generate", description="Continue a text with a packed model."
    )
    parser.add_argument(
        "checkpoint", type=os.path.expanduser, metavar="CHECKPOINT", help="folder that ptq161.save or a run has written"
    )
    parser.add_argument("prompt", metavar="PROMPT", help="the text to continue")
    parser.add_argument("--max-new-tokens", type=int, default=100, metavar="N", help="tokens to add at most (100)")
    how = parser.add_mutually_exclusive_group()
    how.add_argument("--greedy", action="store_true", help="the most probable token each time (the default)")
    how.add_argument("--temperature", type=float, metavar="T", help="sample at this temperature")
    parser.add_argument("--seed", type=int, default=0, metavar="SEED", help="of the sampling (0)")
    parser.add_argument("--threads", type=int, metavar="N", help="threads of the CPU (as many as torch takes)")
    parser.add_argument(
        "--int8", action="store_true", help="round activations to eight bits: faster, and another result"
    )
    return parser


if __name__ == "__main__":
    never_fail_to_print()
    sys.exit(main())
