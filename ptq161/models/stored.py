"""A model whose decoder blocks stay on disk: the weights of their linears are read while they are worked on.

Everything else (embeddings, norms, biases, routers, head) is memory-mapped at once: most of it is small, and of an
embedding only the rows that are looked up are read. Names and layouts of tensors are translated by transformers' own
code, so that a block is bit for bit the one that ``from_pretrained`` makes.
"""

from __future__ import annotations

import copy
import json
from collections.abc import Iterable, Iterator, Mapping
from contextlib import ExitStack, contextmanager
from pathlib import Path
from typing import Any

import torch
from accelerate import init_empty_weights
from safetensors import safe_open
from torch import Tensor, nn
from transformers import AutoConfig, GenerationConfig, PretrainedConfig, PreTrainedModel
from transformers.conversion_mapping import get_model_conversion_mapping
from transformers.core_model_loading import (
    WeightConverter,
    WeightRenaming,
    convert_and_load_state_dict_in_model,
    rename_source_key,
)
from transformers.modeling_utils import LoadStateDictConfig
from transformers.utils import logging as transformers_logging

from ptq161.errors import UserError
from ptq161.files.reading import reading
from ptq161.models.architectures import architecture_from_config, blocks_path, decoder_blocks, quantized_linears
from ptq161.models.checks import check_finite, check_linears, check_not_quantized
from ptq161.models.experts import split_experts
from ptq161.models.loading import auto_class, cut_to, loading_errors, source_of
from ptq161.models.settings import ModelConfig
from ptq161.numerics import plain_torch

_INDEX = "model.safetensors.index.json"
_SINGLE = "model.safetensors"
_ADVICE = "get the model again"


