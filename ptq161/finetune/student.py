"""The student: a quantized model whose stored values are trained, and its way back to bytes."""

from __future__ import annotations

import copy
import dataclasses
from collections.abc import Mapping
from typing import Any

import torch
from torch import nn
from torch.nn.utils import parametrize
from transformers import PreTrainedModel

from ptq161.driver.windows import moved
from ptq161.finetune.distillation import Distillation
from ptq161.finetune.layers import CastWeight, CodedLinear, RelativeWeight
from ptq161.methods.codes import BETAS
from ptq161.models.architectures import blocks_path, token_embeddings
from ptq161.numerics import COMPUTE_DTYPES
from ptq161.packed.lenders import link_lenders
from ptq161.packed.linear import PackedLinear
from ptq161.packed.model import cast_rest, packed_linears
from ptq161.packed.trainable import ScaledLinear, scaled_linears
from ptq161.training.loop import trained_parameters

_WEIGHT = "weight"


@dataclasses.dataclass(frozen=True)
class Student:
    """A quantized model in training.

    Attributes:
        model: a copy of it, in the compute dtype, on the device of the training.
        linears: those in training, by module path.
        norms: the parametrization of each norm's weight, by the module path of the norm.
        embeddings: the float32 weights of those in training, by module path; tied ones are one.
    """

    model: PreTrainedModel
    linears: Mapping[str, ScaledLinear | CodedLinear]
    norms: dict[str, RelativeWeight]
    embeddings: dict[str, nn.Parameter]

    def optimizer(self, distillation: Distillation) -> torch.optim.Optimizer:
        """Return AdamW over all that is trained: gains in the first group, then a latent or an embedding in each."""
        gains: list[nn.Parameter] = []
        groups: list[dict[str, Any]] = [{"params": gains, "lr": distillation.lr}]
        embeddings = {id(weight) for weight in self.embeddings.values()}
        for name, parameter in trained_parameters(self.model).items():
            if id(parameter) in embeddings:
                size = float(parameter.detach().square().mean().sqrt())
                groups.append({"params": [parameter], "lr": distillation.embedding_lr * size})
            elif name.endswith(".latent"):
                groups.append({"params": [parameter], "lr": distillation.code_lr})
            else:
                gains.append(parameter)
        return torch.optim.AdamW(groups, betas=BETAS, weight_decay=0.0, fused=True)

    @torch.no_grad()
    def store(self, packed: PreTrainedModel) -> None:
        """Write what was learned into the quantized model, in the dtypes in which it is stored.

        Raises:
            UserError: a value leaves the range of its dtype; the model is as it was then.
        """
        learned = {name: linear.repack() for name, linear in self.linears.items()}
        for name, weight in learned.items():
            before = packed.get_submodule(name)
            assert isinstance(before, PackedLinear)
            home = next(before.buffers()).device
            packed.set_submodule(name, PackedLinear(moved(weight, home), before.bias).train(before.training))
        link_lenders(packed)
        for name, relative in self.norms.items():
            gain = self.model.get_parameter(f"{name}.parametrizations.{_WEIGHT}.original")
            packed.get_submodule(name).get_parameter(_WEIGHT).copy_(relative.value(gain))
        for name, embedding in self.embeddings.items():
            packed.get_submodule(name).get_parameter(_WEIGHT).copy_(embedding)


def make_student(
    packed: PreTrainedModel, teacher: PreTrainedModel, distillation: Distillation, device: torch.device
) -> Student:
    """Return a copy of a quantized model in which only what ``distillation`` names is trained.

    Args:
        packed: the quantized model.
        teacher: the full-precision model on ``device``, its experts split where codes are learned.
        distillation: hyperparameters.
        device: of the training.
    """
    dtype = COMPUTE_DTYPES[distillation.compute_dtype]
    model = copy.deepcopy(packed)
    cast_rest(model, dtype)
    model.requires_grad_(False)
    model.eval()
    nn.Module.to(model, device)
    linears = _trained_linears(model, teacher, distillation)
    for name, linear in linears.items():
        model.set_submodule(name, linear.eval())
    norms = {}
    for name, norm in _norms(model).items() if distillation.train_norms else ():
        # From the quantized model itself: the copy's weight has been rounded to the compute dtype.
        norms[name] = RelativeWeight(packed.get_submodule(name), dtype).to(device)
        norm.register_parameter(_WEIGHT, nn.Parameter(torch.zeros_like(norms[name].start)))  # the gain
        # unsafe: the weight has another dtype than the gain.
        parametrize.register_parametrization(norm, _WEIGHT, norms[name], unsafe=True)
    embeddings: dict[str, nn.Parameter] = {}
    weights: dict[int, nn.Parameter] = {}  # by what they are in the quantized model: tied ones are one
    for name, embedding in token_embeddings(model).items() if distillation.train_embeddings else ():
        stored = packed.get_submodule(name).get_parameter(_WEIGHT)
        embeddings[name] = weights.setdefault(id(stored), nn.Parameter(stored.detach().to(device, torch.float32)))
        embedding.register_parameter(_WEIGHT, embeddings[name])
        parametrize.register_parametrization(embedding, _WEIGHT, CastWeight(dtype), unsafe=True)
    return Student(model, linears, norms, embeddings)


def _trained_linears(
    packed: PreTrainedModel, teacher: PreTrainedModel, distillation: Distillation
) -> Mapping[str, ScaledLinear | CodedLinear]:
    """Return what takes the place of each packed linear, by module path."""
    dtype, layers = COMPUTE_DTYPES[distillation.compute_dtype], packed_linears(packed)
    if distillation.update == "scales":
        weights = {name: layer.packed for name, layer in layers.items()}
        return scaled_linears(weights, {name: layer.bias for name, layer in layers.items()}, dtype)
    learned = {}
    for name, layer in layers.items():
        linear = teacher.get_submodule(name)
        assert isinstance(linear, nn.Linear)
        learned[name] = CodedLinear(layer.packed, linear, layer.bias, dtype)
    return learned


def _norms(model: PreTrainedModel) -> dict[str, nn.Module]:
    """Return the norms of the language model, of whatever class: the modules whose weight is a vector."""
    home = blocks_path(model).rpartition(".")[0]
    found = {}
    for name, module in model.get_submodule(home).named_modules(prefix=home):
        weight = module._parameters.get(_WEIGHT)
        if weight is not None and weight.ndim == 1:
            found[name] = module
    return found
