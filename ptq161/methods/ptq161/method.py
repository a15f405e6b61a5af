"""PTQ1.61 on a window of decoder blocks: mask, binarize, then learn scales and angles against full precision.

The steps of Zhao et al., ACL 2025 (arXiv 2502.13179), numbered as in the code below:

1. the one-dimensional mask of salient input channels (Section 3.2), :func:`~ptq161.methods.ptq161.salient_mask`;
2. salient channels to ``salient_bits``, the others to a sign with the row's mean and scale (Eq. 2 and 3),
   :func:`~ptq161.methods.ptq161.quantize_salient`, :func:`~ptq161.methods.ptq161.initial_scales`;
3. angular factors per row and column (Eq. 5), one at first;
4. scales and angular factors learned block by block against full precision (Section 3.3),
   :func:`~ptq161.methods.ptq161.block_loss`.

Signs and salient codes are the nearest ones in the paper. Two options go beyond it: codes of error compensation in step
2, and codes that are learned in step 4 (:mod:`ptq161.methods.codes`).
"""

from __future__ import annotations

import dataclasses
import logging
from collections.abc import Mapping, Sequence
from functools import partial
from typing import Any, ClassVar

import torch
from torch import Tensor, nn

from ptq161.checks import check_choice
from ptq161.errors import UserError
from ptq161.methods.base import Window, check_common, check_rate, prefix_errors
from ptq161.methods.blockwise import optimize, replaced_linears
from ptq161.methods.codes import CODES, CodeGrid, LatentLinear, Learning, compensated_codes, learn_window
from ptq161.methods.compensation import check_damping
from ptq161.methods.layerwise import collect_statistics
from ptq161.methods.ptq161.binarization import SALIENT_RANGES, block_loss
from ptq161.methods.ptq161.coding import binary_grid, pack_latent
from ptq161.methods.ptq161.saliency import SALIENCIES, channel_saliency, check_mask_ratio, salient_mask
from ptq161.methods.ptq161.trainable import BinaryLinear
from ptq161.numerics import COMPUTE_DTYPES
from ptq161.packed.uniform import UNIFORM_BITS
from ptq161.packed.weight import PackedWeight

log = logging.getLogger(__name__)

_LARGE_STEP = 0.1
"""Share of a row scale that one step may move it by without a word."""


