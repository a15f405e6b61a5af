"""What a quantization method is: one entry point per window of decoder blocks.

A method never sees Hydra, W&B, files or the whole model. The driver (:mod:`ptq161.driver.quantization`) hands it a
:class:`Window`; it returns one packed weight per linear. Layer-wise methods derive from
:class:`LayerwiseMethod` and only say what becomes of one linear.
"""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from typing import ClassVar, Protocol, runtime_checkable

import torch
from torch import Tensor, nn

from ptq161.checks import check_choice
from ptq161.errors import UserError
from ptq161.kernels.block import fused_blocks
from ptq161.kernels.matmul import FastLinear
from ptq161.methods.rescaling import Rescaling
from ptq161.numerics import COMPUTE_DTYPES
from ptq161.packed.weight import SCALE_DTYPES, PackedWeight


class OnMetric(Protocol):
    """A callback that receives every metric as it arises: ``on_metric("loss", 0.5, block=3, epoch=0)``.

    Example:
        >>> def on_metric(name: str, value: float, /, **where: int | str) -> None:
        ...     print(name, value, where)
        >>> on_metric("loss", 0.5, block=3, epoch=0)
        loss 0.5 {'block': 3, 'epoch': 0}
    """

    def __call__(self, name: str, value: float, /, **where: int | str) -> None:
        """Receive one value; ``where`` says to what it belongs (block, epoch, linear)."""


def ignore_metric(name: str, value: float, /, **where: int | str) -> None:
    """Drop the value: the :class:`OnMetric` of a caller who wants no metrics.

    Example:
        >>> ignore_metric("loss", 0.5, block=3, epoch=0)
    """


@dataclasses.dataclass(frozen=True)
class ActivationScale:
    """Size of a linear's inputs over the calibration tokens on the full-precision chain, per channel.

    Attributes:
        maximum: ``[in]`` float32, largest |x|.
        mean: ``[in]`` float32, mean of |x|.
        mean_square: ``[in]`` float32, mean of x^2.

    Example:
        >>> x = torch.tensor([[1.0, -2.0], [-3.0, 0.0]])  # two tokens, two channels
        >>> ActivationScale(maximum=x.abs().amax(0), mean=x.abs().mean(0), mean_square=x.square().mean(0))
        ActivationScale(maximum=tensor([3., 2.]), mean=tensor([2., 1.]), mean_square=tensor([5., 2.]))
    """

    maximum: Tensor
    mean: Tensor
    mean_square: Tensor


@dataclasses.dataclass(frozen=True)
class LinearStatistics:
    """What a plan over the whole model may know of one linear in the full-precision model.

    Attributes:
        weight: ``[out, in]``.
        mean_square: ``[in]`` float32, mean of x^2 over the calibration tokens.
        gradient_energy: ``[out]`` float32, mean over the tokens of the squared gradient at each output, of the
            cross-entropy of tokens that the model draws itself: the diagonal of the Fisher information.

    Example:
        >>> LinearStatistics(torch.ones(1, 2), mean_square=torch.ones(2), gradient_energy=torch.ones(1)).weight.shape
        torch.Size([1, 2])
    """

    weight: Tensor
    mean_square: Tensor
    gradient_energy: Tensor


def block_and_path(name: str) -> tuple[int, str]:
    """Split the name of a linear, ``"{block}.{path}"``.

    Example:
        >>> block_and_path("3.self_attn.q_proj")
        (3, 'self_attn.q_proj')
    """
    block, path = name.split(".", 1)
    return int(block), path


