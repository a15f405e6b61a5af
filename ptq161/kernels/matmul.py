"""Matrix products in float32 on the CPU by oneDNN, for forward passes and hessians.

torch gives float32 products to MKL, whose kernels for AMD processors use half the width of the vector unit: 95 GFLOP/s
on one core of an EPYC where oneDNN reaches 200. The operator is the one that torch's own compiler puts in for a linear
layer; it is not differentiable.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor
from torch.nn import functional as F
from torch.overrides import TorchFunctionMode


class FastLinear(TorchFunctionMode):
    """Inside this context, linear layers without gradient take :func:`linear`."""

    def __torch_function__(
        self,
        func: Callable[..., Any],
        types: tuple[type, ...],
        args: tuple[Any, ...] = (),
        kwargs: Mapping[str, Any] | None = None,
    ) -> Any:
        """Replace ``torch.nn.functional.linear`` where no gradient is recorded."""
        if func is F.linear and not torch.is_grad_enabled():
            return linear(*args, **(kwargs or {}))
        return func(*args, **(kwargs or {}))


def linear(input: Tensor, weight: Tensor, bias: Tensor | None = None) -> Tensor:
    """Return ``input @ weight.T + bias`` for ``[..., in]``, ``[out, in]`` and ``[out]``, without gradient.

    Float32 on the CPU goes to oneDNN where torch has it, everything else to torch's own function.
    """
    tensors = (input, weight) if bias is None else (input, weight, bias)
    if not torch.backends.mkldnn.is_available() or any(
        t.device.type != "cpu" or t.dtype != torch.float32 for t in tensors
    ):
        return F.linear(input, weight, bias)
    # A tensor in another order of memory would take a slow kernel.
    input, weight = input.contiguous(), weight.contiguous()
    result: Tensor = torch.ops.mkldnn._linear_pointwise(input, weight, bias, "none", [], "")
    return result


@contextmanager
def bfloat16_operands() -> Iterator[None]:
    """Inside this context, the float32 operands of :func:`linear` hold values of bfloat16.

    OneDNN then multiplies them by its bfloat16 instructions, where the processor has them: sums and results stay
    float32 and lose nothing, in a quarter of the time.
    """
    settings = getattr(torch.backends.mkldnn, "matmul", None)  # torch 2.8 has none
    if settings is None:
        yield
        return
    before, settings.fp32_precision = settings.fp32_precision, "bf16"
    try:
        yield
    finally:
        settings.fp32_precision = before
