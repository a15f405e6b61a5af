"""Linears that share tensors, such as codebooks, of which one stores them: who lends what to whom.

A packed weight names its lender (:attr:`ptq161.packed.weight.PackedWeight.lender`); here the names are looked up, where
weights are rebuilt from what is stored, and where packed linears stand in a model.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from torch import Tensor, nn

from ptq161.errors import UserError
from ptq161.packed.linear import PackedLinear
from ptq161.packed.weight import PackedWeight, packed_weight_from


def lenders_of(wanted: Mapping[str, str | None]) -> dict[str, str]:
    """Return, for each linear that shares tensors, the name of the one that stores them.

    Args:
        wanted: by the name of each linear, ``"{block}.{path}"`` or a module path, its weight's ``lender``.

    Raises:
        UserError: a lender is not there, or shares tensors itself.

    Example:
        >>> lenders_of({"model.layers.13.q": None, "model.layers.3.q": None, "model.layers.3.k": "3.q"})
        {'model.layers.3.k': 'model.layers.3.q'}
    """
    sharing = {name: lender for name, lender in wanted.items() if lender is not None}
    if not sharing:
        return {}
    owners = [name for name in wanted if name not in sharing]
    ends = {name.split(".", i)[-1]: name for name in owners for i in range(name.count(".") + 1)}
    for name, lender in sharing.items():
        if lender not in ends:
            raise UserError(f"the checkpoint is damaged: {name} shares tensors of {lender}, which is not there.")
    return {name: ends[lender] for name, lender in sharing.items()}


def packed_weights_from(
    settings: Mapping[str, Mapping[str, Any]], tensors: Mapping[str, Mapping[str, Tensor]]
) -> dict[str, PackedWeight]:
    """Rebuild packed weights that may share tensors.

    Args:
        settings: of each, by ``"{block}.{path}"`` or by module path.
        tensors: that each stores, by the same names.

    Raises:
        UserError: one cannot be rebuilt, or the linear whose tensors it shares is not there.

    Example:
        >>> import dataclasses, torch
        >>> from ptq161.packed.vector import Coded, VectorWeight
        >>> one = VectorWeight.pack(Coded(torch.ones(1, 2, 2), torch.tensor([[0, 1]])), (2, 2))
        >>> weights = {"0.q": one, "0.k": dataclasses.replace(one, lender="0.q")}
        >>> tensors = {f"model.{name}": weight.state_dict() for name, weight in weights.items()}
        >>> [sorted(each) for each in tensors.values()]
        [['centroids', 'indices'], ['indices']]
        >>> settings = {f"model.{name}": weight.settings() for name, weight in weights.items()}
        >>> packed_weights_from(settings, tensors)["model.0.k"].dequantize().tolist()
        [[1.0, 1.0], [1.0, 1.0]]
    """
    lenders = lenders_of({name: each.get("lender") for name, each in settings.items()})
    found: dict[str, PackedWeight] = {}
    for name in sorted(settings, key=lambda name: name in lenders):
        lender = found[lenders[name]] if name in lenders else None
        found[name] = packed_weight_from(settings[name], tensors[name], lender)
    return {name: found[name] for name in settings}


def link_lenders(root: nn.Module) -> None:
    """Let every packed linear within ``root`` whose weight shares tensors read them from the linear that stores them.

    Whoever puts packed linears into a model calls this afterwards.

    Args:
        root: the model, or the list of its decoder blocks.

    Raises:
        UserError: a linear that stores shared tensors is not there.

    Example:
        >>> import dataclasses, torch
        >>> from ptq161.packed.vector import Coded, VectorWeight
        >>> one = VectorWeight.pack(Coded(torch.ones(1, 2, 2), torch.tensor([[0, 1]])), (2, 2))
        >>> block = {"q": PackedLinear(one), "k": PackedLinear(dataclasses.replace(one, lender="0.q"))}
        >>> blocks = nn.ModuleList([nn.ModuleDict(block)])
        >>> link_lenders(blocks)
        >>> blocks[0]["q"].centroids.fill_(2.0)[0, 0].tolist(), list(blocks[0]["k"].state_dict())
        ([2.0, 2.0], ['indices'])
        >>> blocks[0]["k"].dequantize().tolist()
        [[2.0, 2.0], [2.0, 2.0]]
    """
    found = {name: module for name, module in root.named_modules() if isinstance(module, PackedLinear)}
    for name, lender in lenders_of({name: layer.lender for name, layer in found.items()}).items():
        found[name].borrow_from(found[lender])
