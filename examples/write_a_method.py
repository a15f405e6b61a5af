"""A quantization method of your own in forty lines, compared with rounding to nearest.

Usage::

    python examples/write_a_method.py

The method keeps the sign of each weight and one scale per output row. With ``weighted=True`` the scale minimizes the
error of the row's output under the diagonal of the inputs' second moments, with ``weighted=False`` that of the weights.
Both are stored in PTQ1.61's format with no salient channel, so bits, checkpoints and evaluation need nothing new.
To run a method by name from the command line, see the documentation ("Writing a method").
"""

from __future__ import annotations

import dataclasses
from collections import defaultdict
from collections.abc import Mapping
from statistics import fmean

import torch
from torch import Tensor
from transformers import LlamaConfig, LlamaForCausalLM, PreTrainedModel

import ptq161
from ptq161.methods.base import Method, Window
from ptq161.methods.layerwise import InputStatistics, LayerwiseMethod
from ptq161.packed.structured_binary import StructuredBinaryWeight
from ptq161.packed.weight import PackedWeight


@dataclasses.dataclass(frozen=True)
class SignWithRowScale(LayerwiseMethod):
    """``sign(W)`` times a scale per output row.

    Attributes:
        weighted: weigh each input channel by its second moment over the calibration tokens.
    """

    weighted: bool = True

    def nominal_bits(self) -> float:
        """One sign per weight; scales are not counted."""
        return 1.0

    def quantize_group(
        self, weights: Mapping[str, Tensor], statistics: InputStatistics | None, window: Window
    ) -> dict[str, PackedWeight]:
        """Quantize the linears that share one input."""
        assert statistics is not None
        moments = statistics.hessian.diagonal()  # [in], proportional to the mean of x^2
        importance = moments if self.weighted else torch.ones_like(moments)
        return {name: self._pack(weight, importance) for name, weight in weights.items()}

    def _pack(self, weight: Tensor, importance: Tensor) -> PackedWeight:
        # The scale a that minimizes sum_j importance_j (w_j - a sign(w_j))^2 for each row.
        scale = (importance * weight.abs()).sum(1, keepdim=True) / importance.sum().clamp(min=1e-12)
        none = weight.new_zeros(weight.shape[0], 0)  # no salient channel, so no codes and no grid for them
        return StructuredBinaryWeight.pack(
            mask=torch.zeros(weight.shape[1], dtype=torch.bool, device=weight.device),
            sign=weight >= 0,
            scale=scale,
            mean=torch.zeros_like(scale),
            column_angle=weight.new_ones(weight.shape[1]),
            codes=none.to(torch.uint8),
            salient_scale=none,
            salient_zero_point=none,
            salient_bits=4,
            scale_dtype=self.scale_dtype,
        )


def tiny_model() -> PreTrainedModel:
    """Make a random Llama of two blocks whose channels differ in size, as those of trained models do."""
    config = LlamaConfig(
        vocab_size=256, hidden_size=64, intermediate_size=96, num_hidden_layers=2, num_attention_heads=4
    )
    torch.manual_seed(0)
    model: PreTrainedModel = LlamaForCausalLM(config)
    for name, parameter in model.named_parameters():
        if "norm" in name:
            parameter.data = torch.randn_like(parameter).exp()
    return model


def measured(method: Method) -> tuple[float, float]:
    """Quantize the tiny model; return bits per weight and relative output error, each a mean over its linears."""
    numbers: dict[str, list[float]] = defaultdict(list)

    def on_metric(name: str, value: float, /, **where: int | str) -> None:
        numbers[name].append(value)

    tokens = torch.randint(0, 256, (4, 64), generator=torch.Generator().manual_seed(0))
    ptq161.quantize(tiny_model(), tokens, method, on_metric=on_metric)
    return fmean(numbers["bits_per_weight"]), fmean(numbers["output_error"])


def main() -> None:
    """Print a row per method."""
    methods: dict[str, Method] = {
        "sign, scale of the weights": SignWithRowScale(weighted=False),
        "sign, scale of the outputs": SignWithRowScale(),
        "round to nearest, 2 bits": ptq161.RTN(bits=2),
    }
    print(f"{'method':<28}{'bits per weight':>16}{'output error':>14}")
    for name, method in methods.items():
        bits, error = measured(method)
        print(f"{name:<28}{bits:>16.2f}{error:>14.3f}")


if __name__ == "__main__":
    main()
