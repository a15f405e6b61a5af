"""The bytes of a packed model, from shapes and settings: a few rows of each shape are packed, and counted for all rows.

The stored bytes of every format are an amount for each row and an amount for all of them, so that two weights of a few
rows tell those of any number. What depends on the data is packed as usual data would be: the tiers of waterfill (its
mean is kept, and within a percent its bytes), and the salient columns of BiLLM (whose share hardly counts).
"""

from __future__ import annotations

import dataclasses
import functools
import itertools
import math
from collections.abc import Callable, Mapping
from typing import Any

import torch
from torch import Tensor, nn
from transformers import PreTrainedModel

from ptq161.errors import UserError
from ptq161.methods import gse, nf4, rtn
from ptq161.methods.awq import AWQ
from ptq161.methods.base import Method
from ptq161.methods.billm import BiLLM
from ptq161.methods.embeddings import GROUP_SIZES, embedding_weights
from ptq161.methods.fp4 import FP4
from ptq161.methods.fp8 import FP8
from ptq161.methods.gptq import GPTQ
from ptq161.methods.gse import GSE
from ptq161.methods.nf4 import NF4
from ptq161.methods.omniquant import OmniQuant
from ptq161.methods.pb_llm import PBLLM
from ptq161.methods.ptq161 import PTQ161
from ptq161.methods.ptq161.binarization import initial_scales, pack_weight
from ptq161.methods.ptq161.saliency import salient_mask
from ptq161.methods.qdrop import QDrop
from ptq161.methods.quant_dllm import QuantDLLM
from ptq161.methods.quip import QuIP
from ptq161.methods.rtn import RTN
from ptq161.methods.vptq import VPTQ
from ptq161.methods.waterfill import Waterfill, allot
from ptq161.models.architectures import decoder_blocks, input_groups
from ptq161.packed.allotted import AllottedWeight, Grid
from ptq161.packed.awq import AWQWeight
from ptq161.packed.billm import BiLLMWeight, BinaryGrid, BinaryPlanes
from ptq161.packed.embedding import install_embeddings
from ptq161.packed.fp4 import FP4Weight
from ptq161.packed.fp8 import FP8Weight
from ptq161.packed.layout import TENSOR_METADATA
from ptq161.packed.lenders import link_lenders
from ptq161.packed.linear import PackedLinear
from ptq161.packed.model import cast_rest, measure
from ptq161.packed.pb_llm import PBLLMWeight
from ptq161.packed.quip import QuIPWeight
from ptq161.packed.row_column_binary import RowColumnBinaryWeight
from ptq161.packed.tensor_file import file_bytes
from ptq161.packed.uniform import UniformWeight
from ptq161.packed.vector import Coded, Norm, VectorWeight
from ptq161.packed.weight import PackedWeight

_PERIOD = 64
"""Rows after which the bytes of any format repeat, times the length of its vectors."""
_BILLM_SALIENT = 0.1


@dataclasses.dataclass(frozen=True)
class Sizes:
    """The sizes of a packed model.

    Attributes:
        bits_per_weight: measured, over all packed linears.
        nominal_bits_per_weight: as the method's paper counts.
        checkpoint_bytes: of the file of tensors.
        linear_bytes: of its packed linears.
        other_bytes: of its other tensors.
    """

    bits_per_weight: float
    nominal_bits_per_weight: float
    checkpoint_bytes: int
    linear_bytes: int
    other_bytes: int


def packed_sizes(model: PreTrainedModel, method: Method, dtype: torch.dtype, *, embedding_bits: int = 16) -> Sizes:
    """Return what a quantized model will take.

    Args:
        model: from :func:`ptq161.estimate.shapes.empty_model`; its linears are replaced by packed ones, in place.
        method: the hyperparameters.
        dtype: in which everything but the packed weights is stored.
        embedding_bits: of token embeddings and head.

    Raises:
        UserError: the settings do not fit a linear, or the method is none of this project's own.
    """
    layout = functools.cache(functools.partial(packed_layout, method))
    for i, block in enumerate(decoder_blocks(model)):
        groups = [[f"{i}.{path}" for path in group] for group in input_groups(model, block)]
        lenders = method.lenders(groups) if isinstance(method, VPTQ) else {}
        for name in itertools.chain.from_iterable(groups):
            path = name.partition(".")[2]
            linear = block.get_submodule(path)
            assert isinstance(linear, nn.Linear)
            packed = dataclasses.replace(layout(linear.out_features, linear.in_features), lender=lenders.get(name))
            block.set_submodule(path, PackedLinear(packed, linear.bias))
    link_lenders(decoder_blocks(model))
    if embedding_bits < 16:
        rounding = RTN(bits=embedding_bits, group_size=GROUP_SIZES[embedding_bits])
        layouts_of_ends = {name: packed_layout(rounding, *w.shape) for name, w in embedding_weights(model).items()}
        install_embeddings(model, layouts_of_ends)
    cast_rest(model, dtype)
    layouts = _untied(model)
    stored = sum(tensor.numel() * tensor.element_size() for tensor in layouts.values())
    size = measure(model)
    return Sizes(
        bits_per_weight=size.bits_per_weight,
        nominal_bits_per_weight=method.nominal_bits(),
        checkpoint_bytes=file_bytes(layouts, TENSOR_METADATA),
        linear_bytes=size.linear_bytes,
        other_bytes=stored - size.linear_bytes,
    )


