"""Token embeddings that exist only as packed tensors, at a model's input and, tied to them or not, at its output."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import Any, Self

import torch
from accelerate import init_empty_weights
from torch import Tensor, nn
from transformers import PreTrainedModel

from ptq161.errors import UserError
from ptq161.models.linears import linear_of
from ptq161.packed.linear import PackedHead, PackedModule
from ptq161.packed.uniform import UniformWeight
from ptq161.packed.weight import PackedWeight

_SCALE = "scalar_embed_scale"
"""Attribute of an embedding of transformers whose rows are multiplied by a number (Gemma 3)."""


class PackedEmbedding(PackedModule):
    """An embedding of which only the rows that are looked up are dequantized.

    Args:
        packed: the weight ``[vocabulary, hidden]``.
        like: the dense embedding that it stands for; its weight is not read.

    Attributes:
        dtype: of what is looked up; :meth:`torch.nn.Module.to` changes it.

    Raises:
        UserError: the embedding is of an unknown class.

    Example:
        >>> codes = torch.tensor([[0, 1, 2], [3, 3, 0]])
        >>> packed = UniformWeight.pack(codes, torch.ones(2, 1), torch.zeros(2, 1), bits=2)
        >>> embedding = PackedEmbedding(packed, nn.Embedding(2, 3))
        >>> embedding(torch.tensor([[1, 0, 1]]))
        tensor([[[3., 3., 0.],
                 [0., 1., 2.],
                 [3., 3., 0.]]])
    """

    def __init__(self, packed: UniformWeight, like: nn.Module) -> None:
        super().__init__(packed)
        scale = getattr(like, _SCALE, None)
        if not isinstance(like, nn.Embedding) or (type(like) is not nn.Embedding and scale is None):
            raise UserError(
                f"model.embedding_bits: an embedding of class {type(like).__name__} cannot be packed: use 16."
            )
        self.num_embeddings, self.embedding_dim = packed.out_features, packed.in_features
        self.padding_idx = like.padding_idx
        self.dtype = like.weight.dtype
        self._class, self._scale = type(like), scale

    def forward(self, tokens: Tensor) -> Tensor:
        """Look up ``[...]`` integer tokens: ``[..., hidden]`` in :attr:`dtype`."""
        packed = self.packed
        assert isinstance(packed, UniformWeight)
        rows = packed.at(tokens.flatten()).dense(self.dtype).view(*tokens.shape, self.embedding_dim)
        return rows if self._scale is None else rows * torch.tensor(self._scale, device=rows.device).to(self.dtype)

    def dense(self) -> nn.Embedding:
        """Return the embedding of the dequantized weight, in :attr:`dtype`."""
        settings: dict[str, Any] = {} if self._scale is None else {"embed_scale": self._scale}
        with init_empty_weights(include_buffers=False):
            embedding = self._class(self.num_embeddings, self.embedding_dim, self.padding_idx, **settings)
        embedding.weight = nn.Parameter(self.packed.dense(self.dtype))
        return embedding.train(self.training)

    def extra_repr(self) -> str:
        """Return shape and bits, as they are printed in a model."""
        return f"{self.num_embeddings}, {self.embedding_dim}, bits_per_weight={self.packed.bits_per_weight:.2f}"

    def _apply(self, fn: Callable[[Tensor], Tensor], recurse: bool = True) -> Self:
        self.dtype = fn(torch.empty(0, dtype=self.dtype)).dtype
        return super()._apply(fn, recurse)


def packed_embeddings(model: nn.Module) -> dict[str, PackedModule]:
    """Return a model's packed embeddings that have tensors of their own, by module path: a tied head is none.

    Example:
        >>> packed = UniformWeight.pack(torch.tensor([[0, 1]]), torch.ones(1, 1), torch.zeros(1, 1), bits=2)
        >>> embedding = PackedEmbedding(packed, nn.Embedding(1, 2))
        >>> list(packed_embeddings(nn.Sequential(embedding, PackedHead(packed, owner=embedding))))
        ['0']
    """
    found = ((name, m) for name, m in model.named_modules() if isinstance(m, PackedEmbedding | PackedHead))
    return {name: module for name, module in found if list(module.buffers(recurse=False))}


def embedding_bits(model: nn.Module) -> int | None:
    """Return the bits of a code of a model's packed embeddings; None where they are dense.

    Example:
        >>> packed = UniformWeight.pack(torch.tensor([[0, 1]]), torch.ones(1, 1), torch.zeros(1, 1), bits=8)
        >>> embedding_bits(PackedEmbedding(packed, nn.Embedding(1, 2))), embedding_bits(nn.Embedding(1, 2))
        (8, None)
    """
    formats = [module.packed for module in packed_embeddings(model).values()]
    return max((packed.bits for packed in formats if isinstance(packed, UniformWeight)), default=None)


def rest_dtype(model: PreTrainedModel) -> torch.dtype:
    """Return the dtype of what is not packed, and of what is looked up in a packed embedding.

    Example:
        >>> from transformers import LlamaConfig, LlamaForCausalLM
        >>> sizes = {"vocab_size": 8, "hidden_size": 8, "intermediate_size": 8, "num_attention_heads": 1}
        >>> rest_dtype(LlamaForCausalLM(LlamaConfig(num_hidden_layers=1, **sizes)))
        torch.float32
    """
    embedding: Any = model.get_input_embeddings()
    dtype: torch.dtype = embedding.dtype if isinstance(embedding, PackedEmbedding) else embedding.weight.dtype
    return dtype


def install_embeddings(model: PreTrainedModel, packed: Mapping[str, PackedWeight]) -> None:
    """Replace a model's embeddings by packed ones, in place.

    Args:
        model: its embeddings may be on the meta device.
        packed: by module path: the weight of the input, and that of the head where it is not tied to it.

    Raises:
        UserError: a weight is of no embedding of this model, or the input's is missing.

    Example:
        >>> from transformers import LlamaConfig, LlamaForCausalLM
        >>> sizes = {"vocab_size": 2, "hidden_size": 8, "intermediate_size": 8, "num_attention_heads": 1}
        >>> model = LlamaForCausalLM(LlamaConfig(num_hidden_layers=1, tie_word_embeddings=True, **sizes))
        >>> zeros = torch.zeros(2, 8, dtype=torch.uint8)
        >>> packed = UniformWeight.pack(zeros, torch.ones(2, 1), torch.zeros(2, 1), bits=8)
        >>> install_embeddings(model, {"model.embed_tokens": packed})
        >>> type(model.lm_head).__name__, [name for name in model.state_dict() if "layers" not in name]
        ('PackedHead', ['model.embed_tokens.codes', 'model.embed_tokens.scales', 'model.embed_tokens.zero_points', \
'model.norm.weight'])
    """
    names = {module: name for name, module in model.named_modules()}
    dense: Any = model.get_input_embeddings()
    head: Any = model.get_output_embeddings()
    ends = {names[module] for module in (dense, head) if module is not None}
    own = packed.get(names[dense])
    if not isinstance(own, UniformWeight) or (wrong := set(packed) - ends):
        named = min(wrong) if isinstance(own, UniformWeight) else names[dense]
        raise UserError(f"the checkpoint is damaged: {named} is missing, or no embedding of this model.")
    embedding = PackedEmbedding(own, dense)
    model.set_submodule(names[dense], embedding)
    if head is not None:
        name = names[head]
        weight, owner = (packed[name], None) if name in packed else (embedding.packed, embedding)
        model.set_submodule(name, PackedHead(weight, head.bias, owner))
        # transformers would look for parameters to tie.
        tied = model._tied_weights_keys or {}
        model._tied_weights_keys = {key: of for key, of in tied.items() if key != f"{name}.weight"}
        model.all_tied_weights_keys.pop(f"{name}.weight", None)


def densify_embeddings(model: PreTrainedModel) -> None:
    """Replace packed embeddings by dense ones of the dequantized weights, in place; tied ones stay tied.

    Example:
        >>> from transformers import LlamaConfig, LlamaForCausalLM
        >>> sizes = {"vocab_size": 2, "hidden_size": 8, "intermediate_size": 8, "num_attention_heads": 1}
        >>> model = LlamaForCausalLM(LlamaConfig(num_hidden_layers=1, tie_word_embeddings=True, **sizes))
        >>> zeros = torch.zeros(2, 8, dtype=torch.uint8)
        >>> packed = UniformWeight.pack(zeros, torch.ones(2, 1), torch.zeros(2, 1), bits=8)
        >>> install_embeddings(model, {"model.embed_tokens": packed})
        >>> densify_embeddings(model)
        >>> model.lm_head.weight is model.model.embed_tokens.weight, bool(model.lm_head.weight.any())
        (True, False)
    """
    packed: Any = model.get_input_embeddings()
    if not isinstance(packed, PackedEmbedding):
        return
    names = {module: name for name, module in model.named_modules()}
    embedding = packed.dense()
    model.set_submodule(names[packed], embedding)
    head: Any = model.get_output_embeddings()
    if isinstance(head, PackedHead):
        tied = names[head] not in packed_embeddings(model)
        weight = embedding.weight if tied else nn.Parameter(head.packed.dense(packed.dtype))
        linear = linear_of(weight, head.bias)
        linear.weight = weight  # the very parameter, where it is tied
        model.set_submodule(names[head], linear)
    vars(model).pop("_tied_weights_keys", None)
    model.all_tied_weights_keys = model.get_expanded_tied_weights_keys(all_submodels=True)
