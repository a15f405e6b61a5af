"""Water-filling on a window of decoder blocks (this project's own), in four steps.

1. allot bits to the input channels, per linear or for the whole model (:mod:`ptq161.methods.waterfill.allotment`);
2. fit the grid of each linear's codes (:func:`~ptq161.methods.codes.fit_grid`);
3. choose codes with error compensation (:func:`~ptq161.methods.codes.compensated_codes`);
4. learn codes and factors against the full-precision block (:func:`~ptq161.methods.codes.learn_window`).
"""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping, Sequence
from typing import ClassVar

import torch
from torch import Tensor, nn

from ptq161.checks import check_choice
from ptq161.errors import UserError
from ptq161.methods.base import LinearStatistics, Window, check_common, prefix_errors
from ptq161.methods.codes import CODES, LatentLinear, Learning, compensated_codes, fit_grid, learn_window, start_all
from ptq161.methods.compensation import check_damping
from ptq161.methods.layerwise import collect_statistics
from ptq161.methods.waterfill.allotment import allot, channel_energy, check_budget
from ptq161.numerics import COMPUTE_DTYPES
from ptq161.packed.allotted import AllottedWeight, Grid, check_tiers
from ptq161.packed.weight import PackedWeight

LEVELS = ("linear", "model")


@dataclasses.dataclass(frozen=True)
class Waterfill:
    """Allotted channel bits with learned codes (this project's own).

    Attributes:
        bits: mean bits of a code, from the lowest to the highest tier.
        tiers: bits that an input channel may have.
        level: the mean is kept in each ``linear``, or over the whole ``model`` with one water level for all channels.
        plan_samples: calibration sequences for the statistics of ``level=model``.
        codes: ``rounded`` to the nearest, ``compensated``, or ``learned`` from the compensated ones.
        epochs: passes over the calibration windows, of learned codes.
        code_lr: learning rate of the codes, in cells of the grid.
        factor_lr: learning rate of the grid's factors, relative to them.
        held_out: share of the calibration windows by which the best state of a block is chosen; 0 takes the last one.
        softness: share of the way to their latents at which learned codes begin; it falls to zero
            (:class:`ptq161.methods.codes.Learning`).
        absorb_epochs: passes after each input group in which the linears of a block that are still float absorb the
            errors of the others (:func:`ptq161.methods.codes.window.absorb`), before all codes are learned; 0 for none.
        absorb_lr: learning rate of their weights, in units of their root mean square.
        input_drop: probability with which an element of the block's input comes from the full-precision chain, drawn
            anew in each step (QDrop's regularizer); 0 draws nothing.
        damping: share of the hessian's mean diagonal that is added to it before it is inverted.
        batch_size: calibration sequences per step.
        block_size: consecutive decoder blocks learned together.
        compute_dtype: dtype of matrix products; latent weights, losses and the optimizer are float32 always.
        scale_dtype: dtype in which factors and steps are stored.

    Example:
        >>> import ptq161
        >>> from transformers import LlamaConfig, LlamaForCausalLM
        >>> sizes = {"vocab_size": 8, "hidden_size": 64, "intermediate_size": 64, "num_attention_heads": 1}
        >>> model = LlamaForCausalLM(LlamaConfig(num_hidden_layers=1, **sizes))
        >>> model = ptq161.quantize(model, torch.arange(8).view(2, 4), Waterfill(bits=2.0, epochs=1, batch_size=1))
        >>> packed = model.model.layers[0].mlp.up_proj.packed
        >>> type(packed).__name__, packed.code_bits() <= 4
        ('AllottedWeight', True)
    """

    format: ClassVar[str] = "allotted"
    needs_full_chain: ClassVar[bool] = True
    takes_salient_masks: ClassVar[bool] = False

    bits: float = 1.6
    tiers: list[int] = dataclasses.field(default_factory=lambda: [1, 2, 4])
    level: str = "model"
    plan_samples: int = 16
    codes: str = "learned"
    epochs: int = 4
    code_lr: float = 1e-2
    factor_lr: float = 1e-3
    held_out: float = 0.0625
    softness: float = 0.0
    absorb_epochs: int = 0
    absorb_lr: float = 1e-2
    input_drop: float = 0.0
    damping: float = 0.01
    batch_size: int = 4
    block_size: int = 1
    compute_dtype: str = "float32"
    scale_dtype: str = "float16"

    def __post_init__(self) -> None:
        """Reject values outside their range."""
        check_common(self.batch_size, self.compute_dtype, self.scale_dtype)
        check_tiers(self.tiers)
        check_budget(self.bits, self.tiers)
        check_choice("method.level", self.level, LEVELS)
        check_choice("method.codes", self.codes, CODES)
        check_damping(self.damping)
        for name, least in (("block_size", 1), ("method.plan_samples", 1), ("method.epochs", 0)):
            value = getattr(self, name.removeprefix("method."))
            if value < least:
                raise UserError(f"{name}={value}: use at least {least}.")
        Learning.of(self)

    @property
    def needs_plan(self) -> bool:
        """One water level for the model follows from all of its linears."""
        return self.level == "model"

    def nominal_bits(self) -> float:
        """Mean bits of a code; labels and factors are not counted."""
        return self.bits

    def plan(self, statistics: Mapping[str, LinearStatistics]) -> dict[str, Tensor]:
        """Allot bits to the channels of all linears with one water level: ``[in]`` uint8 for each linear."""
        energies = [channel_energy(s.weight.detach(), s.mean_square, s.gradient_energy) for s in statistics.values()]
        costs = [
            torch.full_like(energy, s.weight.shape[0]) for energy, s in zip(energies, statistics.values(), strict=True)
        ]
        bits = allot(torch.cat(energies), self.bits, self.tiers, torch.cat(costs)).to(torch.uint8)
        return dict(zip(statistics, bits.split([len(energy) for energy in energies]), strict=True))

    def quantize_window(self, window: Window) -> dict[str, PackedWeight]:
        """Allot, compensate and learn the codes of the window's linears.

        Raises:
            UserError: an input or a loss is not finite.
        """
        bits: dict[str, Tensor] = {}

        def start(names: Sequence[str], linears: Mapping[str, nn.Linear], hessian: Tensor) -> dict[str, LatentLinear]:
            found = {}
            for name in names:
                with prefix_errors(name):
                    bits[name] = self._allotted(window, name, hessian)
                    found[name] = self._start(linears[name], bits[name], hessian)
                window.on_metric("code_bits", float(bits[name].double().mean()), linear=name)
            return found

        def pack(name: str, layer: LatentLinear) -> PackedWeight:
            grid = layer.grid()
            factors = Grid(grid.row, grid.column, grid.scale, grid.zero_point)
            codes = layer.codes().to(torch.uint8)
            return AllottedWeight.pack(codes, bits[name], factors, tiers=list(self.tiers), scale_dtype=self.scale_dtype)

        if self.codes == "learned" and self.epochs > 0:
            layers = learn_window(self, window, start)  # 4
        else:
            layers = start_all(window, start, collect_statistics(self, window))
        return {name: pack(name, layer) for name, layer in layers.items()}

    def _allotted(self, window: Window, name: str, hessian: Tensor) -> Tensor:
        # 1. With a plan, one water level for the whole model has decided; else the linear keeps the mean itself.
        if window.plan is not None:
            return window.plan[name].long()
        return allot(channel_energy(window.linears[name].weight.detach(), hessian.diagonal()), self.bits, self.tiers)

    def _start(self, linear: nn.Linear, bits: Tensor, hessian: Tensor) -> LatentLinear:
        weight = linear.weight.detach().float()
        grid = fit_grid(weight, bits, self.scale_dtype)  # 2
        rounded = self.codes == "rounded"
        codes = grid.nearest(weight) if rounded else compensated_codes(weight, grid, hessian, self.damping)  # 3
        return LatentLinear(linear, grid, codes, COMPUTE_DTYPES[self.compute_dtype])
