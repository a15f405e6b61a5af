"""lm-eval's Hugging Face model, scoring faster and in float32.

lm-eval runs the context of a question once for every answer, computes logits for every position and normalizes them
in the model's dtype; with a vocabulary of 49k in bfloat16 that costs time and digits. Here answers to one question
share the keys and values of their context, logits are computed only at the positions that predict an answer, and the
normalization is in float32. Requests, tokenization, truncation and metrics are lm-eval's.
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
from transformers import DynamicCache, PreTrainedModel, PreTrainedTokenizerBase

# What lm-eval passes to a model: ((context, continuation), context tokens, continuation tokens).
_TokenizedRequest = tuple[tuple[str, str] | None, list[int], list[int]]
# What it expects back: (log-likelihood in nats, whether every token is the most likely one).
_Answer = tuple[float, bool]
# Context -> the requests (index, continuation) that follow it.
_Group = tuple[tuple[int, ...], list[tuple[int, list[int]]]]


class Scorer(HFLM):  # type: ignore[misc]  # lm-eval is untyped
    """An already built model behind lm-eval's interface; dtype, device and modules stay as they are.

    Args:
        model: a causal language model; it is put into evaluation mode.
        tokenizer: its tokenizer; a copy is used, since lm-eval gives it a padding token.
        batch_size: sequences per forward pass.
        progress: label of the progress bar; None shows none.
    """

    def __init__(
        self,
        model: PreTrainedModel,
        tokenizer: PreTrainedTokenizerBase,
        *,
        batch_size: int,
        progress: str | None = None,
    ) -> None:
        tokenizer = copy.deepcopy(tokenizer)
        super().__init__(pretrained=model, tokenizer=tokenizer, backend="causal", batch_size=batch_size)
        self.progress = progress

    def loglikelihood(self, requests: list[Any], disable_tqdm: bool = False) -> list[_Answer]:
        """Score lm-eval's ``(context, continuation)`` requests, with one progress bar instead of lm-eval's two."""
        answers: list[_Answer] = super().loglikelihood(requests, disable_tqdm=True)
        return answers

    @torch.no_grad()
    def _loglikelihood_tokens(
        self, requests: list[_TokenizedRequest], disable_tqdm: bool = False, override_bs: int | None = None
    ) -> list[_Answer]:
        """Score tokenized requests, the longest first: little padding, and a lack of memory shows at once."""
        shared, single = _group_by_context(requests, self.max_length)
        answers: dict[int, _Answer] = {}
        with tqdm(total=len(requests), desc=self.progress, unit="request", disable=self.progress is None) as bar:
            for groups, score in ((shared, _score_shared), (single, _score_single)):
                for batch in _batches(groups, self.batch_size):
                    for request, answer in score(self.model, batch):
                        answers[request] = answer
                        bar.update()
        return [answers[request] for request in range(len(requests))]


def _group_by_context(requests: list[_TokenizedRequest], max_length: int) -> tuple[list[_Group], list[_Group]]:
    """Separate the contexts that several requests share from those of a single request.

    A request of more than ``max_length`` tokens loses its beginning, as in lm-eval, and shares nothing.
    """
    together: dict[tuple[int, ...], list[tuple[int, list[int]]]] = defaultdict(list)
    single: list[_Group] = []
    for index, (_, context, continuation) in enumerate(requests):
        if len(context) + len(continuation) > max_length:
            kept = (context + continuation)[-(max_length + 1) : -len(continuation)]
            single.append((tuple(kept), [(index, continuation)]))
        else:
            together[tuple(context)].append((index, continuation))
    shared = [group for group in together.items() if len(group[1]) > 1]
    single += [group for group in together.items() if len(group[1]) == 1]
    return shared, single


def _batches(groups: list[_Group], batch_size: int) -> Iterator[list[_Group]]:
    """Yield groups of similar length, the longest first, with at most ``batch_size`` continuations in a batch."""

    def length(group: _Group) -> int:
        return len(group[0]) + max(len(continuation) for _, continuation in group[1])

    batch: list[_Group] = []
    n_continuations = 0
    for group in sorted(groups, key=lambda group: (-length(group), group[0])):
        if batch and n_continuations + len(group[1]) > batch_size:
            yield batch
            batch, n_continuations = [], 0
        batch.append(group)
        n_continuations += len(group[1])
    if batch:
        yield batch


def _score_single(model: PreTrainedModel, batch: list[_Group]) -> Iterator[tuple[int, _Answer]]:
    """Score groups of one request each: one forward pass over context and continuation."""
    texts = [[*context, *requests[0][1]][:-1] for context, requests in batch]
    # Padding on the right does not change the logits of a causal model at earlier positions.
    inputs, _ = _pad(texts, "right", model.device)
    firsts = [len(context) - 1 for context, _ in batch]
    kept = inputs.shape[1] - min(firsts)
    logits = model(input_ids=inputs, use_cache=False, logits_to_keep=kept).logits
    for row, first, (_, [(request, continuation)]) in zip(logits, firsts, batch, strict=True):
        start = first - min(firsts)
        yield request, _answer(row[start : start + len(continuation)], continuation)


def _score_shared(model: PreTrainedModel, batch: list[_Group]) -> Iterator[tuple[int, _Answer]]:
    """Score groups of several requests: a pass over the contexts, then one over all continuations after them.

    Contexts are padded on the left and continuations on the right, as in generation, so that a sliding window spans the
    same tokens as without padding.
    """
    contexts, seen = _pad([list(context) for context, _ in batch], "left", model.device)
    positions = (seen.cumsum(1) - 1).clamp(min=0)
    cache = DynamicCache(config=model.config)
    output = model(
        input_ids=contexts,
        attention_mask=seen,
        position_ids=positions,
        past_key_values=cache,
        use_cache=True,
        logits_to_keep=1,
    )
    owners = torch.tensor([i for i, (_, requests) in enumerate(batch) for _ in requests], device=model.device)
    requests = [request for _, group in batch for request in group]
    logits = output.logits[owners]
    # The last token of a continuation is predicted, never an input; a single token needs no second pass.
    texts = [continuation[:-1] for _, continuation in requests]
    if any(texts):
        cache.batch_select_indices(owners)
        inputs, read = _pad(texts, "right", model.device)
        first = positions[owners, -1:] + 1
        output = model(
            input_ids=inputs,
            attention_mask=torch.cat([seen[owners], read], dim=1),
            position_ids=first + torch.arange(inputs.shape[1], device=model.device),
            past_key_values=cache,
            use_cache=True,
        )
        logits = torch.cat([logits, output.logits], dim=1)
    for row, (request, continuation) in zip(logits, requests, strict=True):
        yield request, _answer(row[: len(continuation)], continuation)


def _pad(texts: list[list[int]], side: str, device: torch.device) -> tuple[Tensor, Tensor]:
    """Return tokens ``[b, longest]`` and a mask of the same shape that is 1 on tokens and 0 on padding."""
    longest = max(map(len, texts))
    tokens, mask = [], []
    for text in texts:
        padding, seen = [0] * (longest - len(text)), [1] * len(text)
        tokens.append(padding + text if side == "left" else text + padding)
        mask.append(padding + seen if side == "left" else seen + padding)
    return torch.tensor(tokens, device=device), torch.tensor(mask, device=device)


def _answer(logits: Tensor, continuation: list[int]) -> _Answer:
    """Score a continuation from the logits ``[its length, vocabulary]`` that predict it."""
    log_probs = logits.float().log_softmax(-1)
    wanted = torch.tensor(continuation, device=logits.device)
    total = log_probs.gather(1, wanted[:, None]).sum()
    return float(total), bool((log_probs.argmax(-1) == wanted).all())
