"""QDrop on a window of decoder blocks, in four steps.

1. a grid for each output channel or group, by search (:func:`~ptq161.methods.qdrop.search_range`);
2. with ``activation_bits``, a grid for each input that linears share, by search on the first calibration batch;
3. rounding, and the activation scales, learn against the full-precision block's output, while a random part of the
   activations is not quantized (:func:`~ptq161.methods.qdrop.reconstruct`);
4. weights are rounded for good, and all activations are quantized.

Follows wimh966/QDrop (branch ``qdrop``): ``quantization/observer.py``, ``quantization/fake_quant.py`` and
``solver/recon.py``. Differences: a decoder block's output is ``[b, seq_len, hidden]``, so that the squared error is
summed over ``hidden`` and averaged over the tokens; the input of linears is quantized, once for all that share it, and
not the output of layers; scales are those that are stored.
"""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Iterator
from functools import partial
from typing import ClassVar

import torch
from torch import Tensor, nn

from ptq161.checks import check_at_least
from ptq161.errors import UserError
from ptq161.methods.base import Window, check_common, check_rate, not_finite, prefix_errors
from ptq161.methods.blockwise import LossMeans, mixed_inputs, replaced_linears
from ptq161.methods.qdrop.layers import ActivationQuantizer, DrawKept, RoundedLinear, searched_grid
from ptq161.methods.qdrop.ranges import search_range
from ptq161.methods.qdrop.reconstruction import reconstruct
from ptq161.numerics import COMPUTE_DTYPES
from ptq161.packed.activations import check_activation_bits
from ptq161.packed.uniform import check_uniform
from ptq161.packed.weight import PackedWeight, check_magnitude

_SEARCHED = 2**18
"""Values at most on which the range of an activation is searched; its scale learns afterwards."""


