"""The layer-wise kind of method: each linear from its weight and the statistics of its inputs.

Statistics are accumulated once per shared input, in float32, on the quantized chain with the block's linears still in
float, all linears of a block at once (as GPTQ's authors do).
"""

from __future__ import annotations

import contextlib
import dataclasses
from abc import ABC, abstractmethod
from collections.abc import Callable, Iterator, Mapping
from typing import Any, ClassVar

import torch
from torch import Tensor, nn

from ptq161.errors import UserError
from ptq161.kernels.matmul import bfloat16_operands, linear
from ptq161.methods.base import Method, Window, check_common, not_finite
from ptq161.models.linears import linear_of
from ptq161.packed.uniform import check_uniform
from ptq161.packed.weight import PackedWeight


@dataclasses.dataclass
class InputStatistics:
    """Statistics of the inputs ``x [tokens, in]`` that a group of linears shares (float32).

    Attributes:
        hessian: ``[in, in]``, 2/n X^T X over the n calibration sequences, before damping: the hessian of GPTQ's Eq. 1.
        absolute_mean: ``[in]``, mean of |x| over all tokens.
        absolute_max: ``[in]``, largest |x| over all tokens.
        n_sequences: calibration sequences seen.
        n_tokens: tokens seen.

    Example:
        >>> x = torch.tensor([[1.0, -2.0], [3.0, 0.0]])  # one sequence of two tokens
        >>> statistics = InputStatistics(2 * x.T @ x, x.abs().mean(0), x.abs().amax(0), n_sequences=1, n_tokens=2)
        >>> statistics.hessian.tolist(), statistics.absolute_mean.tolist()
        ([[20.0, -4.0], [-4.0, 8.0]], [2.0, 1.0])
    """

    hessian: Tensor
    absolute_mean: Tensor
    absolute_max: Tensor
    n_sequences: int = 0
    n_tokens: int = 0


@dataclasses.dataclass(frozen=True)
class LayerwiseMethod(ABC):
    """A method that quantizes each linear on its own, from its weight and its inputs' statistics.

    The statistics are taken on the quantized chain with the block's linears still in float, all linears of a
    block at once.

    Attributes:
        block_size: always 1.
        batch_size: calibration sequences per forward pass.
        compute_dtype: dtype of the forward passes' matrix products; statistics are float32 always.
        scale_dtype: dtype in which scales, means and zero points are stored.

    Example:
        >>> from ptq161.methods import rtn
        >>> @dataclasses.dataclass(frozen=True)
        ... class EightBits(LayerwiseMethod):
        ...     needs_statistics = False
        ...
        ...     def nominal_bits(self):
        ...         return 8.0
        ...
        ...     def quantize_group(self, weights, statistics, window):
        ...         return {name: rtn.quantize_weight(weight, 8) for name, weight in weights.items()}
        >>> EightBits(batch_size=4).scale_dtype
        'float16'
        >>> EightBits(block_size=2)
        Traceback (most recent call last):
            ...
        ptq161.errors.UserError: block_size=2: EightBits quantizes one block at a time; use block_size=1.
    """

    takes_salient_masks: ClassVar[bool] = False
    needs_statistics: ClassVar[bool] = True

    block_size: int = 1
    batch_size: int = 8
    compute_dtype: str = "float32"
    scale_dtype: str = "float16"

    def __post_init__(self) -> None:
        """Reject values that no layer-wise method can use."""
        name = type(self).__name__
        if self.block_size != 1:
            raise UserError(f"block_size={self.block_size}: {name} quantizes one block at a time; use block_size=1.")
        check_common(self.batch_size, self.compute_dtype, self.scale_dtype)

    @property
    def needs_full_chain(self) -> bool:
        """No statistics are taken on the full-precision chain."""
        return False

    @abstractmethod
    def nominal_bits(self) -> float:
        """Bits per weight as the method's paper counts them."""

    @abstractmethod
    def quantize_group(
        self, weights: Mapping[str, Tensor], statistics: InputStatistics | None, window: Window
    ) -> dict[str, PackedWeight]:
        """Quantize the linears that share one input.

        Args:
            weights: name -> ``[out, in]`` float32.
            statistics: of the shared input; None when ``needs_statistics`` is False.
            window: for generators and metrics.

        Returns:
            a packed weight for each name.
        """

    def quantize_window(self, window: Window) -> dict[str, PackedWeight]:
        """Collect statistics once per shared input, then quantize group by group."""
        collected = collect_statistics(self, window) if self.needs_statistics else {}
        packed: dict[str, PackedWeight] = {}
        for group in window.input_groups:
            weights = {name: window.linears[name].weight.detach().float() for name in group}
            packed.update(self.quantize_group(weights, collected.pop(group[0], None), window))
        return packed


