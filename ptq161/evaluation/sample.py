"""A greedy text sample, which shows what a perplexity means."""

from __future__ import annotations

import torch
from transformers import PreTrainedModel, PreTrainedTokenizerBase


@torch.no_grad()
def greedy_sample(model: PreTrainedModel, tokenizer: PreTrainedTokenizerBase, prompt: str, n_tokens: int) -> str:
    """Continue a prompt with the most likely tokens.

    A loop of plain forward passes: ``generate`` would apply the model's own generation settings, which differ from
    model to model, and for a few dozen tokens a key-value cache saves little.

    Args:
        model: a causal language model.
        tokenizer: its tokenizer.
        prompt: text to continue; not empty.
        n_tokens: most new tokens; the end-of-text token ends the sample earlier.

    Returns:
        prompt and continuation, without special tokens.
    """
    model.train(False)
    tokens = tokenizer(prompt, return_tensors="pt")["input_ids"].to(model.device)
    for _ in range(n_tokens):
        logits = model(input_ids=tokens, use_cache=False, logits_to_keep=1).logits
        following = logits[:, -1].argmax(-1, keepdim=True)
        if int(following) == tokenizer.eos_token_id:
            break
        tokens = torch.cat([tokens, following], dim=1)
    return str(tokenizer.decode(tokens[0], skip_special_tokens=True))
