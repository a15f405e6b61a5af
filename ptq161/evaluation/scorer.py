"""lm-eval's Hugging Face model, scoring faster and in float32.

lm-eval computes logits for every position of a request and normalises them in the model's dtype; with a vocabulary
of 49k in bfloat16 that takes most of the time and loses digits. Here the output head sees only the positions from
the first continuation on, and the normalisation is in float32. Requests, tokenization, truncation and metrics stay
lm-eval's.
"""

from __future__ import annotations

import copy
from collections import defaultdict
from collections.abc import Iterator
from typing import Any

import torch
from lm_eval.models.huggingface import HFLM
from torch import Tensor
from tqdm import tqdm
from transformers import PreTrainedModel, PreTrainedTokenizerBase

# ((context, continuation), context tokens, continuation tokens): what lm-eval hands to a model.
TokenizedRequest = tuple[tuple[str, str] | None, list[int], list[int]]
# (log-likelihood in nats, whether every token is the most likely one): what it wants back.
Answer = tuple[float, bool]
# Model input -> the continuations (request index, tokens) whose predictions it holds.
Groups = dict[tuple[int, ...], list[tuple[int, list[int]]]]


class Scorer(HFLM):  # type: ignore[misc]  # lm-eval is untyped
    """An already built model behind lm-eval's interface; dtype, device and modules stay as they are."""

    def __init__(
        self,
        model: PreTrainedModel,
        tokenizer: PreTrainedTokenizerBase,
        *,
        batch_size: int,
        progress: str | None = None,
    ) -> None:
        """Hand the model over to lm-eval.

        Args:
            model: a causal language model; it is put into evaluation mode.
            tokenizer: its tokenizer; a copy is used, since lm-eval gives it a padding token.
            batch_size: sequences per forward pass.
            progress: label of the progress bar; None shows none.
        """
        tokenizer = copy.deepcopy(tokenizer)
        super().__init__(pretrained=model, tokenizer=tokenizer, backend="causal", batch_size=batch_size)
        self.progress = progress

    def loglikelihood(self, requests: list[Any], disable_tqdm: bool = False) -> list[Answer]:
        """Score lm-eval's ``(context, continuation)`` requests, with one progress bar instead of lm-eval's two."""
        answers: list[Answer] = super().loglikelihood(requests, disable_tqdm=True)
        return answers

    @torch.no_grad()
    def _loglikelihood_tokens(
        self, requests: list[TokenizedRequest], disable_tqdm: bool = False, override_bs: int | None = None
    ) -> list[Answer]:
        """Score tokenized requests, the longest first, so that little is padded and a lack of memory shows at once."""
        groups = group_by_input(requests, self.max_length)
        inputs = sorted(groups, key=lambda tokens: (-len(tokens), tokens))
        answers: dict[int, Answer] = {}
        with tqdm(total=len(requests), desc=self.progress, unit="request", disable=self.progress is None) as bar:
            for start in range(0, len(inputs), self.batch_size):
                batch = inputs[start : start + self.batch_size]
                for request, answer in self._score(batch, groups):
                    answers[request] = answer
                    bar.update()
        return [answers[request] for request in range(len(requests))]

    def _score(self, batch: list[tuple[int, ...]], groups: Groups) -> Iterator[tuple[int, Answer]]:
        """Yield (request index, answer) for every continuation of a batch of inputs."""
        longest = max(len(tokens) for tokens in batch)
        # Padding stands on the right, where a causal model's earlier positions do not see it.
        padded = torch.tensor([[*tokens, *[0] * (longest - len(tokens))] for tokens in batch], device=self.device)
        firsts = [len(tokens) - max(len(wanted) for _, wanted in groups[tokens]) for tokens in batch]
        dropped = min(firsts)
        logits = self.model(input_ids=padded, use_cache=False, logits_to_keep=longest - dropped).logits
        for row, tokens, first in zip(logits, batch, firsts, strict=True):
            needed = row[first - dropped : len(tokens) - dropped].float()
            yield from _answers(needed.log_softmax(-1), groups[tokens])


def group_by_input(requests: list[TokenizedRequest], max_length: int) -> Groups:
    """Gather the requests that need the same forward pass, such as the choices "yes" and "no" after one question.

    The input of a request is its context and continuation without the last token, cut on the left to ``max_length``.
    """
    groups: Groups = defaultdict(list)
    for index, (_, context, continuation) in enumerate(requests):
        tokens = (context + continuation)[-(max_length + 1) :]
        groups[tuple(tokens[:-1])].append((index, continuation))
    return groups


def _answers(log_probs: Tensor, continuations: list[tuple[int, list[int]]]) -> Iterator[tuple[int, Answer]]:
    """Score continuations that all end at the last row of ``log_probs [positions, vocabulary]``."""
    greedy = log_probs.argmax(-1)
    for request, continuation in continuations:
        wanted = torch.tensor(continuation, device=log_probs.device)
        rows = log_probs[-len(continuation) :]
        total = rows.gather(1, wanted[:, None]).sum()
        yield request, (float(total), bool((greedy[-len(continuation) :] == wanted).all()))
