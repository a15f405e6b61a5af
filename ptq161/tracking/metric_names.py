"""What a metric's name says."""

from __future__ import annotations

from typing import Literal

SIZES = (
    "bits_per_weight",
    "nominal_bits_per_weight",
    "activation_bits",
    "embedding_bits",
    "checkpoint_bytes",
    "linear_bytes",
    "other_bytes",
)
"""Results that say how much is stored, or into how many bits activations and embeddings are rounded, and not how well
the model does."""

ROUNDED = ("activation_bits", "embedding_bits")
"""Those of them that only results have in which these are rounded."""

ON_TEXTS = ("ppl/", "denoising_loss/")
"""How the names of perplexities begin, and of what stands for them with masked-diffusion language models."""


def is_perplexity(metric: str) -> bool:
    """Say whether a metric is a perplexity, or the denoising loss that stands for it: lower is better, and no share."""
    return metric.startswith(ON_TEXTS) or metric.endswith("/perplexity")


def better(metric: str) -> Literal[1, -1]:
    """Return 1 for a metric of which larger values are better, such as an accuracy, and -1 otherwise."""
    return -1 if metric in SIZES or is_perplexity(metric) else 1
