"""Text that a model says itself: training text of any length, in the distribution that is to be kept."""

from __future__ import annotations

import torch
from torch import Tensor
from tqdm.auto import tqdm
from transformers import PreTrainedModel, PreTrainedTokenizerBase

from ptq161.models.checks import check_head, evaluation_mode
from ptq161.numerics import plain_torch
from ptq161.seeding import draw


def first_token(tokenizer: PreTrainedTokenizerBase) -> int | None:
    """Return the token that sampled texts begin with: the one that begins a text, else that of its end, else None."""
    token = tokenizer.eos_token_id if tokenizer.bos_token_id is None else tokenizer.bos_token_id
    return None if token is None else int(token)


@plain_torch()
def sample_text(
    model: PreTrainedModel,
    n: int,
    seq_len: int,
    generator: torch.Generator,
    *,
    first: int | None = None,
    batch_size: int = 64,
    progress: bool = False,
) -> Tensor:
    """Sample sequences from a model at temperature one, with its key-value cache.

    Args:
        model: a causal language model; its dtype and device are those of the arithmetic.
        n: number of sequences.
        seq_len: tokens of each, the first one included.
        generator: of the CPU, from which every random number comes.
        first: the token that all sequences begin with; None draws one for each, any being as likely.
        batch_size: sequences at a time; the text depends on it.
        progress: show a progress bar.

    Returns:
        ``[n, seq_len]`` int64, in host memory. A text that ends goes on with whatever follows its end.

    Raises:
        UserError: the model has no head.
    """
    check_head(model)
    batches = []
    with evaluation_mode(model), torch.no_grad(), tqdm(total=n, desc="sample", disable=not progress) as bar:
        for start in range(0, n, batch_size):
            batches.append(_sample(model, min(batch_size, n - start), seq_len, generator, first))
            bar.update(len(batches[-1]))
    return torch.cat(batches)


def _sample(model: PreTrainedModel, n: int, seq_len: int, generator: torch.Generator, first: int | None) -> Tensor:
    vocabulary = next(model.get_input_embeddings().parameters()).shape[0]
    tokens = torch.empty(n, seq_len, dtype=torch.int64)
    tokens[:, 0] = torch.randint(vocabulary, (n,), generator=generator) if first is None else first
    cache = None
    for i in range(1, seq_len):
        read = tokens[:, i - 1 : i].to(model.device)
        output = model(input_ids=read, past_key_values=cache, use_cache=True, logits_to_keep=1)
        cache = output.past_key_values
        probabilities = output.logits[:, -1].float().softmax(-1).cpu()
        tokens[:, i] = draw(probabilities, generator)
    return tokens
