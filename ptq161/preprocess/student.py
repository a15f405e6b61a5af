"""The student: a quantized model made dense again for training, and its merge into a full-precision model."""

from __future__ import annotations

import copy
from collections.abc import Iterator

import torch
from peft import LoraConfig, inject_adapter_in_model
from peft.tuners.lora import LoraLayer
from torch import Tensor, nn
from transformers import PreTrainedModel

from ptq161.methods import nf4
from ptq161.models.architectures import blocks_path, decoder_blocks
from ptq161.models.experts import fuse_experts
from ptq161.numerics import COMPUTE_DTYPES
from ptq161.packed.model import cast_rest, densify, packed_linears, tensor_bytes
from ptq161.packed.weight import PackedWeight
from ptq161.preprocess.restoration import Restoration
from ptq161.training.arithmetic.linears import FrozenLinear, LoraLinear, TrainedLinear
from ptq161.training.arithmetic.registry import FLOAT
from ptq161.training.loop import trained_parameters
from ptq161.training.targets import linears_of_roles

_ADAPTER = "default"


def target_names(model: PreTrainedModel, restoration: Restoration) -> list[str]:
    """Return the module paths of the linears that are trained.

    Raises:
        UserError: the architecture has none of the roles in ``restoration.targets``.
    """
    return linears_of_roles(model, restoration.targets, "preprocess.targets")


def trained_sizes(model: PreTrainedModel, restoration: Restoration) -> list[list[int]]:
    """Return the sizes of each linear that is trained, with the rank of a low-rank update.

    An expert that transformers keeps in one tensor with the others is left out.
    """
    rank = [restoration.rank] if restoration.update == "lora" else []
    modules = dict(model.named_modules())
    linears = (modules.get(name) for name in target_names(model, restoration))
    return [[linear.out_features, linear.in_features, *rank] for linear in linears if isinstance(linear, nn.Linear)]


def make_student(packed: PreTrainedModel, restoration: Restoration, device: torch.device) -> PreTrainedModel:
    """Return a dense copy of a quantized model in which only the update is trained.

    Frozen weights are in ``restoration.compute_dtype``, trained parameters in float32. A low-rank update is zero at
    first; torch's global generator initializes its factors.
    """
    student = copy.deepcopy(packed)
    densify(student, COMPUTE_DTYPES[restoration.compute_dtype])
    student.requires_grad_(False)
    names = target_names(student, restoration)
    if restoration.update == "lora":
        for name, base in _other_bases(packed, restoration).items():
            _linear(student, name).weight.data.copy_(base.dequantize())
        _add_adapters(student, names, restoration)
    else:
        layers = packed_linears(packed)
        for name in names:
            _linear(student, name).weight = nn.Parameter(layers[name].dequantize())
    if restoration.arithmetic != FLOAT:
        for name in names:
            student.set_submodule(name, _in_arithmetic(student.get_submodule(name), restoration))
    nn.Module.to(student, device)
    student.config.use_cache = False
    if restoration.gradient_checkpointing:
        student.activation_checkpointing_enable({"use_reentrant": False})
    student.train()
    return student


def memory(packed: PreTrainedModel, student: PreTrainedModel, restoration: Restoration) -> dict[str, int]:
    """Return the bytes that the training of the target linears takes, beside activations.

    Returns:
        ``trained_bytes``, parameters in float32; ``optimizer_bytes``, the two moments of each; ``base_bytes``, the
        frozen weights under an update as they are stored; ``base_held_bytes``, as this training holds them: dense,
        and once for each product of an arithmetic other than float. A full update has no base.
    """
    names = target_names(packed, restoration) if restoration.update == "lora" else []
    layers = packed_linears(packed)
    bases = {name: layers[name].packed for name in names} | _other_bases(packed, restoration)
    frozen = (tensor for name in names for tensor in _frozen(student.get_submodule(name)))
    trained = tensor_bytes(trained_parameters(student).values())
    return {
        "trained_bytes": trained,
        "optimizer_bytes": 2 * trained,
        "base_bytes": sum(base.nbytes for base in bases.values()),
        "base_held_bytes": tensor_bytes(frozen),
    }


def _other_bases(packed: PreTrainedModel, restoration: Restoration) -> dict[str, PackedWeight]:
    """Return the weight under each update where it is not the packed one, by module path."""
    if restoration.base == "packed":
        return {}
    layers = packed_linears(packed)
    return {name: nf4.quantize_weight(layers[name].dequantize()) for name in target_names(packed, restoration)}


def _frozen(module: nn.Module) -> Iterator[Tensor]:
    yield from (parameter for parameter in module.parameters() if not parameter.requires_grad)
    yield from module.buffers()


def merge(packed: PreTrainedModel, student: PreTrainedModel, restoration: Restoration) -> PreTrainedModel:
    """Merge the trained update into the quantized model, in place, which becomes a full-precision model.

    Everything is float32: the weights that the packed bytes dequantize to, and on the targets
    ``W + alpha / rank * B A`` with the base W of the update (or the trained weight itself, for a full update).

    Returns:
        ``packed``, dense.
    """
    cast_rest(packed, torch.float32)
    bases = _other_bases(packed, restoration)
    densify(packed)
    for name in target_names(packed, restoration):
        linear, trained = _linear(packed, name), student.get_submodule(name)
        home = linear.weight.device
        with torch.no_grad():
            if name in bases:
                linear.weight.copy_(bases[name].dequantize())
            if isinstance(trained, LoraLayer):
                delta: Tensor = trained.get_delta_weight(_ADAPTER)  # type: ignore[operator]  # nn.Module's __getattr__
                linear.weight += delta.to(home)
            elif isinstance(trained, LoraLinear):
                linear.weight += trained.delta().to(home)
            else:
                assert isinstance(trained, nn.Linear)
                linear.weight.copy_(trained.weight)
    fuse_experts(packed)
    return packed.requires_grad_(True)


def _add_adapters(student: PreTrainedModel, names: list[str], restoration: Restoration) -> None:
    # peft would take the names in a mixture for those of fused experts if it saw the model's config.
    prefix = f"{blocks_path(student)}."
    config = LoraConfig(
        r=restoration.rank,
        lora_alpha=restoration.alpha,  # type: ignore[arg-type]  # any number; the annotation says int
        lora_dropout=restoration.dropout,
        target_modules=[name.removeprefix(prefix) for name in names],
    )
    inject_adapter_in_model(config, decoder_blocks(student), _ADAPTER)
    for layer in student.modules():
        if isinstance(layer, LoraLayer):
            # Autocast selects the product's dtype; peft would first copy its input to float32.
            layer.cast_input_dtype_enabled = False
    for parameter in student.parameters():
        if parameter.requires_grad:
            parameter.data = parameter.data.float()


def _in_arithmetic(trained: nn.Module, restoration: Restoration) -> nn.Module:
    """Return a target linear, or peft's layer of one, as a module that computes in the training's arithmetic."""
    if not isinstance(trained, LoraLayer):
        assert isinstance(trained, nn.Linear)
        return TrainedLinear(trained, restoration)
    base = trained.get_base_layer()
    assert isinstance(base, nn.Linear)
    down, up = (trained.get_submodule(f"lora_{factor}.{_ADAPTER}").get_parameter("weight") for factor in "AB")
    frozen = FrozenLinear(base.weight, base.bias, restoration, base.weight.dtype)
    return LoraLinear(frozen, down, up, restoration.alpha / restoration.rank, restoration, restoration.dropout)


def _linear(model: PreTrainedModel, name: str) -> nn.Linear:
    module = model.get_submodule(name)
    assert isinstance(module, nn.Linear)
    return module
