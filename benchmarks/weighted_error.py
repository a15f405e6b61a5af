"""Weighted error of each method relative to round to nearest, for every kind of linear of SmolLM2.

    python benchmarks/weighted_error.py [--bits 2] [--n-samples 32] [--n-blocks 30] [--methods awq quip]

The error of a linear is trace(D H D^T), with D the change of its weight and H the hessian of its inputs. All methods
see the same inputs: those of a chain whose linears are rounded to 8 bits, which is as good as full precision. Printed
per kind of linear: the mean of the blocks' ratios to round to nearest and, in brackets, the worst block's; at the end
of a line, the seconds that the method took.
"""

from __future__ import annotations

import argparse
import dataclasses
import time
from collections import defaultdict
from typing import ClassVar

from torch import Tensor

import ptq161
from ptq161.data.calibration import calibration_tokens
from ptq161.data.settings import CalibConfig
from ptq161.methods.awq import AWQ
from ptq161.methods.base import Method, Window
from ptq161.methods.compensation import weighted_error
from ptq161.methods.gptq import GPTQ
from ptq161.methods.layerwise import InputStatistics, LayerwiseMethod, collect_statistics
from ptq161.methods.omniquant import OmniQuant
from ptq161.methods.quip import QuIP
from ptq161.methods.rtn import RTN
from ptq161.methods.rtn import quantize_weight as round_to_nearest
from ptq161.models.architectures import keep_first_blocks
from ptq161.models.loading import load_model
from ptq161.models.settings import ModelConfig
from ptq161.packed.weight import PackedWeight


@dataclasses.dataclass(frozen=True)
class Comparison(LayerwiseMethod):
    """Runs every method on each window and hands 8-bit weights on.

    Attributes:
        methods: by name.
        errors: method -> linear -> weighted error, filled in as windows are seen.
        seconds: method -> seconds, without the statistics, which layer-wise methods share.
    """

    needs_full_chain: ClassVar[bool] = True
    takes_salient_masks: ClassVar[bool] = False

    methods: dict[str, Method] = dataclasses.field(default_factory=dict)
    errors: dict[str, dict[str, float]] = dataclasses.field(default_factory=lambda: defaultdict(dict))
    seconds: dict[str, float] = dataclasses.field(default_factory=lambda: defaultdict(float))

    def nominal_bits(self) -> float:
        """Bits of the weights that are handed on."""
        return 8.0

    def quantize_group(
        self, weights: dict[str, Tensor], statistics: InputStatistics | None, window: Window
    ) -> dict[str, PackedWeight]:
        """Round to 8 bits."""
        return {name: round_to_nearest(weight, 8) for name, weight in weights.items()}

    def quantize_window(self, window: Window) -> dict[str, PackedWeight]:
        """Compare the methods on one block."""
        statistics = collect_statistics(self, window)
        for label, method in self.methods.items():
            began = time.perf_counter()
            packed = self._run(method, statistics, window)
            self.seconds[label] += time.perf_counter() - began
            for group in window.input_groups:
                for name in group:
                    weight = window.linears[name].weight.detach()
                    hessian = statistics[group[0]].hessian
                    self.errors[label][name] = weighted_error(weight, packed[name].dequantize(), hessian)
        return {
            name: packed
            for group in window.input_groups
            for name, packed in self.quantize_group(_weights(window, group), None, window).items()
        }

    def _run(self, method: Method, statistics: dict[str, InputStatistics], window: Window) -> dict[str, PackedWeight]:
        if not isinstance(method, LayerwiseMethod):
            return method.quantize_window(window)
        packed: dict[str, PackedWeight] = {}
        for group in window.input_groups:
            packed.update(method.quantize_group(_weights(window, group), statistics[group[0]], window))
        return packed


def main() -> None:
    """Compare and print."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--bits", type=int, default=2)
    parser.add_argument("--n-samples", type=int, default=32)
    parser.add_argument("--seq-len", type=int, default=512)
    parser.add_argument("--n-blocks", type=int, default=30)
    parser.add_argument("--omniquant-epochs", type=int, default=4)
    parser.add_argument("--omniquant-lr", type=float, default=0.5)
    parser.add_argument("--methods", nargs="*", help="beside round to nearest; all without it")
    arguments = parser.parse_args()

    model, tokenizer = load_model(ModelConfig(name="smollm2_135m", asset="smollm2_135m"))
    keep_first_blocks(model, arguments.n_blocks)
    tokens = calibration_tokens(tokenizer, CalibConfig("squad", arguments.n_samples, arguments.seq_len), seed=0)
    bits = arguments.bits
    batch_size = 4  # blocks are replayed with arguments captured at one batch size
    methods: dict[str, Method] = {
        "gptq": GPTQ(bits=bits),
        "awq": AWQ(bits=bits, group_size=None),
        "quip": QuIP(bits=bits),
        "quip_hadamard": QuIP(bits=bits, rotation="hadamard"),
        "quip_unscaled": QuIP(bits=bits, rescale=False),
        "omniquant": OmniQuant(
            bits=bits,
            epochs=arguments.omniquant_epochs,
            lr=arguments.omniquant_lr,
            batch_size=batch_size,
            compute_dtype="bfloat16",
        ),
    }
    selected = methods if arguments.methods is None else {name: methods[name] for name in arguments.methods}
    compared = {"rtn": RTN(bits=bits), **selected}
    comparison = Comparison(batch_size=batch_size, compute_dtype="bfloat16", methods=compared)
    ptq161.quantize(model, tokens, comparison, progress=True)
    _print_table(comparison)


def _print_table(comparison: Comparison) -> None:
    kinds = list(dict.fromkeys(name.rpartition(".")[2] for name in comparison.errors["rtn"]))
    print(f"{'':16s}" + "".join(f"{kind:>16s}" for kind in kinds) + f"{'seconds':>10s}")
    for label in comparison.methods:
        cells = []
        for kind in kinds:
            errors = {n: e for n, e in comparison.errors[label].items() if n.endswith(kind)}
            ratios = [error / comparison.errors["rtn"][name] for name, error in errors.items()]
            cells.append(f"{sum(ratios) / len(ratios):8.4f} ({max(ratios):.3f})")
        print(f"{label:16s}" + "".join(f"{cell:>16s}" for cell in cells) + f"{comparison.seconds[label]:10.1f}")


def _weights(window: Window, names: list[str]) -> dict[str, Tensor]:
    return {name: window.linears[name].weight.detach() for name in names}


if __name__ == "__main__":
    main()
