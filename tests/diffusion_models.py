"""Tiny masked-diffusion language models: one that learns, and one with LLaDA's module tree."""

from __future__ import annotations

import functools
from types import SimpleNamespace
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional as F
from transformers import LlamaConfig, LlamaForCausalLM, PreTrainedConfig, PreTrainedModel

from ptq161.models.architectures import ARCHITECTURES, Architecture, Diffusion

MASK = 40
"""The mask token of both; text has the 40 tokens below it."""
SEQ_LEN = 32


class TinyDiffusionConfig(LlamaConfig):
    model_type = "tiny_diffusion"


class TinyDiffusion(LlamaForCausalLM):
    """A Llama whose places see each other."""

    config_class = TinyDiffusionConfig

    def forward(self, input_ids: Tensor, **kwargs: Any) -> Any:
        b, seq_len = input_ids.shape
        visible = torch.zeros(b, 1, seq_len, seq_len, dtype=self.dtype, device=input_ids.device)
        return super().forward(input_ids=input_ids, attention_mask=visible, **kwargs)


ROWS = {"tiny_diffusion": Architecture("layers", ARCHITECTURES["llama"].linears, Diffusion(MASK))}
"""To be put into the table of architectures by tests that use :class:`TinyDiffusion`."""


def tiny_diffusion(*, shifted: bool = False, seed: int = 0, **settings: Any) -> TinyDiffusion:
    """Make a random model."""
    sizes = {"hidden_size": 48, "intermediate_size": 96, "num_hidden_layers": 2, "num_attention_heads": 4}
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        config = TinyDiffusionConfig(
            vocab_size=MASK + 1, max_position_embeddings=2 * SEQ_LEN, initializer_range=0.08, **sizes, **settings
        )
        return TinyDiffusion(config).eval()


def progressions(n: int, seed: int) -> Tensor:
    """Draw texts that can be filled in from a few tokens, ``[n, SEQ_LEN]``: steps of 1, 3 or 7 around a circle."""
    generator = torch.Generator().manual_seed(seed)
    starts = torch.randint(MASK, (n, 1), generator=generator)
    steps = torch.tensor([1, 3, 7])[torch.randint(3, (n, 1), generator=generator)]
    return (starts + steps * torch.arange(SEQ_LEN)) % MASK


@functools.cache
def trained_weights() -> dict[str, Tensor]:
    """Train :func:`tiny_diffusion` on random masks, once for all tests: the cross-entropy over t, weighted 1/t."""
    model, generator = tiny_diffusion().train(), torch.Generator().manual_seed(1)
    optimizer = torch.optim.AdamW(model.parameters(), lr=4e-3, weight_decay=0.0)
    for step in range(200):
        tokens = progressions(32, seed=100 + step)
        shares = torch.rand(32, 1, generator=generator).clamp(min=0.05)
        masked = torch.rand(tokens.shape, generator=generator) < shares
        logits = model(tokens.masked_fill(masked, MASK)).logits
        losses = F.cross_entropy(logits.flatten(0, 1), tokens.flatten(), reduction="none").view_as(tokens)
        loss = (losses * masked / shares).mean()
        optimizer.zero_grad()
        loss.backward()
        nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        optimizer.step()
    return {name: tensor.detach().clone() for name, tensor in model.state_dict().items()}


def trained_diffusion() -> TinyDiffusion:
    """Make a model that fills :func:`progressions` in."""
    model = tiny_diffusion()
    model.load_state_dict(trained_weights())
    return model


class LladaConfig(PreTrainedConfig):
    """The names of LLaDA's config that matter here."""

    model_type = "llada"

    def __init__(self, mask_token_id: int = MASK, vocab_size: int = MASK + 1, n_layers: int = 2, **rest: Any) -> None:
        super().__init__(**rest)
        self.mask_token_id, self.vocab_size, self.n_layers = mask_token_id, vocab_size, n_layers


class _LladaBlock(nn.Module):
    def __init__(self, width: int, hidden: int) -> None:
        super().__init__()
        self.attn_norm, self.ff_norm = nn.RMSNorm(width), nn.RMSNorm(width)
        for name in ("q_proj", "k_proj", "v_proj", "attn_out"):
            self.add_module(name, nn.Linear(width, width, bias=False))
        self.ff_proj, self.up_proj = (nn.Linear(width, hidden, bias=False) for _ in range(2))
        self.ff_out = nn.Linear(hidden, width, bias=False)

    def forward(self, x: Tensor, attention_bias: Tensor | None = None, use_cache: bool = False) -> Any:
        given = self.attn_norm(x)
        q, k, v = (self.get_submodule(name)(given).unflatten(-1, (4, -1)).transpose(1, 2) for name in _PROJECTIONS)
        seen = F.scaled_dot_product_attention(q, k, v, attn_mask=attention_bias, is_causal=False)
        x = x + self.get_submodule("attn_out")(seen.transpose(1, 2).flatten(2))
        given = self.ff_norm(x)
        return x + self.ff_out(F.silu(self.ff_proj(given)) * self.up_proj(given)), None


_PROJECTIONS = ("q_proj", "k_proj", "v_proj")


class _LladaBody(nn.Module):
    def __init__(self, config: LladaConfig) -> None:
        super().__init__()
        parts = {"wte": nn.Embedding(config.vocab_size, 48), "ln_f": nn.RMSNorm(48)}
        blocks = nn.ModuleList(_LladaBlock(48, 96) for _ in range(config.n_layers))
        self.transformer = nn.ModuleDict({**parts, "ff_out": nn.Linear(48, config.vocab_size), "blocks": blocks})


class Llada(PreTrainedModel):
    """A stand-in for LLaDA: its names and its blocks' return values, without positions."""

    config_class = LladaConfig
    base_model_prefix = "model"

    def __init__(self, config: LladaConfig) -> None:
        super().__init__(config)
        self.model = _LladaBody(config)
        self.post_init()

    def get_input_embeddings(self) -> nn.Module:
        return self.model.transformer["wte"]

    def get_output_embeddings(self) -> nn.Module:
        return self.model.transformer["ff_out"]

    def forward(self, input_ids: Tensor, use_cache: bool = False) -> Any:
        parts = self.model.transformer
        x = parts["wte"](input_ids)
        for block in parts["blocks"]:
            x, _ = block(x, attention_bias=None, use_cache=use_cache)
        return SimpleNamespace(logits=parts["ff_out"](parts["ln_f"](x)))


def tiny_llada(seed: int = 0) -> Llada:
    """Make a random stand-in."""
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        return Llada(LladaConfig()).eval()