def quantize_sequentially(method: LayerwiseMethod, window: Window) -> dict[str, PackedWeight]:
    """Quantize the linears of a window input by input, each on statistics that the quantized ones before it leave.

    This is what released code calls ``true_sequential``. The window's linears are in their places again afterwards.

    Args:
        method: one that needs statistics.
        window: of one decoder block.

    Returns:
        a packed weight for each linear.

    Raises:
        UserError: an input is NaN or infinite, or the method refuses a weight.

    Example:
        >>> from ptq161.methods.base import ignore_metric
        >>> from ptq161.methods.gptq import GPTQ
        >>> block = nn.Sequential(nn.Linear(2, 2, bias=False), nn.Linear(2, 2, bias=False))
        >>> window = Window(
        ...     first_block=0,
        ...     blocks=[block],
        ...     input_groups=[["0.0"], ["0.1"]],
        ...     linears={"0.0": block[0], "0.1": block[1]},
        ...     quant_inputs=torch.tensor([[[1.0, -2.0], [3.0, 0.0]]]),
        ...     full_outputs=None,
        ...     activations={},
        ...     salient_masks=None,
        ...     run_block=lambda i, hidden: block(hidden),
        ...     generator=lambda stage: torch.Generator(),
        ...     on_metric=ignore_metric,
        ...     device=torch.device("cpu"),
        ... )
        >>> sorted(quantize_sequentially(GPTQ(bits=2), window)), block[0] is window.linears["0.0"]
        (['0.0', '0.1'], True)
    """
    packed: dict[str, PackedWeight] = {}
    try:
        for group in window.input_groups:
            statistics = collect_statistics(method, dataclasses.replace(window, input_groups=[group]))
            weights = {name: window.linears[name].weight.detach().float() for name in group}
            packed.update(method.quantize_group(weights, statistics[group[0]], window))
            for name in group:
                window.replace(name, linear_of(packed[name].dequantize(), window.linears[name].bias))
    finally:
        for name in packed:
            window.replace(name, window.linears[name])
    return packed


@dataclasses.dataclass(frozen=True)
class UniformMethod(LayerwiseMethod):
    """A layer-wise method that rounds weights to uniform grids.

    Attributes:
        bits: 2, 3, 4 or 8.
        group_size: columns that share a scale; None is one scale per output channel.

    Example:
        >>> from ptq161.methods.rtn import RTN
        >>> RTN(bits=3, group_size=64).nominal_bits()
        3.0
        >>> RTN(bits=5)
        Traceback (most recent call last):
            ...
        ptq161.errors.UserError: method.bits=5: use one of 2, 3, 4, 8.
    """

    bits: int = 4
    group_size: int | None = None

    def __post_init__(self) -> None:
        """Reject bits and group sizes that the format cannot hold."""
        super().__post_init__()
        check_uniform(self.bits, self.group_size)

    def nominal_bits(self) -> float:
        """Bits of a code; what is stored beside the codes (scales, zero points, channel scales) is not counted."""
        return float(self.bits)


# A hessian is symmetric: with four strips of rows, each from its diagonal on, 5/8 of the products are left.
_HESSIAN_STRIPS = 4


def collect_statistics(method: Method, window: Window) -> dict[str, InputStatistics]:
    """Run the window on the quantized chain's inputs and accumulate what the linears see.

    Each pass ends where the last group's input has been seen: the rest of the block is not computed.

    Returns:
        the statistics by the first name of each input group; those of a linear that saw no token weigh all channels
        alike.

    Raises:
        UserError: an input is NaN or infinite; the sentence names block and linear.

    Example:
        >>> from ptq161.methods.base import ignore_metric
        >>> from ptq161.methods.gptq import GPTQ
        >>> block = nn.Sequential(nn.Linear(2, 2, bias=False))
        >>> window = Window(
        ...     first_block=0,
        ...     blocks=[block],
        ...     input_groups=[["0.0"]],
        ...     linears={"0.0": block[0]},
        ...     quant_inputs=torch.tensor([[[1.0, -2.0], [3.0, 0.0]]]),
        ...     full_outputs=None,
        ...     activations={},
        ...     salient_masks=None,
        ...     run_block=lambda i, hidden: block(hidden),
        ...     generator=lambda stage: torch.Generator(),
        ...     on_metric=ignore_metric,
        ...     device=torch.device("cpu"),
        ... )
        >>> statistics = collect_statistics(GPTQ(), window)["0.0"]
        >>> statistics.hessian.tolist(), statistics.absolute_mean.tolist()
        ([[20.0, -4.0], [-4.0, 8.0]], [2.0, 1.0])
    """
    watched = watching_inputs(window, method.compute_dtype, stop=True)
    with watched as statistics, torch.no_grad(), window.autocast(method.compute_dtype):
        for batch in window.batches(method.batch_size):
            with contextlib.suppress(_AllSeenError):
                window.run(window.to_device(window.quant_inputs[batch]))
    return statistics