@dataclasses.dataclass
class Window:
    """``block_size`` consecutive decoder blocks, in float32 on the device where the work is to be done.

    Attributes:
        first_block: index in the model of the first block.
        blocks: the full-precision blocks; a method must leave their weights as they were.
        input_groups: names of the linears that share an input, in the order in which their inputs arise. A name is
            ``"{block}.{path}"`` with the block's index in the model, as in ``"3.self_attn.q_proj"``.
        linears: those linears by name.
        quant_inputs: ``[n_samples, seq_len, hidden]`` in host memory: the quantized chain's input of the window.
        full_outputs: the same of the full-precision chain's output; None unless the method asks for that chain.
        full_inputs: the same of the full-precision chain's input.
        activations: activation scales by linear on the full-precision chain; empty unless the method asks for it
            and has salient channels.
        salient_masks: salient channels by linear (``[in]`` bool, on ``device``) that the caller gives; None lets the
            method select them.
        run_block: ``run_block(i, hidden)`` runs block ``i`` of the window (0 is the first) on a batch of hidden
            states ``[b, seq_len, hidden]`` with the arguments that the model itself passed to it.
        generator: ``generator(stage)`` is a fresh CPU generator that belongs to the seed, this stage and this window.
        on_metric: receives every metric.
        device: where the blocks are; inputs are moved there batch by batch.
        plan: what :meth:`PlanningMethod.plan` has decided for each linear, on ``device``; None without a plan.
        rescalings: linears whose weights and inputs are of unusual size: what was taken out of them.

    Example:
        >>> block = nn.Sequential(nn.Linear(4, 4, bias=False))
        >>> window = Window(
        ...     first_block=3,
        ...     blocks=[block],
        ...     input_groups=[["3.0"]],
        ...     linears={"3.0": block[0]},
        ...     quant_inputs=torch.zeros(5, 6, 4),
        ...     full_outputs=None,
        ...     activations={},
        ...     salient_masks=None,
        ...     run_block=lambda i, hidden: block(hidden),
        ...     generator=lambda stage: torch.Generator(),
        ...     on_metric=ignore_metric,
        ...     device=torch.device("cpu"),
        ... )
        >>> list(window.batches(2))
        [slice(0, 2, None), slice(2, 4, None), slice(4, 6, None)]
        >>> window.run_all(window.quant_inputs, batch_size=2, compute_dtype="float32").shape
        torch.Size([5, 6, 4])
    """

    first_block: int
    blocks: list[nn.Module]
    input_groups: list[list[str]]
    linears: dict[str, nn.Linear]
    quant_inputs: Tensor
    full_outputs: Tensor | None
    activations: dict[str, ActivationScale]
    salient_masks: dict[str, Tensor] | None
    run_block: Callable[[int, Tensor], Tensor]
    generator: Callable[[str], torch.Generator]
    on_metric: OnMetric
    device: torch.device
    full_inputs: Tensor | None = None
    plan: dict[str, Tensor] | None = None
    rescalings: dict[str, Rescaling] = dataclasses.field(default_factory=dict)

    def run(self, hidden: Tensor) -> Tensor:
        """Run all blocks of the window on ``hidden [b, seq_len, hidden]``."""
        for i in range(len(self.blocks)):
            hidden = self.run_block(i, hidden)
        return hidden

    def run_all(self, inputs: Tensor, batch_size: int, compute_dtype: str) -> Tensor:
        """Run the window on a whole chain ``[n_samples, seq_len, hidden]`` without gradients, batch by batch.

        Returns:
            the outputs in host memory, in the dtype of ``inputs``.

        Raises:
            UserError: an output is NaN or infinite.
        """
        outputs = torch.empty_like(inputs)
        with torch.no_grad(), self.autocast(compute_dtype):
            for batch in self.batches(batch_size):
                outputs[batch] = self.run(self.to_device(inputs[batch])).to(outputs.device, outputs.dtype)
        if not bool(torch.isfinite(outputs).all()):
            raise not_finite(f"block {self.first_block} returns NaN or infinite activations", compute_dtype)
        return outputs

    def batches(self, batch_size: int) -> Iterator[slice]:
        """Yield slices of at most ``batch_size`` samples; the last may be shorter."""
        for start in range(0, self.quant_inputs.shape[0], batch_size):
            yield slice(start, start + batch_size)

    def to_device(self, hidden: Tensor) -> Tensor:
        """Move a batch of a chain to the window's device, in float32."""
        return hidden.to(self.device, torch.float32)

    @contextmanager
    def autocast(self, compute_dtype: str) -> Iterator[None]:
        """Compute products and attention in a dtype of ``COMPUTE_DTYPES``, where possible by :mod:`ptq161.kernels`."""
        dtype = COMPUTE_DTYPES[compute_dtype]
        if dtype == torch.float32:
            with FastLinear():
                yield
            return
        with torch.autocast(self.device.type, dtype), fused_blocks(self.blocks):
            yield

    def replace(self, name: str, module: nn.Module) -> None:
        """Put ``module`` in the place of the linear called ``name``."""
        block, path = block_and_path(name)
        if name in self.rescalings:
            module = self.rescalings[name].around(module)
        self.blocks[block - self.first_block].set_submodule(path, module)