def packed_layout(method: Method, rows: int, columns: int) -> PackedWeight:
    """Return a packed weight ``[rows, columns]`` with tensors of the right shapes, on the meta device.

    Raises:
        UserError: the settings do not fit, or the method is none of this project's own.
    """
    pack = _PACK.get(type(method))
    if pack is None:
        raise UserError(f"the sizes of {type(method).__name__} are not known before it is run.")
    period = math.lcm(_PERIOD, *(getattr(method, name, 1) for name in ("vector_length", "outlier_vector_length")))
    few, more = (pack(method, _random(rows % period + period * i, columns)) for i in (1, 2))
    times = (rows - few.out_features) // period
    changes: dict[str, Any] = {}
    for name, tensor in few.state_dict().items():
        longer = more.state_dict()[name]
        shape = [size + times * (other - size) for size, other in zip(tensor.shape, longer.shape, strict=True)]
        changes[name] = torch.empty(shape, dtype=tensor.dtype, device="meta")
    return dataclasses.replace(few, out_features=rows, **changes)


def _untied(model: nn.Module) -> dict[str, Tensor]:
    """Return the state dict without parameters that are tied to another one, on the meta device too."""
    seen: set[int] = set()
    found: dict[str, Tensor] = {}
    for name, tensor in model.state_dict(keep_vars=True).items():
        if id(tensor) in seen:
            continue
        if isinstance(tensor, nn.Parameter):  # the buffers of packed linears of one shape are shared here alone
            seen.add(id(tensor))
        found[name] = tensor
    return found


def _random(rows: int, columns: int) -> Tensor:
    return torch.randn(rows, columns, generator=torch.Generator().manual_seed(0))


def _grid(weight: Tensor) -> Tensor:
    return torch.ones(len(weight), 1)


def _rtn(method: RTN, weight: Tensor) -> UniformWeight:
    return rtn.quantize_weight(
        weight, method.bits, group_size=method.group_size, symmetric=method.symmetric, scale_dtype=method.scale_dtype
    )


def _gptq(method: GPTQ, weight: Tensor) -> UniformWeight:
    packed = rtn.quantize_weight(
        weight, method.bits, group_size=method.group_size, symmetric=method.symmetric, scale_dtype=method.scale_dtype
    )
    ordered = method.act_order and method.group_size is not None
    return dataclasses.replace(packed, group_index=torch.zeros(weight.shape[1], dtype=torch.int32) if ordered else None)


def _learned_grid(method: OmniQuant | QDrop, weight: Tensor) -> UniformWeight:
    return rtn.quantize_weight(weight, method.bits, group_size=method.group_size, scale_dtype=method.scale_dtype)


def _qdrop(method: QDrop, weight: Tensor) -> UniformWeight:
    packed = _learned_grid(method, weight)
    if method.activation_bits is None:
        return packed
    return packed.with_activations(method.activation_bits, torch.ones(1), torch.zeros(1))


def _awq(method: AWQ, weight: Tensor) -> AWQWeight:
    packed = rtn.quantize_weight(weight, method.bits, group_size=method.group_size, scale_dtype=method.scale_dtype)
    return AWQWeight.from_uniform(packed, torch.ones(weight.shape[1]), method.scale_dtype)


def _quip(method: QuIP, weight: Tensor) -> QuIPWeight:
    codes = torch.zeros(weight.shape, dtype=torch.uint8)
    scales = torch.ones(weight.shape[1]) if method.rescale else None
    return QuIPWeight.pack(
        codes,
        torch.ones(1),
        method.bits,
        rotation=method.rotation,
        seed=0,
        input_scales=scales,
        scale_dtype=method.scale_dtype,
    )


