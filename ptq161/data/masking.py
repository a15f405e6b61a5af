"""Masked calibration tokens, as a masked-diffusion language model meets them (Quant-dLLM, arXiv 2510.03274).

Such a model is called on sequences of which any share is masked, from nearly nothing to everything but the prompt.
The paper's Masked Calibration Simulation stands for the whole of it: each window has a share of its own.
"""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch import Tensor

from ptq161.errors import UserError


def mask_linearly(
    tokens: Tensor, mask_token: int, prefix: float, generator: Callable[[int], torch.Generator]
) -> Tensor:
    """Mask window ``i`` of ``n`` with probability ``(i + 1) / n`` per token, its beginning left out.

    Follows ``utils/mcs.py`` of ZTA2785/Quant-dLLM: one share per window, where the paper describes several steps of
    each. The last window is all masks after its prefix.

    Args:
        tokens: ``[n_samples, seq_len]`` int64, left as they are.
        mask_token: id of the token that stands for a masked one.
        prefix: share of a window, rounded down to tokens, that is never masked, in [0, 1).
        generator: ``generator(i)`` is a fresh CPU generator for window ``i``.

    Returns:
        the masked tokens, ``[n_samples, seq_len]`` int64.

    Example:
        >>> tokens = torch.arange(12).view(2, 6)
        >>> masked = mask_linearly(tokens, 99, prefix=0.5, generator=torch.Generator().manual_seed)
        >>> masked[:, :3].tolist(), masked[1, 3:].tolist()
        ([[0, 1, 2], [6, 7, 8]], [99, 99, 99])
    """
    n_samples, seq_len = tokens.shape
    behind = torch.arange(seq_len) >= int(prefix * seq_len)
    drawn = torch.stack([torch.rand(seq_len, generator=generator(i)) for i in range(n_samples)])
    shares = torch.arange(1, n_samples + 1).unsqueeze(1) / n_samples
    return tokens.masked_fill((drawn < shares) & behind, mask_token)


def check_mask_token(mask_token: int | None, vocabulary: int) -> None:
    """Check that a model has an embedding of the mask token.

    Args:
        mask_token: its id; None is none.
        vocabulary: rows of the model's embedding.

    Raises:
        UserError: it has not.

    Example:
        >>> check_mask_token(99, vocabulary=100)
        >>> check_mask_token(100, vocabulary=100)
        Traceback (most recent call last):
            ...
        ptq161.errors.UserError: calib.mask_token=100: the model's embedding has 100 rows; use an id below 100.
    """
    if mask_token is not None and mask_token >= vocabulary:
        raise UserError(
            f"calib.mask_token={mask_token}: the model's embedding has {vocabulary} rows; use an id below {vocabulary}."
        )