class Method(Protocol):
    """A frozen dataclass of hyperparameters with one entry point.

    A method may have a class attribute ``format``, the name of the format in which it stores weights.

    Example:
        >>> from ptq161.methods.rtn import RTN
        >>> method: Method = RTN(bits=2)
        >>> method.block_size, method.needs_full_chain, method.nominal_bits()
        (1, False, 2.0)
    """

    takes_salient_masks: ClassVar[bool]
    """Whether the method has salient input channels, which the caller may give (``Window.salient_masks``)."""

    @property
    def needs_full_chain(self) -> bool:
        """Whether the window has to bring the full-precision chain's outputs, and its activation scales for masks."""

    @property
    def block_size(self) -> int:
        """Consecutive decoder blocks per window."""

    @property
    def batch_size(self) -> int:
        """Calibration sequences per forward pass."""

    @property
    def compute_dtype(self) -> str:
        """Dtype of matrix products: float32, or bfloat16/float16 by autocast."""

    def nominal_bits(self) -> float:
        """Bits per weight as the method's paper counts them."""

    def quantize_window(self, window: Window) -> dict[str, PackedWeight]:
        """Quantize every linear of the window.

        Returns:
            a packed weight for each name in ``window.linears``.
        """


@runtime_checkable
class PlanningMethod(Method, Protocol):
    """A method that decides something for the whole model before the first window.

    Example:
        >>> import ptq161
        >>> isinstance(ptq161.Waterfill(), PlanningMethod), isinstance(ptq161.RTN(), PlanningMethod)
        (True, False)
    """

    @property
    def needs_plan(self) -> bool:
        """Whether :meth:`plan` is to be called, which may depend on the settings."""

    @property
    def plan_samples(self) -> int:
        """Calibration sequences for the statistics that :meth:`plan` rests on."""

    def plan(self, statistics: Mapping[str, LinearStatistics]) -> dict[str, Tensor]:
        """Decide what depends on the whole model, once.

        Args:
            statistics: of each linear of the model.

        Returns:
            a tensor for each linear, which every window brings again (``Window.plan``).
        """


def plan_windows(method: PlanningMethod, n_samples: int) -> int:
    """Return how many of ``n_samples`` calibration windows a plan looks at: whole batches, at least one.

    Example:
        >>> import ptq161
        >>> [plan_windows(ptq161.Waterfill(batch_size=4, plan_samples=10), n_samples) for n_samples in (3, 6, 64)]
        [3, 4, 8]
    """
    size = min(method.batch_size, n_samples)
    return max(size, min(method.plan_samples, n_samples) // size * size)


def check_common(batch_size: int, compute_dtype: str, scale_dtype: str) -> None:
    """Check the hyperparameters that every method has.

    Raises:
        UserError: a value is out of range.

    Example:
        >>> check_common(batch_size=8, compute_dtype="bfloat16", scale_dtype="float16")
        >>> check_common(batch_size=0, compute_dtype="bfloat16", scale_dtype="float16")
        Traceback (most recent call last):
            ...
        ptq161.errors.UserError: method.batch_size=0: use at least 1.
    """
    if batch_size < 1:
        raise UserError(f"method.batch_size={batch_size}: use at least 1.")
    check_choice("method.compute_dtype", compute_dtype, COMPUTE_DTYPES)
    check_choice("method.scale_dtype", scale_dtype, SCALE_DTYPES)


def check_rate(setting: str, rate: float) -> None:
    """Check a learning rate.

    Raises:
        UserError: it is negative, NaN or infinite.

    Example:
        >>> check_rate("method.lr", -0.5)
        Traceback (most recent call last):
            ...
        ptq161.errors.UserError: method.lr=-0.5: use a finite learning rate of at least 0.
    """
    if not (rate >= 0 and math.isfinite(rate)):
        raise UserError(f"{setting}={rate}: use a finite learning rate of at least 0.")


def not_finite(fault: str, compute_dtype: str) -> UserError:
    """Return the error of activations that overflow, which says what helps.

    Example:
        >>> not_finite("the input of 3.mlp.down_proj is NaN or infinite", "float16")
        UserError('the input of 3.mlp.down_proj is NaN or infinite in float16; use method.compute_dtype=float32.')
    """
    if compute_dtype == "float16":
        return UserError(f"{fault} in float16; use method.compute_dtype=float32.")
    return UserError(f"{fault}; check the model's weights.")


@contextmanager
def prefix_errors(linears: str) -> Iterator[None]:
    """Put the names of linears (``block.path``) in front of a :class:`UserError` that is raised inside.

    Example:
        >>> with prefix_errors("3.mlp.up_proj"):
        ...     raise UserError("a weight is NaN.")
        Traceback (most recent call last):
            ...
        ptq161.errors.UserError: 3.mlp.up_proj: a weight is NaN.
    """
    try:
        yield
    except UserError as error:
        raise UserError(f"{linears}: {error}") from error