def _pb_llm(method: PBLLM, weight: Tensor) -> PBLLMWeight:
    # The scores above that of this place are salient.
    salient = torch.arange(weight.numel()).view(weight.shape) > int(weight.numel() * method.low_frac)
    row = _grid(weight)
    return PBLLMWeight.pack(
        salient,
        weight > 0,
        torch.zeros(weight.shape, dtype=torch.uint8),
        means=row,
        scales=row,
        high_scales=row,
        high_zero_points=row,
        high_bit=method.high_bit,
        scale_dtype=method.scale_dtype,
    )


def _billm(method: BiLLM, weight: Tensor) -> BiLLMWeight:
    rows, columns = weight.shape
    blocks = -(-columns // method.column_block)
    salient = torch.arange(columns) < _BILLM_SALIENT * columns
    plane = weight > 0
    grid = BinaryGrid(scales=torch.ones(4, rows, blocks), means=torch.ones(3, rows, blocks))
    return BiLLMWeight.pack(
        BinaryPlanes(salient, plane, plane, plane), grid, method.column_block, scale_dtype=method.scale_dtype
    )


def _quant_dllm(method: QuantDLLM, weight: Tensor) -> RowColumnBinaryWeight:
    rows, columns = weight.shape
    orders = method.orders_of(weight.square())
    terms, blocks = int(orders.max()), -(-columns // method.column_block)
    return RowColumnBinaryWeight.pack(
        orders=orders,
        signs=torch.zeros(terms, rows, columns, dtype=torch.bool),
        row_scales=torch.ones(terms, rows, blocks),
        column_scales=torch.ones(terms, columns),
        column_block=method.column_block,
        scale_dtype=method.scale_dtype,
    )


def _vptq(method: VPTQ, weight: Tensor) -> VectorWeight:
    rows, columns = weight.shape
    outliers = method.parts(columns)[0].stop

    def coded(groups: int, centroids: int, length: int, n: int) -> Coded:
        return Coded(torch.zeros(groups, centroids, length), torch.zeros(-(-rows // length), n, dtype=torch.int64))

    inner = columns - outliers
    labels = torch.arange(columns) % method.groups
    labels[columns - outliers :] = method.groups
    column = torch.ones(columns) if method.normalize else None
    return VectorWeight.pack(
        coded(method.groups, method.centroids, method.vector_length, inner),
        (rows, columns),
        residual=coded(method.groups, method.residual_centroids, method.vector_length, inner)
        if method.residual_centroids
        else None,
        outlier=coded(1, method.outlier_centroids, method.outlier_vector_length, outliers) if outliers else None,
        # In the order of quantization without a permutation: the outliers, then group by group.
        labels=labels if method.permute else None,
        norm=Norm(column, column, _grid(weight) if method.row_scales else None),
        scale_dtype=method.scale_dtype,
    )


def _ptq161(method: PTQ161, weight: Tensor) -> PackedWeight:
    mask = salient_mask(torch.arange(weight.shape[1], dtype=torch.float32), method.mask_ratio)
    mean, scale = initial_scales(weight, mask)
    angles = _grid(weight), torch.ones(1, weight.shape[1])
    return pack_weight(
        weight, mask, mean, scale, *angles, method.salient_bits, method.salient_range, method.scale_dtype
    )


def _waterfill(method: Waterfill, weight: Tensor) -> AllottedWeight:
    columns = weight.shape[1]
    energy = torch.randn(columns, generator=torch.Generator().manual_seed(0)).exp()
    row = _grid(weight)
    grid = Grid(row=row, column=torch.ones(columns), scale=row, zero_point=torch.zeros(len(weight), 1))
    codes = torch.zeros(weight.shape, dtype=torch.uint8)
    bits = allot(energy, method.bits, method.tiers)
    return AllottedWeight.pack(codes, bits, grid, tiers=list(method.tiers), scale_dtype=method.scale_dtype)


_PACK: Mapping[type, Callable[[Any, Tensor], PackedWeight]] = {
    AWQ: _awq,
    BiLLM: _billm,
    FP4: lambda method, weight: FP4Weight.rounded(weight, method.block_format, method.group_size),
    FP8: lambda method, weight: FP8Weight.rounded(weight, method.group_size, method.scale_dtype),
    GPTQ: _gptq,
    GSE: lambda method, weight: gse.quantize_weight(weight, method.bits, method.group_size),
    NF4: lambda method, weight: nf4.quantize_weight(weight, method.group_size, scale_dtype=method.scale_dtype),
    OmniQuant: _learned_grid,
    PBLLM: _pb_llm,
    PTQ161: _ptq161,
    QDrop: _qdrop,
    QuIP: _quip,
    QuantDLLM: _quant_dllm,
    RTN: _rtn,
    VPTQ: _vptq,
    Waterfill: _waterfill,
}
"""How each method packs a weight ``[out, in]`` of a few rows."""
