"""The shapes of a model from its config alone: no weights are read."""

from __future__ import annotations

import dataclasses
from collections.abc import Sequence
from pathlib import Path

import torch
from accelerate import init_empty_weights
from safetensors import safe_open
from torch import nn
from transformers import AutoConfig, PretrainedConfig, PreTrainedModel

from ptq161.models.architectures import architecture_from_config, decoder_blocks, input_groups
from ptq161.models.checks import check_not_quantized
from ptq161.models.experts import split_experts
from ptq161.models.loading import auto_class, cut_to, loading_errors, source_of
from ptq161.models.settings import ModelConfig
from ptq161.numerics import plain_torch

Shape = tuple[int, int]
"""``(out, in)`` of a linear's weight."""


@dataclasses.dataclass(frozen=True)
class BlockShape:
    """One decoder block.

    Attributes:
        groups: for each input, the shapes of the quantized linears that share it.
        rest: number of all other parameters: norms, biases, routers.
    """

    groups: tuple[tuple[Shape, ...], ...]
    rest: int

    @property
    def linears(self) -> list[Shape]:
        """All quantized linears."""
        return [shape for group in self.groups for shape in group]

    @property
    def weights(self) -> int:
        """Number of weights of the quantized linears."""
        return sum(rows * columns for rows, columns in self.linears)


@dataclasses.dataclass(frozen=True)
class ModelShape:
    """A model, as far as memory and time depend on it.

    Attributes:
        blocks: in their order.
        outside: number of parameters outside of the blocks, tied ones counted once.
        hidden: width of the hidden states.
        heads: attention heads.
        vocabulary: rows of the embedding.
        dtype: of the weights as they are loaded.
    """

    blocks: tuple[BlockShape, ...]
    outside: int
    hidden: int
    heads: int
    vocabulary: int
    dtype: torch.dtype

    @property
    def parameters(self) -> int:
        """Number of all parameters."""
        return self.outside + sum(block.weights + block.rest for block in self.blocks)

    @property
    def linear_weights(self) -> int:
        """Number of weights of all quantized linears."""
        return sum(block.weights for block in self.blocks)

    def windows(self, block_size: int) -> list[Sequence[BlockShape]]:
        """Return the blocks of each window."""
        return [self.blocks[start : start + block_size] for start in range(0, len(self.blocks), block_size)]


def empty_model(config: ModelConfig) -> PreTrainedModel:
    """Make a model without weights, on the meta device, from its config alone.

    Args:
        config: the folder needs no more than a ``config.json``.

    Returns:
        the model in the dtype in which it would be loaded, cut to ``config.n_blocks``, with the experts of a mixture as
        linears of their own.

    Raises:
        UserError: there is no config, the hub cannot be reached, the architecture is not supported or the model is
            already quantized.
    """
    source, arguments = source_of(config)
    with loading_errors(config):
        hf_config = AutoConfig.from_pretrained(source, **arguments)
    architecture_from_config(hf_config)
    check_not_quantized(hf_config)
    with plain_torch(), init_empty_weights(include_buffers=False), loading_errors(config):
        model: PreTrainedModel = auto_class(hf_config).from_config(hf_config, dtype=_dtype(hf_config, Path(source)))
    model.tie_weights()
    cut_to(model.eval(), config.n_blocks)
    split_experts(model)
    return model


def shape_of(model: PreTrainedModel) -> ModelShape:
    """Return the shape of a full-precision model, on the meta device or not, whose experts are split."""
    text = model.config.get_text_config()
    blocks = tuple(_block_shape(model, block) for block in decoder_blocks(model))
    inside = sum(block.weights + block.rest for block in blocks)
    return ModelShape(
        blocks=blocks,
        outside=sum(parameter.numel() for parameter in model.parameters()) - inside,
        hidden=_number(text, "hidden_size", "d_model"),  # LLaDA has the second names
        heads=_number(text, "num_attention_heads", "n_heads"),
        vocabulary=int(text.vocab_size),
        dtype=model.dtype,
    )


def _number(config: PretrainedConfig, *names: str) -> int:
    return next(int(getattr(config, name)) for name in names if hasattr(config, name))


def _block_shape(model: PreTrainedModel, block: nn.Module) -> BlockShape:
    def shape(path: str) -> Shape:
        linear = block.get_submodule(path)
        assert isinstance(linear, nn.Linear)
        return linear.out_features, linear.in_features

    groups = tuple(tuple(shape(path) for path in group) for group in input_groups(model, block))
    weights = sum(rows * columns for group in groups for rows, columns in group)
    return BlockShape(groups, sum(parameter.numel() for parameter in block.parameters()) - weights)


def _dtype(config: PretrainedConfig, folder: Path) -> torch.dtype:
    """Return the dtype in which transformers would load a model: the config's, or that of the first float tensor."""
    if isinstance(config.dtype, str):
        named: torch.dtype = getattr(torch, config.dtype)
        return named
    if config.dtype is not None:
        return config.dtype
    for file in sorted(folder.glob("*.safetensors")):
        with safe_open(file, framework="pt") as opened:
            for name in opened.keys():  # noqa: SIM118  # no mapping
                dtype: torch.dtype = opened.get_slice(name)[:0].dtype
                if dtype.is_floating_point:
                    return dtype
    return torch.float32
