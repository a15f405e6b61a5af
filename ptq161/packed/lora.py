"""PEFT's LoRA beside packed linears, once ptq161 is imported; PEFT saves and loads the adapters in its own files.

PEFT asks a ``LoraConfig`` what stands in for a module that it does not know. This module is imported after PEFT's LoRA
(:func:`ptq161.lazy.import_after`), and enters packed linears in every such configuration.
"""

from __future__ import annotations

import warnings
from typing import Any

from peft.tuners.lora.config import LoraConfig
from peft.tuners.lora.layer import Linear

from ptq161.errors import UserError
from ptq161.packed.linear import PackedLinear


class PackedLora(Linear):
    """A packed linear with low-rank adapters beside it, which alone are trained.

    Example:
        >>> import ptq161, torch
        >>> from peft import LoraConfig, get_peft_model
        >>> from transformers import LlamaConfig, LlamaForCausalLM
        >>> sizes = {"vocab_size": 8, "hidden_size": 8, "intermediate_size": 8, "num_attention_heads": 1}
        >>> model = LlamaForCausalLM(LlamaConfig(num_hidden_layers=1, **sizes))
        >>> model = ptq161.quantize(model, torch.zeros(1, 2, dtype=torch.long), ptq161.RTN(bits=2))
        >>> adapted = get_peft_model(model, LoraConfig(r=2, target_modules=["q_proj"]))
        >>> type(model.model.layers[0].self_attn.q_proj).__name__
        'PackedLora'
        >>> adapted.get_nb_trainable_parameters()[0]
        32
    """

    def __init__(self, base_layer: PackedLinear, adapter_name: str, **settings: Any) -> None:
        with warnings.catch_warnings():
            warnings.filterwarnings("ignore", message="Unsupported layer type")  # of a layer that PEFT does not know
            super().__init__(base_layer, adapter_name, **settings)

    def merge(self, safe_merge: bool = False, adapter_names: list[str] | None = None) -> None:
        """Refuse.

        Raises:
            UserError: always.
        """
        raise UserError(
            "an adapter cannot be merged into a packed weight: keep it beside it, or call model.dequantize() before "
            "PEFT wraps the model."
        )


_prepare = LoraConfig.__post_init__


def _prepare_with_packed(self: LoraConfig) -> None:
    _prepare(self)  # type: ignore[no-untyped-call]  # PEFT's functions have no annotations
    self._register_custom_module({PackedLinear: PackedLora})


LoraConfig.__post_init__ = _prepare_with_packed  # type: ignore[method-assign]