@contextlib.contextmanager
def watching_inputs(window: Window, compute_dtype: str, *, stop: bool = False) -> Iterator[dict[str, InputStatistics]]:
    """Accumulate what the linears see while the window runs, once, on the quantized chain inside this context.

    Args:
        window: whose linears are watched.
        compute_dtype: in which it runs.
        stop: end each forward pass, by an exception, where the last group's input has been seen.

    Yields:
        the statistics by the first name of each input group, complete once the context is left.

    Raises:
        UserError: an input is NaN or infinite.

    Example:
        >>> from types import SimpleNamespace
        >>> layer, x = nn.Linear(2, 2), torch.tensor([[[1.0, -2.0], [3.0, 0.0]]])
        >>> window = SimpleNamespace(input_groups=[["0.q"]], linears={"0.q": layer}, quant_inputs=x, device=x.device)
        >>> with watching_inputs(window, "float32") as statistics:
        ...     y = layer(x)
        >>> statistics["0.q"].n_tokens, statistics["0.q"].hessian.tolist()
        (2, [[20.0, -4.0], [-4.0, 8.0]])
    """
    statistics = {group[0]: _empty(window.linears[group[0]], window.device) for group in window.input_groups}
    last = window.input_groups[-1][0]
    with contextlib.ExitStack() as hooks:
        for name, entry in statistics.items():
            hook = _accumulate_into(name, entry, compute_dtype, stop=stop and name == last)
            hooks.enter_context(window.linears[name].register_forward_pre_hook(hook))
        yield statistics
    n_sequences = window.quant_inputs.shape[0]
    for entry in statistics.values():
        entry.n_sequences = n_sequences
        if not entry.n_tokens:  # an expert that no token has chosen: its inputs count alike
            entry.hessian.fill_diagonal_(1.0)
            entry.absolute_mean.fill_(1.0)
            entry.absolute_max.fill_(1.0)
            continue
        # The factor 2/n is that of GPTQ's add_batch; a batch counts by its sequences, not by its tokens.
        entry.hessian = (entry.hessian.triu() + entry.hessian.triu(1).T) * (2 / n_sequences)
        entry.absolute_mean /= entry.n_tokens


def _empty(linear: nn.Linear, device: torch.device) -> InputStatistics:
    n = linear.in_features
    return InputStatistics(
        hessian=torch.zeros(n, n, device=device),
        absolute_mean=torch.zeros(n, device=device),
        absolute_max=torch.zeros(n, device=device),
    )


class _AllSeenError(Exception):
    """Ends a forward pass once the last input has been seen."""


def _accumulate_into(
    name: str, entry: InputStatistics, compute_dtype: str, *, stop: bool
) -> Callable[[nn.Module, Any], None]:
    def hook(_: nn.Module, args: Any) -> None:
        x: Tensor = args[0].detach()
        # Autocast would also cast this product; the hessian has to be float32.
        with torch.autocast(x.device.type, enabled=False):
            products = bfloat16_operands() if x.dtype == torch.bfloat16 else contextlib.nullcontext()
            x = x.flatten(0, -2).float()
            absolute = x.abs()
            total = absolute.sum(0)
            if not bool(torch.isfinite(total).all()):
                raise not_finite(f"the input of linear {name} is NaN or infinite", compute_dtype)
            entry.n_tokens += x.shape[0]
            entry.absolute_mean += total
            torch.maximum(entry.absolute_max, absolute.amax(0), out=entry.absolute_max)
            with products:
                _add_upper_products(entry.hessian, x)
        if stop:
            raise _AllSeenError

    return hook


def _add_upper_products(hessian: Tensor, x: Tensor) -> None:
    """Add the upper triangle of ``X^T X`` for ``x [tokens, in]``, and little below it."""
    channels = x.T.contiguous()
    width = -(-channels.shape[0] // _HESSIAN_STRIPS)
    for start in range(0, channels.shape[0], width):
        hessian[start : start + width, start:] += linear(channels[start : start + width], channels[start:])
