"""Rounding of the token embeddings, which below two bits per weight dominate a small model's checkpoint."""

from __future__ import annotations

from torch import Tensor, nn
from transformers import PreTrainedModel

from ptq161.checks import check_choice
from ptq161.errors import UserError
from ptq161.methods.rtn import quantize_rows
from ptq161.models.architectures import token_embeddings
from ptq161.models.settings import EMBEDDING_BITS
from ptq161.packed.embedding import embedding_bits, install_embeddings
from ptq161.packed.model import packed_linears

GROUP_SIZES = {8: None, 4: 64}
"""Columns that share a scale and a zero point, by the bits of a code; None is all columns of a row."""


def quantize_embeddings(model: PreTrainedModel, bits: int) -> PreTrainedModel:
    """Round a quantized model's token embeddings, at its input and its output, to nearest, in place.

    Each token's row, or each 64 columns of it, has a scale and a zero point in float16. Tied embeddings stay tied. They
    count among the other bytes of a checkpoint, not among the linears'. Position embeddings stay as they are.

    Args:
        model: its linears are packed.
        bits: 8 or 4; 16 leaves the embeddings as they are.

    Returns:
        the same model.

    Raises:
        UserError: ``bits`` is another number; the linears are not packed, or the embeddings already are; an embedding
            is of an unknown class, or its weights are too small or too large for float16.

    Example:
        >>> import ptq161, torch
        >>> from transformers import LlamaConfig, LlamaForCausalLM
        >>> sizes = {"vocab_size": 8, "hidden_size": 8, "intermediate_size": 8, "num_attention_heads": 1}
        >>> model = LlamaForCausalLM(LlamaConfig(num_hidden_layers=1, **sizes))
        >>> model = ptq161.quantize(model, torch.zeros(1, 2, dtype=torch.long), ptq161.RTN(bits=2))
        >>> model = quantize_embeddings(model, 4)
        >>> model.lm_head
        PackedHead(in_features=8, out_features=8, format=uniform, bits_per_weight=8.00)
    """
    check_choice("model.embedding_bits", bits, EMBEDDING_BITS)
    if bits == 16:
        return model
    if not packed_linears(model):
        raise UserError(f"model.embedding_bits={bits}: the model has no packed linears; quantize it first.")
    if embedding_bits(model):
        raise UserError(f"model.embedding_bits={bits}: the model's embeddings are already quantized.")
    install_embeddings(
        model,
        {name: quantize_rows(w, bits, group_size=GROUP_SIZES[bits]) for name, w in embedding_weights(model).items()},
    )
    return model


def embedding_weights(model: PreTrainedModel) -> dict[str, Tensor]:
    """Return the weights ``[vocabulary, hidden]`` of a model's token embeddings by the modules' names, tied ones once.

    Example:
        >>> from transformers import LlamaConfig, LlamaForCausalLM
        >>> sizes = {"vocab_size": 8, "hidden_size": 8, "intermediate_size": 8, "num_attention_heads": 1}
        >>> sorted(embedding_weights(LlamaForCausalLM(LlamaConfig(num_hidden_layers=1, **sizes))))
        ['lm_head', 'model.embed_tokens']
    """
    names: dict[nn.Parameter, str] = {}
    for name, module in token_embeddings(model).items():
        names.setdefault(module.get_parameter("weight"), name)
    return {name: weight.detach() for weight, name in names.items()}
