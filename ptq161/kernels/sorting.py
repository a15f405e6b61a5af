"""Sorting on whichever device: what BiLLM's and PB-LLM's thresholds come from."""

from __future__ import annotations

import numpy as np
import torch
from torch import Tensor


def sorted_values(values: Tensor) -> Tensor:
    """Sort along the last axis, ascending.

    On the CPU by numpy, whose sort uses vector instructions: some twenty times as fast as torch's.
    """
    if values.device.type != "cpu":
        return values.sort(dim=-1).values
    return torch.from_numpy(np.sort(values.numpy(), axis=-1))