@dataclasses.dataclass(frozen=True)
class QDrop:
    """QDrop (Wei et al., ICLR 2022). The defaults are those of the released code.

    Attributes:
        bits: 2, 3, 4 or 8.
        group_size: columns that share a scale; None is one scale per output channel.
        activation_bits: of the inputs of all linears, 4 or 8; None leaves them as they are.
        drop_probability: probability with which an element *keeps its quantized value*, as the released ``drop_prob``:
            of the block's input, which otherwise comes from the full-precision chain, and of each quantized activation.
            1 drops nothing (BRECQ); 0 never shows the block what quantization does to its input.
        steps: of the reconstruction of a window; 0 rounds to nearest.
        alpha_lr: learning rate of the rounding.
        scale_lr: learning rate of the activation scales, which falls to zero along a cosine.
        relative_scale_lr: take ``scale_lr`` as a share of each scale at first (this project's own): a language model's
            inputs are of very different size.
        rounding_weight: of the loss that draws the rounding to a decision; of squared errors that are summed over the
            hidden dimension, so that its right value depends on the model's activations.
        warmup: share of the steps without that loss.
        batch_size: calibration sequences per step, drawn at random.
        block_size: consecutive decoder blocks reconstructed together.
        compute_dtype: dtype of matrix products (bfloat16 and float16 by autocast); rounding, scales and losses are
            float32 always.
        scale_dtype: dtype in which scales and zero points of weights are stored.

    Example:
        >>> import ptq161
        >>> from transformers import LlamaConfig, LlamaForCausalLM
        >>> sizes = {"vocab_size": 8, "hidden_size": 64, "intermediate_size": 64, "num_attention_heads": 1}
        >>> model = LlamaForCausalLM(LlamaConfig(num_hidden_layers=1, **sizes))
        >>> method = QDrop(bits=2, activation_bits=8, steps=3, batch_size=1)
        >>> model = ptq161.quantize(model, torch.arange(8).view(2, 4), method)
        >>> packed = model.model.layers[0].mlp.up_proj.packed
        >>> type(packed).__name__, packed.bits, packed.activation_bits
        ('UniformWeight', 2, 8)
    """

    format: ClassVar[str] = "uniform"
    needs_full_chain: ClassVar[bool] = True
    takes_salient_masks: ClassVar[bool] = False

    bits: int = 2
    group_size: int | None = None
    activation_bits: int | None = None
    drop_probability: float = 0.5
    steps: int = 20000
    alpha_lr: float = 1e-3
    scale_lr: float = 4e-5
    relative_scale_lr: bool = False
    rounding_weight: float = 0.01
    warmup: float = 0.2
    batch_size: int = 32
    block_size: int = 1
    compute_dtype: str = "float32"
    scale_dtype: str = "float16"

    def __post_init__(self) -> None:
        """Reject values out of range."""
        check_common(self.batch_size, self.compute_dtype, self.scale_dtype)
        check_uniform(self.bits, self.group_size)
        check_activation_bits(self.activation_bits)
        check_at_least("block_size", self.block_size, 1)
        check_at_least("method.steps", self.steps, 0)
        for name in ("drop_probability", "warmup"):
            if not 0 <= getattr(self, name) <= 1:
                raise UserError(f"method.{name}={getattr(self, name)}: use a number in [0, 1].")
        check_rate("method.alpha_lr", self.alpha_lr)
        check_rate("method.scale_lr", self.scale_lr)
        if not (self.rounding_weight >= 0 and math.isfinite(self.rounding_weight)):
            raise UserError(f"method.rounding_weight={self.rounding_weight}: use a finite number of at least 0.")

    def nominal_bits(self) -> float:
        """Bits of a code; scales and zero points are not counted."""
        return float(self.bits)

    def quantize_window(self, window: Window) -> dict[str, PackedWeight]:
        """Reconstruct the window.

        Raises:
            UserError: a weight, an input or a loss is not finite, or no token has chosen an expert whose input is to be
                quantized.
        """
        generator = window.generator("qdrop")
        draw = self._draw_kept(generator)
        quantizers = self._quantizers(window, draw) if self.activation_bits else {}  # 2
        layers = {
            name: self._layer(name, window.linears[name], quantizers.get(group[0]))  # 1
            for group in window.input_groups
            for name in group
        }
        if self.steps:
            self._reconstruct(window, layers, list(quantizers.values()), generator)  # 3
        return {name: layer.pack(self.scale_dtype) for name, layer in layers.items()}  # 4

    def _layer(self, name: str, linear: nn.Linear, inputs: ActivationQuantizer | None) -> RoundedLinear:
        with prefix_errors(name):
            check_magnitude(linear.weight.detach(), self.scale_dtype)
            return RoundedLinear(
                linear,
                *searched_grid(linear.weight, self.bits, self.group_size, self.scale_dtype),
                self.bits,
                group_size=self.group_size,
                compute_dtype=COMPUTE_DTYPES[self.compute_dtype],
                inputs=inputs,
            )

    def _draw_kept(self, generator: torch.Generator) -> DrawKept | None:
        if self.drop_probability == 1:
            return None
        return lambda shape: torch.rand(shape, generator=generator) < self.drop_probability

    def _quantizers(self, window: Window, draw: DrawKept | None) -> dict[str, ActivationQuantizer]:
        """Return the quantizer of each input, by the first linear that takes it."""
        assert self.activation_bits is not None
        quantizers = {}
        for leader, x in self._first_inputs(window).items():
            if not bool(torch.isfinite(x).all()):
                raise not_finite(f"the input of linear {leader} is NaN or infinite", self.compute_dtype)
            scale, zero_point = search_range(x, self.activation_bits, per_channel=False)
            quantizers[leader] = ActivationQuantizer(scale, zero_point, self.activation_bits, draw)
        for group in window.input_groups:
            if group[0] not in quantizers:
                raise UserError(
                    f"no token of the first calibration batch reaches {group[0]}, whose inputs are to be quantized: "
                    "raise method.batch_size, or use method.activation_bits=null."
                )
        return quantizers

    def _first_inputs(self, window: Window) -> dict[str, Tensor]:
        """Return inputs ``[tokens, in]`` of the first batch, those of tokens at equal distances if there are many."""
        found: dict[str, Tensor] = {}

        def look(leader: str, _: nn.Module, args: tuple[Tensor, ...]) -> None:
            x = args[0].detach().flatten(0, -2).float()
            if x.numel():
                found[leader] = x[:: -(-x.numel() // _SEARCHED)].clone()

        leaders = [group[0] for group in window.input_groups]
        hooks = [window.linears[name].register_forward_pre_hook(partial(look, name)) for name in leaders]
        try:
            with torch.no_grad(), window.autocast(self.compute_dtype):
                window.run(window.to_device(window.quant_inputs[: self.batch_size]))
        finally:
            for hook in hooks:
                hook.remove()
        return found

    def _scale_lr(self, quantizer: ActivationQuantizer) -> float:
        return self.scale_lr * (float(quantizer.scale.detach()) if self.relative_scale_lr else 1.0)

    def _reconstruct(
        self,
        window: Window,
        layers: dict[str, RoundedLinear],
        quantizers: list[ActivationQuantizer],
        generator: torch.Generator,
    ) -> None:
        full = window.full_outputs
        assert full is not None, "the driver brings the full-precision chain (needs_full_chain)"
        n = window.quant_inputs.shape[0]
        # Whole batches only: the block's arguments (masks, positions) are those of a whole batch.
        size = min(self.batch_size, n)

        def batches() -> Iterator[tuple[Tensor, Tensor]]:
            for _ in range(self.steps):
                batch = torch.randperm(n, generator=generator)[:size]
                yield mixed_inputs(window, batch, 1 - self.drop_probability, generator), window.to_device(full[batch])

        def run(x: Tensor) -> Tensor:
            with window.autocast(self.compute_dtype):
                return window.run(x)

        means = LossMeans(window, self.compute_dtype, steps=max(1, n // size))

        def on_step(reconstruction: float, rounding: float) -> None:
            means.add(loss=reconstruction + rounding, reconstruction_loss=reconstruction, rounding_loss=rounding)

        with replaced_linears(window, layers):
            reconstruct(
                run,
                list(layers.values()),
                quantizers,
                batches(),
                steps=self.steps,
                alpha_lr=self.alpha_lr,
                scale_lrs=[self._scale_lr(quantizer) for quantizer in quantizers],
                rounding_weight=self.rounding_weight,
                warmup=self.warmup,
                on_step=on_step,
            )
        means.emit()