@dataclasses.dataclass(frozen=True)
class PTQ161:
    """PTQ1.61 (Zhao et al., ACL 2025). The defaults are those of the released code.

    Attributes:
        mask_ratio: share of salient input channels, kept at ``salient_bits``.
        epochs: passes over the calibration set per window; 0 leaves the initial scales.
        scale_lr: learning rate of the row scales.
        relative_scale_lr: take ``scale_lr`` as a share of each linear's median row scale. The released rate is
            absolute: how far the scales move depends on the size of the weights, and so does the result where a model
            is rescaled without a change of its function.
        angle_lr: learning rate of both angular factors.
        batch_size: calibration sequences per step.
        block_size: consecutive decoder blocks optimized together.
        compute_dtype: dtype of matrix products (bfloat16 and float16 by autocast); scales, losses and the optimizer
            are float32 always.
        scale_dtype: dtype in which scales, means, angles and zero points are stored.
        salient_bits: bits of the salient channels.
        salient_range: range of the salient channels' quantizer, ``row`` (released) or ``salient``.
        saliency: what makes a channel salient: the ``max`` (released) or ``mean`` (the paper's pseudocode) of |x| over
            the calibration tokens on the full-precision chain; ``hessian`` (OWQ), ``magnitude`` of the weights or
            ``random`` (:mod:`ptq161.methods.ptq161.saliency`).
        learn_scale: optimize the row scales.
        learn_angles: optimize the angular factors.
        learn_mean: optimize the row means as well, at the rate of the row scales.
        cosine_loss: include the cosine terms in the objective.
        codes: signs and salient codes: ``rounded`` to the nearest (released), ``compensated`` for the errors of the
            channels before, or ``learned`` from the compensated ones, with the relative losses of
            :mod:`ptq161.methods.codes.learn` in place of the paper's.
        code_lr: learning rate of learned codes, in cells of the grid.
        factor_lr: of the scales, angles and means beside learned codes, relative to them; ``scale_lr`` and
            ``angle_lr`` are of the other two.
        held_out: share of the calibration windows by which the best state of a block is chosen, of learned codes.
        softness: share of the way to their latents at which learned codes begin; it falls to zero
            (:class:`ptq161.methods.codes.Learning`).
        absorb_epochs: passes after each input group in which the linears of a block that are still float absorb the
            errors of the others (:func:`ptq161.methods.codes.window.absorb`), before all codes are learned; 0 for none.
        absorb_lr: learning rate of their weights, in units of their root mean square.
        input_drop: probability with which an element of the block's input comes from the full-precision chain, drawn
            anew in each step (QDrop's regularizer); 0 draws nothing.
        damping: share of the hessian's mean diagonal that is added to it before it is inverted, of codes that are not
            ``rounded``.

    Example:
        >>> import ptq161
        >>> from transformers import LlamaConfig, LlamaForCausalLM
        >>> PTQ161(mask_ratio=0.2).nominal_bits()  # 0.8 + 0.2 * 4
        1.6
        >>> sizes = {"vocab_size": 8, "hidden_size": 64, "intermediate_size": 64, "num_attention_heads": 1}
        >>> model = LlamaForCausalLM(LlamaConfig(num_hidden_layers=1, **sizes))
        >>> model = ptq161.quantize(model, torch.arange(8).view(2, 4), PTQ161(epochs=1))
        >>> type(model.model.layers[0].mlp.up_proj.packed).__name__
        'StructuredBinaryWeight'
    """

    format: ClassVar[str] = "structured_binary"
    needs_full_chain: ClassVar[bool] = True
    takes_salient_masks: ClassVar[bool] = True

    mask_ratio: float = 0.2
    epochs: int = 20
    scale_lr: float = 5e-4
    relative_scale_lr: bool = False
    angle_lr: float = 1e-3
    batch_size: int = 1
    block_size: int = 1
    compute_dtype: str = "float32"
    scale_dtype: str = "float16"
    salient_bits: int = 4
    salient_range: str = "row"
    saliency: str = "max"
    learn_scale: bool = True
    learn_angles: bool = True
    learn_mean: bool = False
    cosine_loss: bool = True
    codes: str = "rounded"
    code_lr: float = 1e-2
    factor_lr: float = 1e-3
    held_out: float = 0.0625
    softness: float = 0.0
    absorb_epochs: int = 0
    absorb_lr: float = 1e-2
    input_drop: float = 0.0
    damping: float = 0.01

    def __post_init__(self) -> None:
        """Reject values outside their range."""
        check_common(self.batch_size, self.compute_dtype, self.scale_dtype)
        check_mask_ratio(self.mask_ratio)
        if self.block_size < 1:
            raise UserError(f"block_size={self.block_size}: use at least 1.")
        if self.epochs < 0:
            raise UserError(f"method.epochs={self.epochs}: use at least 0.")
        for name, rate in (("scale_lr", self.scale_lr), ("angle_lr", self.angle_lr)):
            check_rate(f"method.{name}", rate)
        if self.salient_bits not in UNIFORM_BITS:
            raise UserError(f"method.salient_bits={self.salient_bits}: use one of {', '.join(map(str, UNIFORM_BITS))}.")
        check_choice("method.salient_range", self.salient_range, SALIENT_RANGES)
        check_choice("method.saliency", self.saliency, SALIENCIES)
        check_choice("method.codes", self.codes, CODES)
        Learning.of(self)
        check_damping(self.damping)

    def nominal_bits(self) -> float:
        """Bits as the paper counts them: one per binary and ``salient_bits`` per salient weight."""
        return (1 - self.mask_ratio) + self.mask_ratio * self.salient_bits

    def quantize_window(self, window: Window) -> dict[str, PackedWeight]:
        """Binarize the window's linears and learn their scales and angles, or their codes too.

        Raises:
            UserError: the loss is not finite.
        """
        # 1. Linears keep the mask they are given, as in a quantization of a restored model.
        masks = self._masks(window) if window.salient_masks is None else window.salient_masks
        for name, mask in masks.items():
            window.on_metric("salient_channels", int(mask.sum()), linear=name)
        if self.codes == "learned":
            return self._learn_codes(window, masks)
        layers = self._binarize(window, masks)
        groups = self._learned(window, layers)
        if self.epochs and groups:  # 4
            self._optimize(window, layers, torch.optim.AdamW(groups, weight_decay=0.0, fused=True))
        return {name: layer.pack() for name, layer in layers.items()}

    def _binarize(self, window: Window, masks: Mapping[str, Tensor]) -> dict[str, BinaryLinear]:
        codes = self._compensated(window, masks) if self.codes == "compensated" else {}
        # 2 and 3.
        return {
            name: BinaryLinear(
                linear,
                masks[name],
                salient_bits=self.salient_bits,
                salient_range=self.salient_range,
                scale_dtype=self.scale_dtype,
                compute_dtype=COMPUTE_DTYPES[self.compute_dtype],
                codes=codes[name][1] if codes else None,
            )
            for name, linear in window.linears.items()
        }

    def _compensated(self, window: Window, masks: Mapping[str, Tensor]) -> dict[str, tuple[CodeGrid, Tensor]]:
        """Return the grid of each linear, and its codes with error compensation."""
        statistics = collect_statistics(self, window)
        return {
            name: self._compensate(name, window.linears[name], masks[name], statistics[group[0]].hessian)
            for group in window.input_groups
            for name in group
        }

    def _compensate(self, name: str, linear: nn.Linear, mask: Tensor, hessian: Tensor) -> tuple[CodeGrid, Tensor]:
        weight = linear.weight.detach().float()
        with prefix_errors(name):
            grid = binary_grid(weight, mask, self.salient_bits, self.salient_range, self.scale_dtype)
            return grid, compensated_codes(weight, grid, hessian, self.damping)

    def _learn_codes(self, window: Window, masks: Mapping[str, Tensor]) -> dict[str, PackedWeight]:
        def start(names: Sequence[str], linears: Mapping[str, nn.Linear], hessian: Tensor) -> dict[str, LatentLinear]:
            return {
                name: self._latent(linears[name], *self._compensate(name, linears[name], masks[name], hessian))
                for name in names
            }

        layers = learn_window(self, window, start)
        return {name: pack_latent(layer, self.salient_bits, self.scale_dtype) for name, layer in layers.items()}

    def _latent(self, linear: nn.Linear, grid: CodeGrid, codes: Tensor) -> LatentLinear:
        layer = LatentLinear(linear, grid, codes, COMPUTE_DTYPES[self.compute_dtype])
        for gain in (layer.row_gain, layer.scale_gain):
            gain.requires_grad_(self.learn_scale)
        layer.column_gain.requires_grad_(self.learn_angles)
        assert layer.mean_gain is not None, "binary_grid has a mean"
        layer.mean_gain.requires_grad_(self.learn_mean)
        return layer

    def _masks(self, window: Window) -> dict[str, Tensor]:
        """Choose each linear's salient channels; linears that share an input share their activation scale."""
        # 1. From the full-precision chain, so that the mask does not depend on how earlier blocks were quantized.
        generator = window.generator("saliency")
        masks = {}
        for group in window.input_groups:
            activation = window.activations[group[0]]
            for name in group:
                scores = channel_saliency(self.saliency, window.linears[name].weight, activation, generator)
                masks[name] = salient_mask(scores, self.mask_ratio)
        return masks

    def _learned(self, window: Window, layers: Mapping[str, BinaryLinear]) -> list[dict[str, Any]]:
        """Return the optimizer's parameter groups, and freeze what is not learned."""
        scales = [layer.scale for layer in layers.values()]
        angles = [angle for layer in layers.values() for angle in (layer.row_angle, layer.column_angle)]
        means = [layer.mean for layer in layers.values()]
        for parameters, is_learned in (
            (scales, self.learn_scale),
            (means, self.learn_mean),
            (angles, self.learn_angles),
        ):
            for parameter in parameters:
                parameter.requires_grad_(is_learned)
        groups = self._scale_groups(window, layers) if self.learn_scale else []
        groups += [{"params": angles, "lr": self.angle_lr}] if self.learn_angles else []
        return groups + ([{"params": means, "lr": self.scale_lr}] if self.learn_mean else [])

    def _scale_groups(self, window: Window, layers: Mapping[str, BinaryLinear]) -> list[dict[str, Any]]:
        medians = {name: float(layer.scale.detach().median()) for name, layer in layers.items()}
        if self.relative_scale_lr:
            return [{"params": [layers[name].scale], "lr": self.scale_lr * medians[name]} for name in layers]
        shares = {name: self.scale_lr / median for name, median in medians.items() if median > 0}
        large = {name: share for name, share in shares.items() if share > _LARGE_STEP}
        for name, share in large.items():
            window.on_metric("scale_lr_share", share, linear=name)
        if large and self.epochs:
            log.warning(
                "block %d: one step at method.scale_lr=%g moves row scales by up to %.0f %% of their size (%s); "
                "method.relative_scale_lr=true takes it as a share of them",
                window.first_block,
                self.scale_lr,
                100 * max(large.values()),
                max(large, key=lambda name: large[name]),
            )
        return [{"params": [layer.scale for layer in layers.values()], "lr": self.scale_lr}]

    def _optimize(self, window: Window, layers: Mapping[str, BinaryLinear], optimizer: torch.optim.Optimizer) -> None:
        """Learn against the full-precision window on both chains' inputs (Section 3.3)."""
        assert window.full_outputs is not None, "the driver brings the full-precision chain (needs_full_chain)"
        # 4. Both targets are fixed: full precision on the full-precision chain, and on the quantized chain's input.
        homologous = window.run_all(window.quant_inputs, self.batch_size, self.compute_dtype)
        with replaced_linears(window, layers):
            optimize(
                window,
                optimizer,
                (window.full_outputs, homologous),
                partial(block_loss, cosine=self.cosine_loss),
                epochs=self.epochs,
                batch_size=self.batch_size,
                compute_dtype=self.compute_dtype,
                input_drop=self.input_drop,
            )
