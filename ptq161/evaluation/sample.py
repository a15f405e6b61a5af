"""A greedy text sample: what a perplexity looks like when it is read."""

from __future__ import annotations

import torch
from transformers import GenerationConfig, PreTrainedModel, PreTrainedTokenizerBase


@torch.no_grad()
def greedy_sample(model: PreTrainedModel, tokenizer: PreTrainedTokenizerBase, prompt: str, n_tokens: int) -> str:
    """Continue a prompt with the most likely tokens.

    Args:
        model: a causal language model.
        tokenizer: its tokenizer.
        prompt: text to continue, not empty.
        n_tokens: at most so many new tokens; an end-of-text token ends the sample.

    Returns:
        Prompt and continuation, without special tokens.
    """
    model.eval()
    inputs = tokenizer(prompt, return_tensors="pt").to(model.device)
    end = tokenizer.eos_token_id
    # Not the model's own generation config, which may sample or stop differently from model to model.
    config = GenerationConfig(
        do_sample=False,
        num_beams=1,
        max_new_tokens=n_tokens,
        bos_token_id=tokenizer.bos_token_id,
        eos_token_id=end,
        pad_token_id=end if tokenizer.pad_token_id is None else tokenizer.pad_token_id,
    )
    own, model.generation_config = model.generation_config, config
    try:
        # Called through the class: on an instance, type checkers take the attribute for a submodule or a tensor.
        tokens = type(model).generate(model, input_ids=inputs["input_ids"], attention_mask=inputs["attention_mask"])
    finally:
        model.generation_config = own
    return str(tokenizer.decode(tokens[0], skip_special_tokens=True))
