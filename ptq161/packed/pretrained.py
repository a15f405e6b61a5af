"""How transformers opens a packed checkpoint: ``from_pretrained`` of its folder, once ptq161 is imported.

transformers looks up the quantization method of ``config.json`` in its registry, where this module enters ``ptq161``.
``import ptq161`` does not load transformers; this module is imported after transformers' own registry
(:func:`ptq161.lazy.import_after`), and imports the rest of the package when a checkpoint is opened: transformers itself
is not whole before.
"""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
from transformers.quantizers.auto import register_quantization_config, register_quantizer
from transformers.quantizers.base import HfQuantizer
from transformers.utils.quantization_config import QuantizationConfigMixin

from ptq161.models.settings import PACKED_FORMAT

if TYPE_CHECKING:
    from transformers import PretrainedConfig, PreTrainedModel


@register_quantization_config(PACKED_FORMAT)
class PackedConfig(QuantizationConfigMixin):
    """The ``quantization_config`` of a packed checkpoint.

    Attributes:
        linears: settings of each packed linear, by module path.
        embeddings: settings of each packed embedding, by module path; empty where they are dense.
        schema_version: of the checkpoint's layout.
        nominal_bits_per_weight: bits as the method's paper counts them.

    Example:
        >>> PackedConfig(linears={}, schema_version=1).to_dict()["quant_method"]
        'ptq161'
    """

    def __init__(
        self,
        linears: dict[str, Any],
        schema_version: int,
        nominal_bits_per_weight: float | None = None,
        embeddings: dict[str, Any] | None = None,
        **_: Any,
    ) -> None:
        self.quant_method = PACKED_FORMAT  # type: ignore[assignment]  # transformers' own methods are an enumeration
        self.linears = linears
        self.embeddings = embeddings or {}
        self.schema_version = schema_version
        self.nominal_bits_per_weight = nominal_bits_per_weight


@register_quantizer(PACKED_FORMAT)
class PackedQuantizer(HfQuantizer):
    """Puts packed linears into an empty model; transformers then loads their tensors as those of any other.

    Example:
        >>> import tempfile
        >>> import ptq161
        >>> from transformers import LlamaConfig, LlamaForCausalLM
        >>> sizes = {"vocab_size": 8, "hidden_size": 8, "intermediate_size": 8, "num_attention_heads": 1}
        >>> model = LlamaForCausalLM(LlamaConfig(num_hidden_layers=1, **sizes))
        >>> model = ptq161.quantize(model, torch.zeros(1, 2, dtype=torch.long), ptq161.RTN(bits=2))
        >>> with tempfile.TemporaryDirectory() as folder:
        ...     file = ptq161.save(model, None, folder)
        ...     again = LlamaForCausalLM.from_pretrained(folder)
        >>> type(again.hf_quantizer).__name__, type(again.model.layers[0].mlp.up_proj).__name__
        ('PackedQuantizer', 'PackedLinear')
    """

    quantization_config: PackedConfig
    requires_calibration = True
    """A model is not packed while it is loaded."""

    @property
    def is_trainable(self) -> bool:
        """Adapters beside the packed weights can be trained."""
        return True

    def is_serializable(self) -> bool:
        """``save_pretrained`` writes a packed checkpoint."""
        return True

    def update_attn_implementation(self, config: PretrainedConfig) -> PretrainedConfig:
        """Name the file of tensors, before transformers looks for one of its own name."""
        from ptq161.packed.layout import WEIGHTS_FILE

        config.transformers_weights = WEIGHTS_FILE
        return config

    def update_weight_conversions(self, weight_conversions: list[Any], model: PreTrainedModel) -> list[Any]:
        """Take tensors by the names under which they are stored."""
        return []

    def _process_model_before_weight_loading(
        self, model: PreTrainedModel, *, checkpoint_files: list[str] | None = None, **_: Any
    ) -> None:
        from ptq161.files.reading import reading
        from ptq161.packed.checkpoint import install_empty
        from ptq161.packed.layout import ADVICE_AGAIN, check_layout

        assert checkpoint_files is not None, "transformers names the file of a folder that has one"
        file = Path(checkpoint_files[0])
        with reading(file.parent, ADVICE_AGAIN):
            check_layout(file.parent, self.quantization_config.schema_version)
            install_empty(model, self.quantization_config.linears, self.quantization_config.embeddings, file)

    def _process_model_after_weight_loading(self, model: PreTrainedModel, **_: Any) -> None:
        from ptq161.packed.checkpoint import own_methods

        del model.config.transformers_weights
        own_methods(model)

    def _dequantize(self, model: PreTrainedModel, dtype: torch.dtype | None = None) -> PreTrainedModel:
        from ptq161.packed.model import dequantize

        return dequantize(model, dtype)