class StoredModel:
    """A model in a Hugging Face folder.

    Args:
        config: its ``path`` is the folder, its ``n_blocks`` how many blocks are kept.

    Attributes:
        model: in evaluation mode, with the experts of a mixture as linears of their own; the weights of the linears
            that are quantized are on the meta device.

    Raises:
        UserError: the folder is missing or no model of safetensors, a shard or a tensor is missing or has another shape
            than the config says, the architecture is not supported, the model is already quantized, or a value of what
            is not quantized is NaN or infinite.
    """

    model: PreTrainedModel

    def __init__(self, config: ModelConfig) -> None:
        source, arguments = source_of(config)
        self._folder = Path(source)
        with loading_errors(config):
            hf_config = AutoConfig.from_pretrained(source, **arguments)
        architecture_from_config(hf_config)
        check_not_quantized(hf_config)
        with reading(self._folder, _ADVICE):
            self._files = _files_of(self._folder)
            self._dtype = _dtype(hf_config, self._files)
        with plain_torch(), init_empty_weights(include_buffers=False):
            model: PreTrainedModel = auto_class(hf_config).from_config(hf_config, dtype=self._dtype)
        _generation_as_stored(model, self._folder)
        cut_to(model.eval(), config.n_blocks)
        check_linears(model)
        self.model = model
        conversions: list[Any] = get_model_conversion_mapping(model)
        self._conversions = conversions
        self._sources, converted = self._route()
        self._check_layout(converted)
        lazy = _weights_of_linears(model)
        rest = set(self._sources) - lazy
        self._load(rest)
        check_finite((name, weight) for name, weight in model.named_parameters() if name in rest)
        missing = self._load(rest)  # mapped anew: the pages that were read for the check are given back
        model.tie_weights(missing_keys=missing - lazy, recompute_mapping=False)
        # As they are stored, for reading; as the driver sees them while they are not in memory.
        self._fused = [_sharing_copy(block) for block in decoder_blocks(model)]
        split_experts(model)
        self._empty = list(decoder_blocks(model))
        prefixes = [f"{blocks_path(model)}.{i}." for i in range(len(self._empty))]
        self._lazy = [{name for name in lazy if name.startswith(prefix)} for prefix in prefixes]

    @contextmanager
    def resident(self, blocks: Iterable[int]) -> Iterator[None]:
        """Have the weights of decoder blocks in memory inside the context; what was made of the blocks is dropped.

        Raises:
            UserError: a shard cannot be read, or a weight is NaN or infinite.
        """
        blocks = list(blocks)
        try:
            for i in blocks:
                self._read_block(i)
            yield
        finally:
            for i in blocks:
                decoder_blocks(self.model)[i] = self._empty[i]

    @contextmanager
    def tensors(self) -> Iterator[Mapping[str, Tensor]]:
        """Yield the state dict, whose blocks are read as their names come by."""
        with ExitStack() as stack:
            yield _StateDict(self, stack)

    def block_of(self, name: str) -> int | None:
        """Return the decoder block of a tensor of the state dict; None where it is outside."""
        inside, _, rest = name.partition(f"{blocks_path(self.model)}.")
        return None if inside or not rest else int(rest.partition(".")[0])

    def _read_block(self, i: int) -> None:
        block = decoder_blocks(self.model)[i] = _sharing_copy(self._fused[i])
        missing = self._load(self._lazy[i])
        if missing := missing & self._lazy[i]:
            raise UserError(f"{self._folder}: tensor {min(missing)} is missing from the weights; {_ADVICE}.")
        prefix = f"{blocks_path(self.model)}.{i}."
        lazy = ((name, tensor) for name, tensor in block.named_parameters(prefix[:-1]) if name in self._lazy[i])
        check_finite(lazy)
        split_experts(self.model)

    def _route(self) -> tuple[dict[str, list[str]], set[str]]:
        """Return, for each tensor of the model, those of the folder that it is made of; and which of these change."""
        empty = self.model.state_dict()
        renamings = [entry for entry in self._conversions if isinstance(entry, WeightRenaming)]
        converters = [entry for entry in self._conversions if isinstance(entry, WeightConverter)]
        prefix = self.model.base_model_prefix
        sources: dict[str, list[str]] = {}
        converted: set[str] = set()
        for name in self._files:
            target, pattern = rename_source_key(name, renamings, converters, prefix, empty)
            if target not in empty and name in empty:
                target, pattern = rename_source_key(name, [], [], prefix, empty)
            if target in empty:
                sources.setdefault(target, []).append(name)
                if pattern is not None:
                    converted.add(name)
        return sources, converted

    def _check_layout(self, converted: set[str]) -> None:
        """Check that every tensor is there, and its shape where it is stored as the model has it."""
        wanted = self.model.state_dict()
        tied = self.model.all_tied_weights_keys
        absent = {name for name in wanted if name not in self._sources}
        # Of tied tensors one is enough.
        excused = {name for pair in tied.items() for name in pair if not absent.issuperset(pair)}
        if missing := absent - excused:
            raise UserError(f"{self._folder}: tensor {min(missing)} is missing from the weights; {_ADVICE}.")
        kept = {name: target for target, names in self._sources.items() for name in names if name not in converted}
        with reading(self._folder, _ADVICE):
            shapes = {name: part.get_shape() for name, part in self._slices(kept)}
        for name, target in kept.items():
            if shapes[name] != list(wanted[target].shape):
                raise UserError(
                    f"{self._folder}: tensor {name} has shape {shapes[name]} and by the config "
                    f"{list(wanted[target].shape)}; {_ADVICE}."
                )

    def _slices(self, names: Iterable[str]) -> Iterator[tuple[str, Any]]:
        """Yield tensors of the folder, none of them read yet, file by file."""
        by_file: dict[Path, list[str]] = {}
        for name in names:
            by_file.setdefault(self._files[name], []).append(name)
        for file, inside in by_file.items():
            with safe_open(file, framework="pt") as opened:
                for name in inside:
                    yield name, opened.get_slice(name)

    def _load(self, targets: Iterable[str]) -> set[str]:
        """Put tensors of the folder into the model; return the names of the model's that were not put there."""
        names = [name for target in targets for name in self._sources[target]]
        settings = LoadStateDictConfig(
            dtype=self._dtype,
            dtype_plan=self.model._get_dtype_plan(self._dtype),
            weight_mapping=self._conversions,
            ignore_mismatched_sizes=True,
        )
        with reading(self._folder, _ADVICE), _without_progress_bar():
            found, _ = convert_and_load_state_dict_in_model(self.model, dict(self._slices(names)), settings)
            if wrong := sorted(key for key, *_ in found.mismatched_keys):
                raise UserError(f"{self._folder}: tensor {wrong[0]} has another shape than the config says; {_ADVICE}.")
        missing: set[str] = found.missing_keys
        return missing


