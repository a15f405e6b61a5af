"""The refit of a window's codebooks: their centroids and scales are trained, the indices stay as they are."""

from __future__ import annotations

import math
from collections.abc import Mapping

import torch
from torch import Tensor
from torch.nn import functional as F

from ptq161.methods.base import Window, prefix_errors
from ptq161.methods.blockwise import optimize, replaced_linears
from ptq161.numerics import COMPUTE_DTYPES
from ptq161.packed.trainable import scaled_linears
from ptq161.packed.weight import PackedWeight


def refit(
    window: Window,
    packed: Mapping[str, PackedWeight],
    *,
    steps: int,
    lr: float,
    batch_size: int,
    compute_dtype: str,
    scale_lr: float | None = None,
    input_drop: float = 0.0,
) -> dict[str, PackedWeight]:
    """Train everything that is no index against the full-precision output (Section 4 of the VPTQ paper).

    A weight is linear in its centroids, so that few steps of Adam go a long way; its rates fall linearly to zero, which
    bears rates several times as large as constant ones. The loss is the mean squared error of the window's output on
    the quantized chain; ``on_metric`` receives its mean over each pass.

    Args:
        window: with the full-precision chain's outputs.
        packed: of each linear of the window, in any format.
        steps: of Adam, over batches of the calibration set in its order.
        lr: first learning rate of the gains (:func:`ptq161.packed.trainable.gain_sizes`) of codebooks.
        batch_size: calibration sequences per step.
        compute_dtype: dtype of matrix products; the gains and the loss are float32 always.
        scale_lr: first learning rate of the gains of scales and offsets; None is that of the codebooks.
        input_drop: probability with which an element of the input comes from the full-precision chain.

    Returns:
        a packed weight for each name, of the same bytes and indices.

    Raises:
        UserError: a loss is not finite, or a trained value leaves the range of its dtype.

    Example:
        >>> from torch import nn
        >>> from ptq161.packed.vector import Coded, VectorWeight
        >>> block = nn.Sequential(nn.Linear(2, 2, bias=False))
        >>> window = Window(
        ...     first_block=0,
        ...     blocks=[block],
        ...     input_groups=[["0.0"]],
        ...     linears={"0.0": block[0]},
        ...     quant_inputs=torch.ones(1, 1, 2),
        ...     full_outputs=torch.full((1, 1, 2), 4.0),
        ...     activations={},
        ...     salient_masks=None,
        ...     run_block=lambda i, hidden: block(hidden),
        ...     generator=lambda stage: torch.Generator(),
        ...     on_metric=lambda name, value, **where: None,
        ...     device=torch.device("cpu"),
        ... )
        >>> coded = Coded(torch.ones(1, 2, 2), torch.tensor([[0, 1]]))
        >>> start = {"0.0": VectorWeight.pack(coded, (2, 2))}
        >>> found = refit(window, start, steps=100, lr=0.1, batch_size=1, compute_dtype="float32")
        >>> [round(value, 1) for value in found["0.0"].dequantize().sum(1).tolist()]  # from 2 to the target
        [4.0, 4.0]
    """
    assert window.full_outputs is not None, "the driver brings the full-precision chain (needs_full_chain)"
    dtype = COMPUTE_DTYPES[compute_dtype]
    layers = scaled_linears(packed, {name: linear.bias for name, linear in window.linears.items()}, dtype)
    gains: dict[bool, list[Tensor]] = {True: [], False: []}
    for layer in layers.values():
        for name, gain in layer.gains.items():
            gains[name in layer.start.packed.shared].append(gain)
    rates = {True: lr, False: lr if scale_lr is None else scale_lr}
    groups = [{"params": gains[shared], "lr": rates[shared]} for shared in gains if gains[shared]]
    optimizer = torch.optim.Adam(groups)
    with replaced_linears(window, layers):
        optimize(
            window,
            optimizer,
            [window.full_outputs],
            F.mse_loss,
            epochs=math.ceil(steps * batch_size / window.quant_inputs.shape[0]),
            batch_size=batch_size,
            compute_dtype=compute_dtype,
            steps=steps,
            scheduler=torch.optim.lr_scheduler.LinearLR(optimizer, 1.0, 0.0, steps),
            input_drop=input_drop,
        )
    found = {}
    for name, layer in layers.items():
        with prefix_errors(name):
            found[name] = layer.repack()
    return found