class _StateDict(Mapping[str, Tensor]):
    """The state dict of a stored model, one block of it in memory at a time; names in order read each block once."""

    def __init__(self, stored: StoredModel, opened: ExitStack) -> None:
        self._stored, self._opened = stored, opened
        self._block: int | None = None
        self._tensors: dict[str, Tensor] = stored.model.state_dict()
        self._names = list(self._tensors)

    def __getitem__(self, name: str) -> Tensor:
        block = self._stored.block_of(name)
        if block is not None and block != self._block:
            self._tensors.clear()
            self._opened.close()
            self._opened.enter_context(self._stored.resident([block]))
            self._block, self._tensors = block, self._stored.model.state_dict()
        return self._tensors[name]

    def __iter__(self) -> Iterator[str]:
        return iter(self._names)

    def __len__(self) -> int:
        return len(self._names)


def _files_of(folder: Path) -> dict[str, Path]:
    """Return the file of each tensor of a folder."""
    if (folder / _SINGLE).is_file():
        with safe_open(folder / _SINGLE, framework="pt") as opened:
            return dict.fromkeys(opened.keys(), folder / _SINGLE)
    if not (folder / _INDEX).is_file():
        raise UserError(f"{folder} has neither {_SINGLE} nor {_INDEX}: only models of safetensors are read in parts.")
    names: dict[str, str] = json.loads((folder / _INDEX).read_text(encoding="utf-8"))["weight_map"]
    for file in sorted(set(names.values())):
        if not (folder / file).is_file():
            raise UserError(f"{folder} has no {file}, which {_INDEX} names; {_ADVICE}.")
        with safe_open(folder / file, framework="pt") as opened:
            if lost := sorted({name for name, home in names.items() if home == file} - set(opened.keys())):
                raise UserError(f"{folder / file} has no tensor {lost[0]}, which {_INDEX} names; {_ADVICE}.")
    return {name: folder / file for name, file in names.items()}


def _dtype(config: PretrainedConfig, files: Mapping[str, Path]) -> torch.dtype:
    """Return the dtype that transformers takes as ``auto``: the config's, or of the first float tensor."""
    named: Any = config.dtype
    if named is not None:
        dtype: torch.dtype = getattr(torch, named) if isinstance(named, str) else named
        return dtype
    with safe_open(min(files.values()), framework="pt") as opened:
        dtypes: list[torch.dtype] = [opened.get_slice(name)[:0].dtype for name in opened.keys()]  # noqa: SIM118  # no mapping
    return next((dtype for dtype in dtypes if dtype.is_floating_point), dtypes[0])


def _generation_as_stored(model: PreTrainedModel, folder: Path) -> None:
    """Take over the settings of generation as ``from_pretrained`` does."""
    if model.can_generate():
        own = (folder / "generation_config.json").is_file()
        other: dict[str, Any] = {} if own else {"config_file_name": "config.json", "_from_model_config": True}
        model.generation_config = GenerationConfig.from_pretrained(folder, **other)


def _weights_of_linears(model: PreTrainedModel) -> set[str]:
    """Return the names of all tensors of the model that hold weights of quantized linears, fused or not."""
    split = copy.deepcopy(model)
    split_experts(split)
    before, after = set(model.state_dict()), set(split.state_dict())
    weights = {f"{blocks_path(model)}.{name}.weight" for name, _ in quantized_linears(split)}
    return before - (after - weights)


def _sharing_copy(block: nn.Module) -> nn.Module:
    """Copy a block's modules; the tensors are the same ones."""
    tensors = [*block.parameters(), *block.buffers()]
    return copy.deepcopy(block, {id(tensor): tensor for tensor in tensors})


@contextmanager
def _without_progress_bar() -> Iterator[None]:
    shown = transformers_logging.is_progress_bar_enabled()
    transformers_logging.disable_progress_bar()
    try:
        yield
    finally:
        if shown:
            transformers_logging.enable_progress_bar()
